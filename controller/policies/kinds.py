"""Every kind of policy that a release can carry, and the bytes (safetensors) it travels as.

A worker that does not know a release's kind refuses it by name. Bytes are packed here, and checked
from every side before use in ``controller/policies/weights.py``. Tensors: ``policy`` (uint8,
canonical JSON of kind, exits, params and schema, so the digest pins the whole policy and not only
its matrices), ``candidates.*`` (``controller/policies/candidate_table.py``), those of the kind, and
the canned inputs (``controller/policies/codec.py``).

Shape suffixes: N canned rows, F features, V vocabulary, K candidates per token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal, RequestError
from offramp.controller.features import FloatArray
from offramp.controller.policies.candidate_table import condense
from offramp.controller.policies.codec import Kind, Params, Shapes, Tensors, canned_tensors
from offramp.controller.policies.drafts.confident import CONFIDENT
from offramp.controller.policies.drafts.del_rule import DEL
from offramp.controller.policies.drafts.draft_router import DRAFT_ROUTER
from offramp.controller.policies.drafts.static_draft import STATIC
from offramp.controller.policies.drafts.thompson import THOMPSON
from offramp.controller.policies.drafts.trusted_draft import TRUSTED
from offramp.controller.policies.exits import exit_to_json
from offramp.controller.policies.mlp import MLP
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.controller.policies.router import ROUTER
from offramp.controller.policies.rules.bandit import THRESHOLD_BANDIT
from offramp.controller.policies.rules.beta import BETA_THRESHOLD
from offramp.controller.policies.rules.decay import DECAYING_THRESHOLD
from offramp.controller.policies.rules.entropy_patience import ENTROPY, PATIENCE
from offramp.controller.policies.rules.kept_stages import KEPT_STAGES
from offramp.controller.policies.rules.optimal_stopping import STOPPING
from offramp.controller.policies.rules.position import POSITION_SCHEDULE
from offramp.controller.policies.rules.prompt_rules import RANDOM_SHARE, WINDOWED
from offramp.controller.policies.rules.stages import STAGE_THRESHOLDS
from offramp.controller.strict import NUMBER, TEXT, canonical_json

MAX_BLOB_BYTES = 8 * 1024 * 1024
"""Larger blobs are neither packed nor fetched."""

TABLE_TENSORS = ("candidates.common", "candidates.lengths", "candidates.own")
"""Where a blob holds the parts of a ``CondensedTable``."""

_DTYPES: dict[str, type[np.generic]] = {"F32": np.float32, "I32": np.int32, "U8": np.uint8}


_SHIPPED = (
    Kind(name="never", type=NeverExit, needs_schema=False),
    Kind(
        name="fixed",
        type=FixedExit,
        build=lambda parts: FixedExit(parts.only_exit, parts.schema, parts.candidates_VK),
    ),
    Kind(name="threshold", type=ThresholdPolicy, params={"column": TEXT, "threshold": NUMBER}),
    MLP,
    ROUTER,
    DECAYING_THRESHOLD,
    ENTROPY,
    PATIENCE,
    POSITION_SCHEDULE,
    STAGE_THRESHOLDS,
    KEPT_STAGES,
    WINDOWED,
    RANDOM_SHARE,
    BETA_THRESHOLD,
    THRESHOLD_BANDIT,
    STOPPING,
    STATIC,
    CONFIDENT,
    THOMPSON,
    DEL,
    DRAFT_ROUTER,
    TRUSTED,
)

KINDS: MappingProxyType[str, Kind] = MappingProxyType({kind.name: kind for kind in _SHIPPED})
"""Kinds by name."""


def kind_of(policy: Any) -> Kind:
    """The kind that packs a policy.

    Raises:
        RequestError: no kind packs its type.
    """
    for kind in KINDS.values():
        if kind.type is type(policy):
            return kind
    raise RequestError(
        "policy", f"{type(policy).__name__} cannot be packed", "Add its kind to KINDS"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPolicy:
    """A policy as plain values and bytes.

    Attributes:
        kind: One of ``KINDS``.
        exits: Layers to ask after, ascending.
        params: What the kind needs besides tensors.
        schema_digest: Names the feature schema that it reads; None if it reads none.
        blob: The tensors, as safetensors.
    """

    kind: str
    exits: tuple[int, ...]
    params: Params
    schema_digest: str | None
    blob: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the blob, hex."""
        return digest_of(self.blob)

    @property
    def shapes(self) -> Shapes:
        """Dtype and shape of each tensor in the blob."""
        return shapes_of(parse_blob(self.blob))


def digest_of(blob: bytes) -> str:
    """SHA-256 of a blob, hex."""
    return hashlib.sha256(blob).hexdigest()


def pack_policy(policy: Policy, canned_features_NF: FloatArray) -> PackedPolicy:
    """Turn a policy into bytes; the same policy and canned inputs give the same bytes.

    Args:
        policy: Has a type that ``KINDS`` knows.
        canned_features_NF: Inputs whose decisions are recorded, for workers to reproduce. Rows
            that the policy decides too narrowly are left out.

    Raises:
        RequestError: another type of policy, parameters that its kind does not allow, weights
            that are not finite, or canned inputs that it cannot read or that are all too close.
        ConfigError: the blob would exceed MAX_BLOB_BYTES.
    """
    kind = kind_of(policy)
    params, tensors = kind.describe_policy(policy)
    assert params.keys() == kind.params.keys()  # what a kind describes, it also checks
    for name, (holds, expected) in kind.params.items():
        if not holds(params[name]):
            raise RequestError(name, f"{params[name]!r} is not {expected}", "Train it again")
    schema_digest = None if policy.schema is None else policy.schema.digest
    tensors = tensors | canned_tensors(policy, kind, canned_features_NF)
    tensors["policy"] = descriptor(kind.name, policy.exits, params, schema_digest)
    if policy.candidates_VK is not None:
        tensors |= dict(zip(TABLE_TENSORS, condense(policy.candidates_VK), strict=True))
    return PackedPolicy(
        kind=kind.name,
        exits=tuple(policy.exits),
        params=params,
        schema_digest=schema_digest,
        blob=_blob(tensors),
    )


def _blob(tensors: Tensors) -> bytes:
    for name, each in tensors.items():
        if not np.isfinite(each).all():
            raise RequestError(name, "holds NaN or infinite values", "Train the policy again")
    blob: bytes = save(dict(sorted(tensors.items())))
    if len(blob) > MAX_BLOB_BYTES:
        raise ConfigError(
            "policy",
            f"packs to {len(blob):,} bytes, over {MAX_BLOB_BYTES:,}",
            "Record with fewer --candidates, or train smaller nets",
        )
    return blob


def descriptor(
    kind: str, exits: tuple[int, ...], params: Params, schema_digest: str | None
) -> NDArray[np.uint8]:
    """What the blob itself says of the policy: canonical JSON, as bytes."""
    values = {
        "kind": kind,
        "exits": list(map(exit_to_json, exits)),
        "params": params,
        "schema": schema_digest,
    }
    return np.frombuffer(canonical_json(values), np.uint8)


def parse_blob(blob: bytes) -> Tensors:
    """Read the tensors of a blob.

    Raises:
        PolicyRefusedError: NOT_SAFETENSORS, or BAD_SHAPE of a dtype that none has here.
    """
    try:
        entries = deserialize(blob)  # type: ignore[no-untyped-call]  # ships no types
    except SafetensorError as error:
        raise PolicyRefusedError(Refusal.NOT_SAFETENSORS, str(error)) from error
    tensors: Tensors = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            detail = f"{name} has dtype {entry['dtype']}, none of {', '.join(_DTYPES)}"
            raise PolicyRefusedError(Refusal.BAD_SHAPE, detail)
        tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    return tensors


def shapes_of(tensors: Tensors) -> Shapes:
    """Dtype and shape of each tensor."""
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    return {name: (names[each.dtype], each.shape) for name, each in tensors.items()}
