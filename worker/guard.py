"""A policy that fails in mid-decode must not end a request.

Shape suffixes: N rows, F features.
"""

from __future__ import annotations

import logging
import math

import numpy as np

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policy import ExitPolicy

LOG = logging.getLogger(__name__)

REMEMBERED = 64
"""Failing policies told apart; the count goes on beyond, in silence."""


class PolicyGuard:
    """Asks policies, and survives their failures; one per engine, on its thread.

    Attributes:
        failures: Calls of ``decide`` that failed, over all policies.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._logged: dict[int, ExitPolicy] = {}

    def decide(self, policy: ExitPolicy, features_NF: FloatArray) -> BoolArray | None:
        """Which of the N rows leave, as ``policy.leave`` says; None if it cannot say.

        On None the caller keeps every one of these rows in the stack to its end, and does not ask
        the policy again for this token: whatever upset it is likely to upset it deeper, too.
        A failure is any ``Exception`` of the policy, features that are not finite (a policy's
        comparison with NaN would be a decision by accident), or a result that is not a bool
        array [N]. Each is counted; the first of each policy is logged.

        Args:
            policy: Any policy.
            features_NF: What its probe computed.

        Returns:
            Bool [N], which may be a view that the policy's next call reuses; None on failure.
        """
        try:
            require_finite(features_NF)
            leave_N = policy.leave(features_NF)
            _require_decision(leave_N, len(features_NF))
        except Exception as error:  # a policy is foreign code: nothing it raises may pass
            self._report(policy, error)
            return None
        return leave_N

    def _report(self, policy: ExitPolicy, error: Exception) -> None:
        self.failures += 1
        if id(policy) in self._logged or len(self._logged) >= REMEMBERED:
            return
        # The policy is kept, so that its id stays its own.
        self._logged[id(policy)] = policy
        LOG.error(
            "%s failed (%s: %s); its rows go on at full depth. Further failures are only counted.",
            type(policy).__name__,
            type(error).__name__,
            error,
        )


def require_finite(features_NF: FloatArray) -> None:
    """Refuse NaN and infinite features.

    Raises:
        PolicyFaultError: one is not finite, or so large (1e19) that its square is not.
    """
    flat_M = features_NF.ravel()
    # One product is finite only if all are; np.isfinite(...).all() takes three times as long.
    if not math.isfinite(flat_M.dot(flat_M)):
        raise PolicyFaultError("the features are not finite")


def _require_decision(leave_N: object, rows: int) -> None:
    if not isinstance(leave_N, np.ndarray) or leave_N.dtype != np.bool_:
        raise PolicyFaultError(f"is {type(leave_N).__name__}, not a bool array")
    if leave_N.shape != (rows,):
        raise PolicyFaultError(f"has shape {leave_N.shape}, not ({rows},)")
