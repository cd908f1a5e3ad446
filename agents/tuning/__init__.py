"""Fits exit translators to models that were not trained to exit, measures and saves them."""
