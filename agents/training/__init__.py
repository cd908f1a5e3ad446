"""Trains as ``offramp train`` does: families of policies, stages, checkpoints, sweeps."""
