"""An environment that a real engine decodes."""
