"""Rules of the literature as policies; docs/policies.md compares them with their papers."""
