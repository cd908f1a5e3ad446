"""Reads prompts in chunks, whose tokens may leave early where a policy for prompts says so."""
