"""SwiGLU: the product of one half with the SiLU of the other."""
