"""Learning: p̂, PPO and PPO with jumps, and their export to numpy policies."""
