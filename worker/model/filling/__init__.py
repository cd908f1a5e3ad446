"""Fills what tokens that leave early skip: the `project` mode of the cache."""
