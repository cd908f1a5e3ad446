"""Policies decide who leaves where; they are packed as weights that a worker checks first."""
