"""Describes OpenAI's requests and replies: fields, names, and what is not supported."""
