"""CANDIDATES_V1: the scores of a few likely next tokens, without the LM head."""
