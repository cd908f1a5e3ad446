"""A causal LM as layers that can be run one by one, with its cache of keys and values."""
