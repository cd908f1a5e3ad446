"""Defines policies, features, costs and signed releases. Never loads torch or ray."""

from offramp.controller.errors import OfframpError
from offramp.controller.features import (
    CANDIDATES_V1,
    OUTLOOK_V1,
    PROMPT_V1,
    SKETCH_V1,
    SOFTMAX_V2,
    STATE_V1,
    FeatureSchema,
)
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import (
    ExitPolicy,
    FixedExit,
    LearningPolicy,
    NeverExit,
    RoutingPolicy,
    ThresholdPolicy,
    Verdict,
)
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import InMemoryRegistry, PolicyRegistry

__all__ = [
    "CANDIDATES_V1",
    "OUTLOOK_V1",
    "PROMPT_V1",
    "SKETCH_V1",
    "SOFTMAX_V2",
    "STATE_V1",
    "ExitPolicy",
    "FeatureSchema",
    "FixedExit",
    "InMemoryRegistry",
    "LearningPolicy",
    "Manifest",
    "MlpPolicy",
    "NeverExit",
    "OfframpError",
    "PolicyBundle",
    "PolicyRegistry",
    "Publisher",
    "RedisRegistry",
    "RoutingPolicy",
    "ThresholdPolicy",
    "Verdict",
]
