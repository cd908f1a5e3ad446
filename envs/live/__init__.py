"""Lets a real engine decode while an agent decides, as one more environment."""
