"""A policy's weights as safetensors bytes: packed once, checked from every side before use.

Tensors: ``policy`` (uint8, canonical JSON of kind, exits, threshold, column and schema, so the
digest pins the whole policy and not only its matrices), ``layers.i.weight`` and ``layers.i.bias``
(float32), ``candidates`` (int32), ``canned.features`` (float32) and ``canned.leave`` (uint8).

Shape suffixes: N canned rows, F features, V vocabulary, K candidates per token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from offramp.controller.errors import (
    ConfigError,
    PolicyFaultError,
    PolicyRefusedError,
    Refusal,
    RequestError,
)
from offramp.controller.features import SCHEMAS, FeatureSchema, FloatArray
from offramp.controller.manifest import Manifest, Shapes
from offramp.controller.mlp import MlpPolicy
from offramp.controller.policy import ExitPolicy, FixedExit, NeverExit, ThresholdPolicy
from offramp.controller.strict_json import canonical_json

MAX_BLOB_BYTES = 8 * 1024 * 1024
"""Larger blobs are neither packed nor fetched."""

CLOSE_LOGIT = 1e-3
"""Canned rows this near the threshold are dropped: another machine's rounding may turn them."""

_DTYPES: dict[str, type[np.generic]] = {"F32": np.float32, "I32": np.int32, "U8": np.uint8}

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPolicy:
    """A policy as plain values and bytes.

    Attributes:
        kind: One of manifest.KINDS.
        exits: Layers to ask after, ascending.
        threshold: What the column or the logit is compared with; None if nothing is.
        column: The feature a threshold policy compares; None for other kinds.
        schema_digest: Of the feature schema read; None if none is.
        blob: The tensors, as safetensors.
    """

    kind: str
    exits: tuple[int, ...]
    threshold: float | None
    column: str | None
    schema_digest: str | None
    blob: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the blob, hex."""
        return digest_of(self.blob)

    @property
    def shapes(self) -> Shapes:
        """Dtype and shape of each tensor in the blob."""
        return _shapes(_parse(self.blob))


def digest_of(blob: bytes) -> str:
    """SHA-256 of a blob, hex."""
    return hashlib.sha256(blob).hexdigest()


def pack_policy(policy: ExitPolicy, canned_features_NF: FloatArray) -> PackedPolicy:
    """Turn a policy into bytes; the same policy and canned inputs give the same bytes.

    Args:
        policy: A NeverExit, FixedExit, ThresholdPolicy or MlpPolicy.
        canned_features_NF: Inputs whose decisions are recorded, for workers to reproduce. Rows
            that an MLP decides by less than CLOSE_LOGIT are left out.

    Raises:
        RequestError: another type of policy, weights that are not finite, or canned inputs that
            it cannot read or that are all too close to call.
        ConfigError: the blob would exceed MAX_BLOB_BYTES.
    """
    kind, threshold, column = _describe(policy)
    schema_digest = None if policy.schema is None else policy.schema.digest
    features_NF = _canned(policy, canned_features_NF)
    tensors: Tensors = {
        "policy": _descriptor(kind, policy.exits, threshold, column, schema_digest),
        "canned.features": features_NF,
        "canned.leave": policy.leave(features_NF).astype(np.uint8),
    }
    if policy.candidates_VK is not None:
        tensors["candidates"] = np.ascontiguousarray(policy.candidates_VK, np.int32)
    if isinstance(policy, MlpPolicy):
        for i, (weight, bias) in enumerate(policy.weights):
            tensors[f"layers.{i}.weight"] = np.ascontiguousarray(weight, np.float32)
            tensors[f"layers.{i}.bias"] = np.ascontiguousarray(bias, np.float32)
    return PackedPolicy(
        kind=kind,
        exits=tuple(policy.exits),
        threshold=threshold,
        column=column,
        schema_digest=schema_digest,
        blob=_blob(tensors),
    )


def _blob(tensors: Tensors) -> bytes:
    for name, each in tensors.items():
        if not np.isfinite(each).all():
            raise RequestError(name, "holds NaN or infinite values", "Train the policy again")
    blob: bytes = save(dict(sorted(tensors.items())))
    if len(blob) > MAX_BLOB_BYTES:
        raise ConfigError("policy", f"packs to {len(blob)} bytes, over {MAX_BLOB_BYTES}")
    return blob


def _describe(policy: ExitPolicy) -> tuple[str, float | None, str | None]:
    """Kind, threshold and column."""
    if isinstance(policy, MlpPolicy):
        return "mlp", float(policy.threshold), None
    if isinstance(policy, ThresholdPolicy):
        return "threshold", float(policy.threshold), policy.column
    if isinstance(policy, FixedExit):
        return "fixed", None, None
    if isinstance(policy, NeverExit):
        return "never", None, None
    raise RequestError("policy", f"{type(policy).__name__} cannot be packed", "Use a shipped kind")


def _descriptor(
    kind: str,
    exits: tuple[int, ...],
    threshold: float | None,
    column: str | None,
    schema_digest: str | None,
) -> NDArray[np.uint8]:
    values = {
        "kind": kind,
        "exits": [int(layer) for layer in exits],
        "threshold": threshold,
        "column": column,
        "schema": schema_digest,
    }
    return np.frombuffer(canonical_json(values), np.uint8)


def _canned(policy: ExitPolicy, features_NF: FloatArray) -> FloatArray:
    features_NF = np.ascontiguousarray(features_NF, np.float32)
    width = features_NF.shape[-1] if policy.schema is None else policy.schema.width
    if features_NF.shape[1:] != (width,):
        raise RequestError("canned_features_NF", f"has shape {features_NF.shape}, not [N, {width}]")
    if isinstance(policy, MlpPolicy):
        distances = [abs(policy.logits(row[None])[0] - policy.threshold) for row in features_NF]
        features_NF = features_NF[np.asarray(distances) > CLOSE_LOGIT]
    if not len(features_NF):
        raise RequestError("canned_features_NF", "leaves no clear decision", "Give more rows")
    return features_NF


def unpack_policy(manifest: Manifest, blob: bytes) -> ExitPolicy:
    """Rebuild the policy of a verified manifest from bytes that nobody vouches for yet.

    Raises:
        PolicyRefusedError: TOO_LARGE, DIGEST_MISMATCH, NOT_SAFETENSORS, BAD_SHAPE, NOT_FINITE,
            WRONG_SCHEMA, BAD_FORMAT or CANNED_INPUTS, checked in this order.
    """
    _check_bytes(manifest, blob)
    tensors = _parse(blob)
    _check_shapes(manifest, tensors)
    _check_finite(tensors)
    schema = _schema(manifest.schema)
    _check_candidates(tensors)
    try:
        policy = _build(manifest, schema, tensors)
    except (KeyError, RequestError) as error:
        raise PolicyRefusedError(
            Refusal.BAD_SHAPE, f"no {manifest.kind} policy: {error}"
        ) from error
    _check_canned(policy, tensors)
    return policy


def _check_bytes(manifest: Manifest, blob: bytes) -> None:
    if len(blob) > MAX_BLOB_BYTES:
        detail = f"the blob has {len(blob)} bytes, over {MAX_BLOB_BYTES}"
        raise PolicyRefusedError(Refusal.TOO_LARGE, detail)
    found = digest_of(blob)
    if len(blob) != manifest.size or found != manifest.digest:
        detail = f"{len(blob)} bytes of digest {found}, not {manifest.size} of {manifest.digest}"
        raise PolicyRefusedError(Refusal.DIGEST_MISMATCH, detail)


def _parse(blob: bytes) -> Tensors:
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


def _shapes(tensors: Tensors) -> Shapes:
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    return {name: (names[each.dtype], each.shape) for name, each in tensors.items()}


def _check_shapes(manifest: Manifest, tensors: Tensors) -> None:
    found = _shapes(tensors)
    for name in sorted(manifest.shapes.keys() | found.keys()):
        if manifest.shapes.get(name) != found.get(name):
            detail = f"{name} is {found.get(name)}, signed as {manifest.shapes.get(name)}"
            raise PolicyRefusedError(Refusal.BAD_SHAPE, detail)


def _check_finite(tensors: Tensors) -> None:
    for name, each in tensors.items():
        if not np.isfinite(each).all():
            raise PolicyRefusedError(Refusal.NOT_FINITE, f"{name} holds NaN or infinite values")


def _schema(digest: str | None) -> FeatureSchema | None:
    if digest is None:
        return None
    if digest not in SCHEMAS:
        raise PolicyRefusedError(Refusal.WRONG_SCHEMA, f"schema {digest} is unknown here")
    return SCHEMAS[digest]


def _check_candidates(tensors: Tensors) -> None:
    table_VK = tensors.get("candidates")
    if table_VK is None:
        return
    if table_VK.dtype != np.int32 or table_VK.ndim != 2 or not table_VK.size:
        raise PolicyRefusedError(Refusal.BAD_SHAPE, f"candidates has shape {table_VK.shape}")
    if table_VK.min() < 0 or table_VK.max() >= len(table_VK):
        detail = f"candidates names tokens outside [0, {len(table_VK)})"
        raise PolicyRefusedError(Refusal.BAD_SHAPE, detail)


def _build(manifest: Manifest, schema: FeatureSchema | None, tensors: Tensors) -> ExitPolicy:
    signed = _descriptor(
        manifest.kind, manifest.exits, manifest.threshold, manifest.column, manifest.schema
    )
    if tensors["policy"].tobytes() != signed.tobytes():
        raise PolicyRefusedError(Refusal.BAD_FORMAT, "the blob was packed for another manifest")
    table_VK = tensors.get("candidates")
    if manifest.kind == "never":
        return NeverExit(manifest.exits, schema, table_VK)
    if manifest.kind == "fixed" and len(manifest.exits) == 1:
        return FixedExit(*manifest.exits, schema=schema, candidates_VK=table_VK)
    if schema is None or manifest.threshold is None:
        detail = f"kind {manifest.kind!r} with {len(manifest.exits)} exits lacks values it needs"
        raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)
    if manifest.kind == "threshold":
        column = manifest.column or ""
        return ThresholdPolicy(manifest.exits, schema, column, manifest.threshold, table_VK)
    return MlpPolicy(manifest.exits, schema, _layers(tensors), manifest.threshold, table_VK)


def _layers(tensors: Tensors) -> list[tuple[FloatArray, FloatArray]]:
    names = [name for name in tensors if name.startswith("layers.")]
    pairs = [(f"layers.{i}.weight", f"layers.{i}.bias") for i in range((len(names) + 1) // 2)]
    # A name out of the row would be skipped in silence, and its partner's absence with it.
    if stray := set(names).difference(*pairs):
        raise PolicyRefusedError(Refusal.BAD_SHAPE, f"stray tensors {sorted(stray)}")
    return [(tensors[weight], tensors[bias]) for weight, bias in pairs]


def _check_canned(policy: ExitPolicy, tensors: Tensors) -> None:
    try:
        found_N = policy.leave(tensors["canned.features"])
        differs_N = np.not_equal(found_N, tensors["canned.leave"].astype(np.bool_))
    except (KeyError, ValueError, IndexError) as error:
        raise PolicyRefusedError(Refusal.BAD_SHAPE, f"canned inputs: {error}") from error
    except PolicyFaultError as error:
        raise PolicyRefusedError(Refusal.NOT_FINITE, f"canned inputs: {error}") from error
    if differs_N.any():
        detail = f"{differs_N.sum()} of {len(found_N)} decisions differ from those recorded"
        raise PolicyRefusedError(Refusal.CANNED_INPUTS, detail)
