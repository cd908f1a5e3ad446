"""Puts early exits behind Hugging Face's ``model.generate``."""
