from __future__ import annotations

from support.studies import agent, deep_study, game, ray_cluster, study

__all__ = ["agent", "deep_study", "game", "ray_cluster", "study"]
