"""Fits heads that classify at exits, and places policies on what they say of held-out texts."""
