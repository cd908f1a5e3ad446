"""Early-exit decoding of Hugging Face causal LMs."""

from offramp.worker.completion import Completion
from offramp.worker.config import EngineConfig
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.hf_generate import early_exit
from offramp.worker.sampling import SamplingParams
from offramp.worker.schedule import LOCKSTEP, Schedule
from offramp.worker.sequence import CompletionStats, KVMode, TokenEvent
from offramp.worker.snapshot import FULL_DEPTH, PolicySnapshot

__all__ = [
    "FULL_DEPTH",
    "LOCKSTEP",
    "AdaptiveEngine",
    "Completion",
    "CompletionStats",
    "EngineConfig",
    "KVMode",
    "PolicySnapshot",
    "SamplingParams",
    "Schedule",
    "TokenEvent",
    "early_exit",
]
