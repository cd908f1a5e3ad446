"""Decides how many workers a pool has, and which of them gets a request."""
