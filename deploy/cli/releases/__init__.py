"""Runs the commands that publish releases, watch over them, and say what became of them."""
