"""What one kind of policy is packed as, there and back: parameters, tensors, canned inputs.

A kind is one ``Kind`` beside its policy, named in ``controller/policies/kinds.py``; most only name
the attributes that make the policy. Canned inputs are recorded decisions that travel with it, for
workers to reproduce: ``canned.features`` (float32, [N, F]); of a policy that is asked who leaves,
``canned.leave`` (uint8, [N]); of one that routes, ``canned.outlook`` (float32, [N, C]) and
``canned.route`` (int32, [E + 1, N]: first where rows start, then where each exit sends them).

Shape suffixes: N canned rows, F features, C outlook columns, E exits, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import PolicyFaultError, PolicyRefusedError, Refusal, RequestError
from offramp.controller.features import OUTLOOK_V1, BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.protocols import Policy, RoutingPolicy, StatefulPolicy
from offramp.controller.strict import COUNT, TEXT, Check

Params = dict[str, Any]
"""What JSON can say of a policy."""

Tensors = dict[str, NDArray[Any]]
"""Arrays of float32, int32 or uint8, by name."""

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Safetensors dtype and shape of each tensor, by name."""

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

    @property
    def only_exit(self) -> int:
        """The exit of a kind that has just one.

        Raises:
            RequestError: there are none or several.
        """
        if len(self.exits) != 1:
            raise RequestError("exits", f"{self.exits} is not one layer")
        return self.exits[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How one kind of policy is packed.

    Without ``describe`` its parameters and tensors are attributes of the policy, and without
    ``build`` the policy is made from them by keyword, beside exits, schema and candidate table.

    Attributes:
        name: What the manifest calls it.
        type: The class; exactly this one, no subclass.
        params: What each parameter (a JSON value) must be.
        tensors: Names of the float32 tensors, where ``describe`` is left out.
        attributes: Parameters and tensors whose attribute has another name: that name.
        needs_schema: Whether the policy cannot do without a feature schema.
        describe: Gives the parameters and tensors of a policy.
        build: Makes the policy again. May raise RequestError or KeyError; both are refusals.
        clear: Marks the rows, of a policy's features [N, F] and outlook [N, C], that it decides so
            clearly that another machine's rounding cannot turn them, [N]. None marks all, right
            for rules that only compare what they read.
    """

    name: str
    type: type[Any]
    params: dict[str, Check] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    attributes: dict[str, str] = field(default_factory=dict)
    needs_schema: bool = True
    describe: Callable[[Any], tuple[Params, Tensors]] | None = None
    build: Callable[[PolicyParts], Policy] | None = None
    clear: Callable[[Any, FloatArray, FloatArray], BoolArray] | None = None

    def describe_policy(self, policy: Any) -> tuple[Params, Tensors]:
        """Give the parameters and tensors that make the policy again."""
        if self.describe is not None:
            return self.describe(policy)
        params = {
            name: _plain(getattr(policy, self._attribute(name)), check)
            for name, check in self.params.items()
        }
        return params, {
            name: np.ascontiguousarray(getattr(policy, self._attribute(name)), np.float32)
            for name in self.tensors
        }

    def build_policy(self, parts: PolicyParts) -> Policy:
        """Make the policy again.

        Raises:
            PolicyRefusedError: BAD_FORMAT, the schema it needs is missing.
            RequestError, KeyError: its parameters or tensors make no such policy.
        """
        if self.build is not None:
            return self.build(parts)
        values = parts.params | {name: parts.tensors[name] for name in self.tensors}
        policy: Policy = self.type(
            exits=parts.exits,
            schema=parts.required_schema if self.needs_schema else parts.schema,
            candidates_VK=parts.candidates_VK,
            **{
                self._attribute(name): tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            },
        )
        return policy

    def _attribute(self, name: str) -> str:
        return self.attributes.get(name, name)


def _plain(value: Any, check: Check) -> Any:
    """The JSON value of an attribute: text, whole numbers, or floats whatever numbers were given.

    >>> from offramp.controller.strict import NUMBER
    >>> _plain((1, np.float32(0.5)), NUMBER), _plain(np.int64(3), COUNT)
    ([1.0, 0.5], 3)
    """
    is_number = check is not COUNT and check is not TEXT
    return np.asarray(value, np.float64 if is_number else None).tolist()


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


def canned_tensors(policy: Policy, kind: Kind, features_NF: FloatArray) -> Tensors:
    """Inputs with the policy's decisions; rows too close to call are left out.

    The outlook that a routing policy is shown is drawn from [0, 1] with a fixed seed.

    Raises:
        RequestError: the policy cannot read the features, or no row is clear.
    """
    features_NF = np.ascontiguousarray(features_NF, np.float32)
    width = features_NF.shape[-1] if policy.schema is None else policy.schema.width
    if features_NF.shape[1:] != (width,):
        raise RequestError("canned_features_NF", f"has shape {features_NF.shape}, not [N, {width}]")
    rng = np.random.default_rng(0)
    outlook_NC = rng.random((len(features_NF), OUTLOOK_V1.width), np.float32)
    if kind.clear is not None:
        clear_N = kind.clear(policy, features_NF, outlook_NC)
        features_NF, outlook_NC = features_NF[clear_N], outlook_NC[clear_N]
    if not len(features_NF):
        raise RequestError("canned_features_NF", "leaves no clear decision", "Give more rows")
    if isinstance(policy, RoutingPolicy):
        return {
            "canned.features": features_NF,
            "canned.outlook": outlook_NC,
            "canned.route": _routes(policy, features_NF, outlook_NC),
        }
    leave_N = policy.leave(features_NF).astype(np.uint8)
    return {"canned.features": features_NF, "canned.leave": leave_N}


def check_canned(policy: Policy, tensors: Tensors) -> None:
    """Decide the canned inputs anew.

    Raises:
        PolicyRefusedError: BAD_SHAPE, NOT_FINITE, or CANNED_INPUTS if a decision differs.
    """
    try:
        differs = _differences(policy, tensors)
    except (KeyError, ValueError, IndexError) as error:
        raise PolicyRefusedError(Refusal.BAD_SHAPE, f"canned inputs: {error}") from error
    except PolicyFaultError as error:
        raise PolicyRefusedError(Refusal.NOT_FINITE, f"canned inputs: {error}") from error
    if differs.any():
        detail = f"{differs.sum()} of {differs.size} decisions differ from those recorded"
        raise PolicyRefusedError(Refusal.CANNED_INPUTS, detail)


def _differences(policy: Policy, tensors: Tensors) -> np.ndarray:
    features_NF = tensors["canned.features"]
    if isinstance(policy, RoutingPolicy):
        found = _routes(policy, features_NF, tensors["canned.outlook"])
        recorded = tensors["canned.route"]
        if found.shape != recorded.shape:
            raise ValueError(f"routes of shape {recorded.shape}, not {found.shape}")
        return np.not_equal(found, recorded)
    return np.not_equal(policy.leave(features_NF), tensors["canned.leave"].astype(np.bool_))


def _routes(policy: RoutingPolicy, features_NF: FloatArray, outlook_NC: FloatArray) -> IntArray:
    if isinstance(policy, StatefulPolicy):
        policy.rewind()  # so that the same inputs are decided alike, however often
    start_N = policy.start(outlook_NC).copy()
    exits = range(len(policy.exits))
    routes = [policy.route(here, features_NF, outlook_NC).copy() for here in exits]
    if isinstance(policy, StatefulPolicy):
        policy.rewind()  # canned inputs are no traffic
    return np.stack([start_N, *routes]).astype(np.int32)
