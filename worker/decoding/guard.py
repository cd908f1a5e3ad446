"""A policy that fails in mid-decode must not end a request.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.protocols import (
    ExitPolicy,
    LearningPolicy,
    Policy,
    RoutingPolicy,
    Verdict,
)

T = TypeVar("T")

LOG = logging.getLogger(__name__)

MOST_LOGGED = 64
"""Failing policies told apart; the count goes on beyond, in silence."""


class PolicyGuard:
    """Asks policies, and survives their failures; one per engine, on its thread.

    Attributes:
        failures: Calls of ``decide`` that failed, over all policies.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._logged: dict[int, object] = {}

    def decide(self, policy: ExitPolicy, features_NF: FloatArray) -> BoolArray | None:
        """Which of the N rows leave, as ``policy.leave`` says; None if it cannot say.

        On None the caller keeps every one of these rows in the stack to its end, and does not ask
        the policy again for this token: whatever upset it is likely to upset it deeper, too.
        A failure is any ``Exception`` of the policy, features that are not finite (a policy's
        comparison with NaN would be a decision by accident), or a result that is not a bool
        array [N]. Each is counted; the first of each policy is logged.

        Args:
            policy: Policy that is asked.
            features_NF: What its probe computed.

        Returns:
            Bool [N], which may be a view that the policy's next call reuses; None on failure.
        """

        def ask() -> BoolArray:
            require_finite(features_NF)
            leave_N = policy.leave(features_NF)
            _require_decision(leave_N, len(features_NF))
            return leave_N

        return self._survive(policy, ask)

    def start(self, policy: RoutingPolicy, outlook_1C: FloatArray) -> int | None:
        """At which exit one row is first asked; None if the policy cannot say, as ``decide``."""
        most = len(policy.exits)
        return self._survive(policy, lambda: _target(policy.start(outlook_1C), 0, most))

    def route(
        self, policy: RoutingPolicy, here: int, features_1F: FloatArray, outlook_1C: FloatArray
    ) -> int | None:
        """Where one row goes from an exit; None if the policy cannot say, as ``decide``."""

        def ask() -> int:
            require_finite(features_1F)
            return _target(policy.route(here, features_1F, outlook_1C), here, len(policy.exits))

        return self._survive(policy, ask)

    def teach(self, policy: LearningPolicy, verdicts: Sequence[Verdict]) -> None:
        """Tell a policy what full depth says of its tokens; a failure is counted and logged."""
        self._survive(policy, lambda: policy.learn(verdicts))

    def _survive(self, policy: Policy | LearningPolicy, ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except Exception as error:  # a policy is foreign code: nothing it raises may pass
            self.report(policy, error)
            return None

    def report(self, policy: object, error: Exception) -> None:
        """Count a failure; log the first of each policy."""
        self.failures += 1
        if id(policy) in self._logged or len(self._logged) >= MOST_LOGGED:
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


def _target(found_N: object, least: int, most: int) -> int:
    if (
        not isinstance(found_N, np.ndarray)
        or found_N.shape != (1,)
        or found_N.dtype.kind not in "iu"
    ):
        raise PolicyFaultError(f"is {found_N!r}, not one integer per row")
    target = int(found_N[0])
    if not least <= target <= most:
        raise PolicyFaultError(f"names exit {target}, not one from {least} to {most}")
    return target
