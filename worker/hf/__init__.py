"""Early exits behind Hugging Face's ``model.generate``."""
