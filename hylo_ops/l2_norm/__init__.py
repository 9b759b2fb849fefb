"""Unit vectors along the last dim."""
