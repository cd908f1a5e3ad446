"""Drafting policies for the lossless mode: static, confident, adaptive, learned."""
