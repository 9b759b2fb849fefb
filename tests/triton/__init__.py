"""Tests of the Triton kernels in the interpreter; tests/test_triton.py runs them."""
