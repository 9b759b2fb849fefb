"""Gated delta rule: chunked over many tokens, recurrent for decode."""
