"""Gymnasium and Stable-Baselines3 interfaces over the cores."""
