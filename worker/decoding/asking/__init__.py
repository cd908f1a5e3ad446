"""Asks policies at the exits: which rows together, what they read of the engine, how they fail."""
