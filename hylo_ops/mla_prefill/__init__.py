"""Attention of a chunk of new tokens over a long latent cache, expanded slice by slice (MLA prefill)."""
