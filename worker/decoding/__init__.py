"""Decodes in waves: rows move through layers, leave early, and their tokens are emitted."""
