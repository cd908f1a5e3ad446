from __future__ import annotations

from support.training_sets import agent, data, deep_data, problem, ray_cluster

__all__ = ["agent", "data", "deep_data", "problem", "ray_cluster"]
