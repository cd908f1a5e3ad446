"""Fits rules whose parameters come from data, each on the training split alone."""
