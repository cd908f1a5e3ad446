"""Compiled kernels for few rows: products with kept weights, and whole decoder layers."""
