"""Runs a causal LM layer by layer, with its cache of keys and values."""
