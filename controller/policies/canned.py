"""Canned inputs: recorded decisions that travel with a policy, for workers to reproduce.

Tensors: ``canned.features`` (float32, [N, F]); of a policy that is asked who leaves,
``canned.leave`` (uint8, [N]); of one that routes, ``canned.outlook`` (float32, [N, C]) and
``canned.route`` (int32, [E + 1, N]: first where rows start, then where each exit sends them).

Shape suffixes: N canned rows, F features, C outlook columns, E exits.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.errors import PolicyFaultError, PolicyRefusedError, Refusal, RequestError
from offramp.controller.features import OUTLOOK_V1, FloatArray, IntArray
from offramp.controller.policies.codec import Kind, Tensors
from offramp.controller.policies.protocols import Policy, RoutingPolicy


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
    start_N = policy.start(outlook_NC).copy()
    exits = range(len(policy.exits))
    routes = [policy.route(here, features_NF, outlook_NC).copy() for here in exits]
    return np.stack([start_N, *routes]).astype(np.int32)
