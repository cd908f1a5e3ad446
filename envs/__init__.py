"""Recorded tokens and the environments that replay them.

Importing this package registers ``offramp/TokenExit-v0`` and ``offramp/DraftExit-v0`` with
Gymnasium. The Stable-Baselines3
adapter is ``offramp.envs.sb3_vec_env.TokenExitVecEnv``: apart, so that this import stays light.
"""

import gymnasium as gym

from offramp.envs.batch import Finals, StepBatch
from offramp.envs.core import TokenExitCore
from offramp.envs.draft_core import DraftExitCore
from offramp.envs.draft_env import DraftExitEnv, DraftExitVectorEnv
from offramp.envs.gym_env import TokenExitEnv
from offramp.envs.qualities import Quality, quality_names, register_quality
from offramp.envs.store import TraceStore
from offramp.envs.tokens import TokenTraces
from offramp.envs.vector_env import TokenExitVectorEnv

__all__ = [
    "DRAFT_ENV_ID",
    "ENV_ID",
    "DraftExitCore",
    "DraftExitEnv",
    "DraftExitVectorEnv",
    "Finals",
    "Quality",
    "StepBatch",
    "TokenExitCore",
    "TokenExitEnv",
    "TokenExitVectorEnv",
    "TokenTraces",
    "TraceStore",
    "quality_names",
    "register_quality",
]

ENV_ID = "offramp/TokenExit-v0"
"""Name under which ``gymnasium.make`` and ``gymnasium.make_vec`` find the environment."""

gym.register(
    id=ENV_ID,
    entry_point="offramp.envs.gym_env:TokenExitEnv",
    vector_entry_point="offramp.envs.vector_env:TokenExitVectorEnv",
)

DRAFT_ENV_ID = "offramp/DraftExit-v0"
"""Likewise, of drafting and verifying."""

gym.register(
    id=DRAFT_ENV_ID,
    entry_point="offramp.envs.draft_env:DraftExitEnv",
    vector_entry_point="offramp.envs.draft_env:DraftExitVectorEnv",
)
