"""Meets Hugging Face: early exits behind ``model.generate``, model folders from GGUF files."""
