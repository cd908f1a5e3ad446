"""Runs `offramp serve`, and reads its options."""
