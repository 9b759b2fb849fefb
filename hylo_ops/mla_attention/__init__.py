"""Causal attention over expanded keys and values (MLA in training and in the first prefill)."""
