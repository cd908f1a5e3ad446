"""Records traces: what each exit saw and would have emitted."""
