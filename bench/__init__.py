"""Microbenchmarks of every op against its peers and the memory's bandwidth: `python -m bench STEM`."""
