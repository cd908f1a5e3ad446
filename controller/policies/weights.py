"""A policy rebuilt from bytes that nobody vouches for yet: every check before it may decide.

Shape suffixes: V vocabulary, K candidates per token.
"""

from __future__ import annotations

import time

import numpy as np

from offramp.controller.errors import PolicyRefusedError, Refusal, RequestError
from offramp.controller.features import FeatureSchema, IntArray, schema_of
from offramp.controller.policies.candidate_table import CondensedTable
from offramp.controller.policies.codec import PolicyParts, Tensors, check_canned
from offramp.controller.policies.kinds import (
    KINDS,
    MAX_BLOB_BYTES,
    TABLE_TENSORS,
    descriptor,
    digest_of,
    parse_blob,
    shapes_of,
)
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.manifest import Manifest

TRIES = 5
"""Times that canned inputs are decided against the clock: a busy machine disturbs some of them."""


def unpack_policy(manifest: Manifest, blob: bytes) -> Policy:
    """Rebuild the policy of a verified manifest from bytes that nobody vouches for yet.

    Raises:
        PolicyRefusedError: TOO_LARGE, DIGEST_MISMATCH, NOT_SAFETENSORS, BAD_SHAPE, NOT_FINITE,
            WRONG_SCHEMA, BAD_FORMAT or CANNED_INPUTS, checked in this order.
    """
    _check_bytes(manifest, blob)
    tensors = parse_blob(blob)
    _check_shapes(manifest, tensors)
    _check_finite(tensors)
    schema = _schema(manifest.schema, tensors)
    candidates_VK = _candidates(tensors)
    try:
        policy = _build(manifest, schema, candidates_VK, tensors)
    except (KeyError, RequestError) as error:
        raise PolicyRefusedError(
            Refusal.BAD_SHAPE, f"no {manifest.kind} policy: {error}"
        ) from error
    if (None if policy.schema is None else policy.schema.digest) != manifest.schema:
        detail = "the policy reads other features than its manifest says"
        raise PolicyRefusedError(Refusal.WRONG_SCHEMA, detail)
    check_canned(policy, tensors)
    return policy


def require_quick(policy: Policy, blob: bytes, most_s: float) -> None:
    """Decide the canned inputs again and again, against the clock.

    Args:
        policy: The policy of the blob, as unpacked.
        blob: Holds the canned inputs.
        most_s: Seconds that all of them together may take, in the best of several tries.

    Raises:
        PolicyRefusedError: TOO_SLOW.
    """
    tensors, taken_s = parse_blob(blob), []
    for _ in range(TRIES):
        started = time.perf_counter()
        check_canned(policy, tensors)
        taken_s.append(time.perf_counter() - started)
    if min(taken_s) > most_s:
        detail = f"its canned inputs took {1e3 * min(taken_s):.1f} ms, over {1e3 * most_s:g} ms"
        raise PolicyRefusedError(Refusal.TOO_SLOW, detail)


def _check_bytes(manifest: Manifest, blob: bytes) -> None:
    if len(blob) > MAX_BLOB_BYTES:
        detail = f"the blob has {len(blob)} bytes, over {MAX_BLOB_BYTES}"
        raise PolicyRefusedError(Refusal.TOO_LARGE, detail)
    found = digest_of(blob)
    if len(blob) != manifest.size or found != manifest.digest:
        detail = f"{len(blob)} bytes of digest {found}, not {manifest.size} of {manifest.digest}"
        raise PolicyRefusedError(Refusal.DIGEST_MISMATCH, detail)


def _check_shapes(manifest: Manifest, tensors: Tensors) -> None:
    found = shapes_of(tensors)
    for name in sorted(manifest.shapes.keys() | found.keys()):
        if manifest.shapes.get(name) != found.get(name):
            detail = f"{name} is {found.get(name)}, signed as {manifest.shapes.get(name)}"
            raise PolicyRefusedError(Refusal.BAD_SHAPE, detail)


def _check_finite(tensors: Tensors) -> None:
    for name, each in tensors.items():
        if not np.isfinite(each).all():
            raise PolicyRefusedError(Refusal.NOT_FINITE, f"{name} holds NaN or infinite values")


def _schema(digest: str | None, tensors: Tensors) -> FeatureSchema | None:
    if digest is None:
        return None
    canned = tensors.get("canned.features")
    schema = schema_of(digest, 0 if canned is None or canned.ndim != 2 else canned.shape[1])
    if schema is None:
        raise PolicyRefusedError(Refusal.WRONG_SCHEMA, f"schema {digest} is unknown here")
    return schema


def _candidates(tensors: Tensors) -> IntArray | None:
    """The candidate table, condensed or, as releases carried it before, whole."""
    parts = [tensors[name] for name in TABLE_TENSORS if name in tensors]
    table_VK = tensors.get("candidates")
    if parts:
        if table_VK is not None or len(parts) < len(TABLE_TENSORS):
            raise PolicyRefusedError(
                Refusal.BAD_SHAPE, "the candidate table is neither whole nor condensed"
            )
        condensed = CondensedTable(*parts)
        if fault := condensed.fault():
            raise PolicyRefusedError(Refusal.BAD_SHAPE, f"the candidate table {fault}")
        return condensed.spread()
    if table_VK is None:
        return None
    if table_VK.dtype != np.int32 or table_VK.ndim != 2 or not table_VK.size:
        raise PolicyRefusedError(Refusal.BAD_SHAPE, f"candidates has shape {table_VK.shape}")
    if table_VK.min() < 0 or table_VK.max() >= len(table_VK):
        detail = f"candidates names tokens outside [0, {len(table_VK)})"
        raise PolicyRefusedError(Refusal.BAD_SHAPE, detail)
    return table_VK


def _build(
    manifest: Manifest,
    schema: FeatureSchema | None,
    candidates_VK: IntArray | None,
    tensors: Tensors,
) -> Policy:
    signed = descriptor(manifest.kind, manifest.exits, manifest.params, manifest.schema)
    if tensors["policy"].tobytes() != signed.tobytes():
        raise PolicyRefusedError(Refusal.BAD_FORMAT, "the blob was packed for another manifest")
    parts = PolicyParts(
        exits=manifest.exits,
        schema=schema,
        candidates_VK=candidates_VK,
        params=manifest.params,
        tensors=tensors,
    )
    return KINDS[manifest.kind].build_policy(parts)
