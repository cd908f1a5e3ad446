"""Learns to draft: records, trains, chooses and measures drafting policies."""
