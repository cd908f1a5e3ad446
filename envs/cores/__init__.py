"""The vectorised environments in numpy: one implementation behind every adapter."""
