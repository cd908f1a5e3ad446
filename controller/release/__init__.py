"""Releases: bundles, signatures, the ledger, and registries that carry a channel's head."""
