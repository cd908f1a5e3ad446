"""Replays recorded tokens as environments to learn in.

Importing this package registers ``offramp/TokenExit-v0``, ``offramp/SequenceExit-v0``,
``offramp/LiveExit-v0``, ``offramp/PrefillExit-v0`` and ``offramp/DraftExit-v0`` with Gymnasium.
The adapter of Stable-Baselines3 is in ``offramp.envs.adapters.sb3_vec_env``: apart, so that this
import stays light.
"""

import gymnasium as gym

from offramp.envs.adapters.draft_env import DraftExitEnv, DraftExitVectorEnv
from offramp.envs.adapters.sequence_env import SequenceExitEnv
from offramp.envs.adapters.token_env import TokenExitEnv
from offramp.envs.adapters.vector_env import SequenceExitVectorEnv, TokenExitVectorEnv
from offramp.envs.cores.batch import Finals, StepBatch
from offramp.envs.cores.draft_core import DraftExitCore
from offramp.envs.cores.draft_tables import CandidateDrafts
from offramp.envs.cores.sequence_core import SequenceExitCore
from offramp.envs.cores.token_core import TokenExitCore
from offramp.envs.live.live_env import LiveExitEnv
from offramp.envs.live.prefill_env import PrefillExitEnv
from offramp.envs.live.session import LiveSession, PromptSession
from offramp.envs.traces.store import TraceStore
from offramp.envs.traces.tokens import Quality, TokenTraces, quality_names, register_quality

__all__ = [
    "DRAFT_ENV_ID",
    "ENV_ID",
    "LIVE_ENV_ID",
    "PREFILL_ENV_ID",
    "SEQUENCE_ENV_ID",
    "CandidateDrafts",
    "DraftExitCore",
    "DraftExitEnv",
    "DraftExitVectorEnv",
    "Finals",
    "LiveExitEnv",
    "LiveSession",
    "PrefillExitEnv",
    "PromptSession",
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

LIVE_ENV_ID = "offramp/LiveExit-v0"
"""The same of sequences that an engine decodes."""

PREFILL_ENV_ID = "offramp/PrefillExit-v0"
"""The same of prompts that an engine reads."""

gym.register(
    id=ENV_ID,
    entry_point="offramp.envs.adapters.token_env:TokenExitEnv",
    vector_entry_point="offramp.envs.adapters.vector_env:TokenExitVectorEnv",
)

DRAFT_ENV_ID = "offramp/DraftExit-v0"
"""Likewise, of drafting and verifying."""

gym.register(
    id=DRAFT_ENV_ID,
    entry_point="offramp.envs.adapters.draft_env:DraftExitEnv",
    vector_entry_point="offramp.envs.adapters.draft_env:DraftExitVectorEnv",
)
gym.register(
    id=SEQUENCE_ENV_ID,
    entry_point="offramp.envs.adapters.sequence_env:SequenceExitEnv",
    vector_entry_point="offramp.envs.adapters.vector_env:SequenceExitVectorEnv",
)
gym.register(id=LIVE_ENV_ID, entry_point="offramp.envs.live.live_env:LiveExitEnv")
gym.register(id=PREFILL_ENV_ID, entry_point="offramp.envs.live.prefill_env:PrefillExitEnv")
