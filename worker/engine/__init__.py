"""Runs requests, which join and leave between launches, for scripts and for services."""
