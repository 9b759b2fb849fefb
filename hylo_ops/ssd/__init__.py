"""State-space duality scan of Mamba2: chunked over many tokens, recurrent for decode."""
