"""The HTTP contract over one worker."""
