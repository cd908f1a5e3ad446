"""Policies: who leaves where, packed as weights that a worker checks before it runs them."""
