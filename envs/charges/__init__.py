"""Charges what decoding costs."""
