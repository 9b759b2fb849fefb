"""Pieces that two or more stems use."""
