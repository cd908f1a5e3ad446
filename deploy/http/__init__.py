"""Answers OpenAI-compatible HTTP requests with whatever decodes behind them."""
