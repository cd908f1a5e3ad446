"""Implements the vectorised environments in numpy, once for every adapter."""
