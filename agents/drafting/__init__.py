"""Learning to draft: recording, training, choosing and measuring drafting policies."""
