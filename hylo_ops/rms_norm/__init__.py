"""RMS norm of the last dim, with a residual added before it."""
