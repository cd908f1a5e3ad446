"""Stores recorded tokens on disk and in memory, and scores the token of an exit."""
