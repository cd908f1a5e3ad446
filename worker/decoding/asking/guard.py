"""A policy that fails in mid-decode must not end a request.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from offramp.controller.errors import PolicyFaultError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.protocols import (
    ExitPolicy,
    LearningPolicy,
    Policy,
    RoutingPolicy,
    Seen,
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

    def start(self, policy: RoutingPolicy, outlook_NC: FloatArray) -> list[int | None]:
        """At which exit each row is first asked; None where the policy cannot say, as ``decide``.

        If it fails for all together, each is asked about alone: one row's oddity is its own.
        """
        rows, most = len(outlook_NC), len(policy.exits)

        def ask(part: slice) -> list[int]:
            return _targets(policy.start(outlook_NC[part]), len(outlook_NC[part]), 0, most)

        return self._each(policy, rows, ask)

    def route(
        self,
        policy: RoutingPolicy,
        here: int,
        features_NF: FloatArray,
        outlook_NC: FloatArray,
        seen: Seen | None = None,
    ) -> list[int | None]:
        """Where each row goes from an exit; None where the policy cannot say, as ``start``.

        Args:
            policy: Policy that is asked.
            here: Index of the exit.
            features_NF: What its probe computed.
            outlook_NC: What the engine knows of the rows.
            seen: Given to a policy that reads states.
        """

        def ask(part: slice) -> list[int]:
            asked_NF = features_NF[part]
            require_finite(asked_NF)
            more = {} if seen is None else {"seen": Seen(seen.read_N[part], seen.state_ND[part])}
            found_N = policy.route(here, asked_NF, outlook_NC[part], **more)
            return _targets(found_N, len(asked_NF), here, len(policy.exits))

        return self._each(policy, len(features_NF), ask)

    def ask_one(self, policy: RoutingPolicy, ask: Callable[[], int]) -> int | None:
        """Where a row goes that is probed and routed at once; None where that fails."""
        return self._survive(policy, ask)

    def _each(
        self, policy: RoutingPolicy, rows: int, ask: Callable[[slice], list[int]]
    ) -> list[int | None]:
        if rows > 1:
            try:
                return list(ask(slice(rows)))
            except Exception as error:  # as in _survive; who fails alone is counted there
                LOG.debug("%s failed for %d rows together: %s", type(policy).__name__, rows, error)
        found = [self._survive(policy, partial(ask, slice(n, n + 1))) for n in range(rows)]
        return [None if target is None else target[0] for target in found]

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


def _targets(found_N: object, rows: int, least: int, most: int) -> list[int]:
    if (
        not isinstance(found_N, np.ndarray)
        or found_N.shape != (rows,)
        or found_N.dtype.kind not in "iu"
    ):
        raise PolicyFaultError(f"is {found_N!r}, not one integer per row")
    targets: list[int] = found_N.tolist()
    for target in targets:
        if not least <= target <= most:
            raise PolicyFaultError(f"names exit {target}, not one from {least} to {most}")
    return targets
