"""Compiled kernels for few rows: products with kept weights, whole layers, a whole fill."""
