"""Recording: Ray workers decode documents into a trace store; a recording is read back whole."""
