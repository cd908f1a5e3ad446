"""Shows a channel to its operator on a web page, with the commands' promote and roll back."""
