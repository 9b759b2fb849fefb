"""RMS norm of each head with a SiLU gate before or after it."""
