"""Exit translators for models that were not trained to exit: fit, measure, save."""
