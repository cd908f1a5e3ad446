"""Trace recording: what each exit saw and would have emitted."""
