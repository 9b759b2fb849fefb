"""Losses of a language model's head from hidden states: cross-entropy, and KL to a teacher."""
