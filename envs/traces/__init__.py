"""Recorded tokens: on disk, in memory, and how an exit's token is scored."""
