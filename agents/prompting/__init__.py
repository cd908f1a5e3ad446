"""Learns which tokens of a prompt leave: reads prompts, trains, chooses, measures, and saves."""
