"""Learns from what an engine really did: collectors, rollouts, one learner."""
