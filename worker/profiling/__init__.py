"""Times a decode step for ``offramp profile``: rounds of real steps, a clock around their parts."""
