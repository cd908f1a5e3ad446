"""Answers OpenAI-compatible HTTP requests with one worker."""
