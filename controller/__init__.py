"""The domain: policies, features, bundles, signatures, registry. Never loads torch or ray."""

from offramp.controller.bundle import PolicyBundle
from offramp.controller.errors import OfframpError
from offramp.controller.features import (
    CANDIDATES_V1,
    OUTLOOK_V1,
    SKETCH_V1,
    SOFTMAX_V2,
    STATE_V1,
    FeatureSchema,
)
from offramp.controller.manifest import Manifest
from offramp.controller.mlp import MlpPolicy
from offramp.controller.policy import (
    ExitPolicy,
    FixedExit,
    LearningPolicy,
    NeverExit,
    RoutingPolicy,
    ThresholdPolicy,
    Verdict,
)
from offramp.controller.publisher import Publisher
from offramp.controller.redis_registry import RedisRegistry
from offramp.controller.registry import InMemoryRegistry, PolicyRegistry

__all__ = [
    "CANDIDATES_V1",
    "OUTLOOK_V1",
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
