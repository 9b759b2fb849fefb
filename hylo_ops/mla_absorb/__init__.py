"""Attention over a latent cache with the key up-projection absorbed into the query (MLA decode and prefill)."""
