"""Fits heads at exits, alone, with the whole model or with gates, and places their policies."""
