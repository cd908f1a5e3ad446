"""Offers the cores as Gymnasium and Stable-Baselines3 environments."""
