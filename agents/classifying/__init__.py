"""Fits heads that classify at exits, alone, with the whole model or with gates, and places policies."""
