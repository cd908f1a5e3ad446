"""Starts the Ray Serve pool with its settings and its Redis."""
