"""Recorded tokens and the environments that replay them.

Importing this package registers ``offramp/TokenExit-v0`` and ``offramp/SequenceExit-v0`` with
Gymnasium. Their Stable-Baselines3 adapters are in ``offramp.envs.sb3_vec_env``: apart, so that
this import stays light.
"""

import gymnasium as gym

from offramp.envs.batch import Finals, StepBatch
from offramp.envs.core import TokenExitCore
from offramp.envs.gym_env import TokenExitEnv
from offramp.envs.qualities import Quality, quality_names, register_quality
from offramp.envs.sequence_core import SequenceExitCore
from offramp.envs.sequence_env import SequenceExitEnv
from offramp.envs.store import TraceStore
from offramp.envs.tokens import TokenTraces
from offramp.envs.vector_env import SequenceExitVectorEnv, TokenExitVectorEnv

__all__ = [
    "ENV_ID",
    "SEQUENCE_ENV_ID",
    "Finals",
    "Quality",
    "SequenceExitCore",
    "SequenceExitEnv",
    "SequenceExitVectorEnv",
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
"""Name under which ``gymnasium.make`` and ``gymnasium.make_vec`` find the environment of tokens."""

SEQUENCE_ENV_ID = "offramp/SequenceExit-v0"
"""The same of sequences."""

gym.register(
    id=ENV_ID,
    entry_point="offramp.envs.gym_env:TokenExitEnv",
    vector_entry_point="offramp.envs.vector_env:TokenExitVectorEnv",
)
gym.register(
    id=SEQUENCE_ENV_ID,
    entry_point="offramp.envs.sequence_env:SequenceExitEnv",
    vector_entry_point="offramp.envs.vector_env:SequenceExitVectorEnv",
)
