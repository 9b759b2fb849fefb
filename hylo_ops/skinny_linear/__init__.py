"""Products of few rows with large weights, as a decode step has them."""
