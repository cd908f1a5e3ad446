"""Holds contests of drafters: lessons, turns, rows and pictures."""
