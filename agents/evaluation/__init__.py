"""Measures what a policy is worth on documents that nothing was chosen on."""
