"""Holds what papers and benchmarks need and the product does not."""
