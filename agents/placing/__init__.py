"""Placing: every family of policies at the operating points that are compared."""
