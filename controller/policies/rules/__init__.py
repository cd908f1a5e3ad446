"""Implements rules of the literature as policies; docs/policies.md compares them to the papers."""
