"""Helpers of the console's tests."""
