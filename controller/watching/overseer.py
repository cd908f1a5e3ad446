"""Watches a channel from the publisher's side: its timestamp, its trips, its canary's steps."""

from __future__ import annotations

from collections.abc import Sequence

from offramp.controller.errors import ConfigError, PolicyRefusedError
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import Ack, AckState, Head, PolicyRegistry
from offramp.controller.watching.analysis import StepOutcome, judge, judge_shadow
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import add_up

UNSIGNED = "a release takes more than one signature here, so nothing is done unattended"
"""What is said where the publisher cannot sign alone."""


class Overseer:
    """Looks at a channel again and again.

    Acknowledgements are not signed: whoever may write them can make it roll back, which only ever
    returns to a policy that was served before, or take the next step of a canary that its
    publisher began.

    Args:
        publisher: The channel's writer.
        registry: Where workers acknowledge.
        trips: Workers that must have tripped before the release is rolled back; all of them, if
            fewer live.
        steps: How a canary goes on by itself; None: by hand alone.
    """

    def __init__(
        self, publisher: Publisher, registry: PolicyRegistry, trips: int, steps: Steps | None = None
    ) -> None:
        self._publisher = publisher
        self._registry = registry
        self._trips = trips
        self._steps = steps
        self._hopeless = 0
        self._held = 0

    def look(self) -> str:
        """Renew the timestamp, roll back if enough workers tripped, or move a canary on.

        Returns:
            A sentence on what it did, or why a canary holds, once per step; "" if nothing is new.

        Raises:
            RegistryUnavailableError: the registry cannot be reached.
            PromoteConflictError: another publisher moved the head meanwhile.
        """
        self._publisher.heartbeat()
        living = self._registry.acks()
        served = self._publisher.promoted
        if not served or served == self._hopeless:
            return ""
        try:
            stable = self._publisher.rollout.stable_generation
        except PolicyRefusedError as error:  # its keys were revoked
            self._hopeless = served
            return f"generation {served} is trusted no more ({error}); publish another one"
        for generation in (served, stable):
            tripped = [ack for ack in living if _has_tripped(ack, generation)]
            if tripped and len(tripped) >= min(self._trips, len(living)):
                story = f"{len(tripped)} of {len(living)} workers tripped ({tripped[0].reason})"
                return self._roll_back(story, generation)
        return self._move_on(living, served) if stable and self._steps else ""

    def _roll_back(self, story: str, failed: int) -> str:
        if not self._publisher.signer.suffices:
            if ready := self._publisher.roll_back_ready(failed):
                return f"{story}; generation {ready.generation}, signed before, {_again(ready)}"
            self._hopeless = self._publisher.promoted
            return f"{story}; {UNSIGNED}: run offramp rollback"
        try:
            back = self._publisher.rollback(failed=failed)
        except ConfigError as error:
            self._hopeless = self._publisher.promoted  # nothing to return to
            return f"{story}; they stay at full depth: {error}"
        return f"{story}; generation {back.generation} {_again(back)}"

    def _move_on(self, living: Sequence[Ack], served: int) -> str:
        assert self._steps is not None
        rollout = self._publisher.rollout
        tallies = [each for ack in living for each in ack.tallies]
        canary, stable = (add_up(each, tallies) for each in (served, rollout.stable_generation))
        if rollout.is_shadow:
            found = judge_shadow(self._steps, canary)
        else:
            found = judge(self._steps, canary, stable)
        at = "in shadow" if rollout.is_shadow else f"at {rollout.percent:g}%"
        story = f"canary {served} {at} {found.outcome.value}: {found.reason}"
        following = self._steps.after(rollout.percent)
        if found.outcome is StepOutcome.FAIL:
            return self._roll_back(story, served)
        alone = self._publisher.signer.suffices
        if found.outcome is StepOutcome.PASS and following is not None and alone:
            head = self._publisher.roll_out(following)
            return f"{story}; generation {head.generation} serves {following:g}% of the requests"
        if self._held == served:
            return ""
        self._held = served
        if found.outcome is StepOutcome.PASS and following is not None:
            return f"{story}; {UNSIGNED}: run offramp promote --percent {following:g}"
        return story + _refusals(living)


def _again(back: Head | Manifest) -> str:
    return f"serves policy {back.digest[:12]} again"


def _has_tripped(ack: Ack, generation: int) -> bool:
    return ack.state is AckState.TRIPPED and ack.about == generation


def _refusals(living: Sequence[Ack]) -> str:
    """Who does not run the head, and why."""
    refusing = [ack for ack in living if ack.state is not AckState.ACK]
    if not refusing:
        return ""
    first = refusing[0]
    said = f"{first.worker} says {first.state.value} {first.reason}"
    return f" ({len(refusing)} of {len(living)} workers do not run it: {said})"
