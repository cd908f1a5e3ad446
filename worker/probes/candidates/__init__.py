"""Scores a few likely next tokens at an exit without the LM head: CANDIDATES_V1."""
