"""What one kind of policy is packed as: JSON parameters and tensors, there and back.

A kind is one ``Kind`` in ``controller/policies/kinds.py``. Shape suffixes: N canned rows,
F features, C outlook columns, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import PolicyRefusedError, Refusal
from offramp.controller.features import BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.protocols import Policy
from offramp.controller.strict import Check

Params = dict[str, Any]
"""What JSON can say of a policy."""

Tensors = dict[str, NDArray[Any]]
"""Arrays of float32, int32 or uint8, by name."""

Weights = list[tuple[FloatArray, FloatArray]]
"""One (weight [in, out], bias [out]) pair per layer, float32."""

CLOSE_LOGIT = 1e-3
"""Canned rows this near a decision are dropped: another machine's rounding may turn them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyParts:
    """What a policy is built from.

    Attributes:
        exits: Layers to ask after, ascending.
        schema: The features it reads; None if none.
        candidates_VK: The candidate table, or None.
        params: As the kind described it, its types checked.
        tensors: As the kind described them, finite.
    """

    exits: tuple[int, ...]
    schema: FeatureSchema | None
    candidates_VK: IntArray | None
    params: Params
    tensors: Tensors

    @property
    def required_schema(self) -> FeatureSchema:
        """The schema of a kind that must have one.

        Raises:
            PolicyRefusedError: BAD_FORMAT, there is none.
        """
        if self.schema is None:
            raise PolicyRefusedError(Refusal.BAD_FORMAT, "the policy names no schema to read")
        return self.schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How one kind of policy is packed.

    Attributes:
        name: In the manifest.
        type: The class; exactly this one, no subclass.
        params: What each field of ``describe``'s parameters must be.
        describe: Parameters (JSON values) and tensors of a policy of this type. Exits, schema and
            candidate table are packed by the caller.
        build: The policy again. May raise RequestError or KeyError; both are refusals.
        clear: Of a policy, features [N, F] and outlook [N, C]: which rows it decides so clearly
            that another machine's rounding cannot turn them, [N]. None: all, as of rules that
            only compare what they read.
    """

    name: str
    type: type[Any]
    params: dict[str, Check] = field(default_factory=dict)
    describe: Callable[[Any], tuple[Params, Tensors]]
    build: Callable[[PolicyParts], Policy]
    clear: Callable[[Any, FloatArray, FloatArray], BoolArray] | None = None


def pack_layers(weights: Weights, prefix: str = "layers") -> Tensors:
    """Tensors ``prefix.i.weight`` and ``prefix.i.bias`` of an MLP."""
    tensors: Tensors = {}
    for i, (weight, bias) in enumerate(weights):
        tensors[f"{prefix}.{i}.weight"] = np.ascontiguousarray(weight, np.float32)
        tensors[f"{prefix}.{i}.bias"] = np.ascontiguousarray(bias, np.float32)
    return tensors


def unpack_layers(tensors: Tensors, prefix: str = "layers") -> Weights:
    """The weights that ``pack_layers`` was given.

    Raises:
        PolicyRefusedError: BAD_SHAPE, a tensor of that prefix is out of the row.
    """
    names = [name for name in tensors if name.startswith(f"{prefix}.")]
    pairs = [(f"{prefix}.{i}.weight", f"{prefix}.{i}.bias") for i in range((len(names) + 1) // 2)]
    # A name out of the row would be skipped in silence, and its partner's absence with it.
    if stray := set(names).difference(*pairs):
        raise PolicyRefusedError(Refusal.BAD_SHAPE, f"stray tensors {sorted(stray)}")
    return [(tensors[weight], tensors[bias]) for weight, bias in pairs]
