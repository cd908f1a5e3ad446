"""Fits p̂, PPO and PPO with jumps, and exports them as numpy policies."""
