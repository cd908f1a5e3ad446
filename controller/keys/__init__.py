"""Keeps signing keys, wraps what they sign, and says by roots whose signatures count."""
