"""Follows a channel: takes releases, remembers them on disk, and drops those that do harm."""
