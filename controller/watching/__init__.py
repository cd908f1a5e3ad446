"""Counts what the requests of releases do, judges it, trips, rolls back, and moves canaries on."""
