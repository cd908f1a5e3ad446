"""Early-exit decoding of Hugging Face causal LMs."""

from offramp.worker.completion import Completion, CompletionStats
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.sampling import SamplingParams
from offramp.worker.sequence import TokenEvent
from offramp.worker.snapshot import FULL_DEPTH, PolicySnapshot

__all__ = [
    "FULL_DEPTH",
    "AdaptiveEngine",
    "Completion",
    "CompletionStats",
    "PolicySnapshot",
    "SamplingParams",
    "TokenEvent",
]
