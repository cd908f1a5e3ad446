"""Runs the subcommands of ``offramp``, one module per topic."""
