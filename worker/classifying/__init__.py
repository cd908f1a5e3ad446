"""Classifies whole sequences layer by layer: rows leave early, and the batch shrinks."""
