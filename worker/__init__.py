"""Decodes Hugging Face causal LMs with early exits."""

from offramp.worker.decoding.prompting.prompt_exits import PromptExits
from offramp.worker.decoding.request import (
    FULL_DEPTH,
    CompletionStats,
    KVMode,
    PolicySnapshot,
    TokenEvent,
)
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.engine.engine import AdaptiveEngine, Completion
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.hf.hf_generate import early_exit
from offramp.worker.model.precision import Precision

__all__ = [
    "FULL_DEPTH",
    "LOCKSTEP",
    "AdaptiveEngine",
    "Completion",
    "CompletionStats",
    "EngineConfig",
    "KVMode",
    "PolicySnapshot",
    "Precision",
    "PromptExits",
    "SamplingParams",
    "Schedule",
    "TokenEvent",
    "early_exit",
]
