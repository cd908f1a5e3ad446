"""Describes what a worker runs, as ``/v1/policy`` answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offramp.controller.release.registry import Ack
from offramp.controller.watching.tally import Tally
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.engine.core import EngineCore

_TOLD_OF_TALLIES = ("audited", "disagreed", "points", "point", "moves")
"""What is told of a release's counts as it is."""

Conditions = Callable[[PolicySnapshot], tuple[str, str]]
"""Gives what a release is read through, by digest, and why its certificate does not hold here."""


def conditions_of(engine: EngineCore) -> Conditions:
    """How an engine decodes, as certificates ask."""

    def conditions(snapshot: PolicySnapshot) -> tuple[str, str]:
        adapters = engine.decoder.reader.under(snapshot).digest
        if snapshot.certificate is None:
            return adapters, ""
        dtype = str(engine.stack.dtype).removeprefix("torch.")
        mode = engine.config.kv_mode
        return adapters, snapshot.certificate.gap(kv_mode=mode, dtype=dtype, translators=adapters)

    return conditions


def describe_policy(
    worker: str, snapshot: PolicySnapshot, report: Ack, conditions: Conditions
) -> dict[str, Any]:
    """Describe a worker's policy, as ``/v1/policy`` answers.

    ``guarantee`` is "certified", "uncertified" or "full depth"; ``certificate`` the sentence it
    states; ``gap`` why that sentence does not hold for how this worker decodes, "" if it does;
    ``audited`` counts early tokens that full depth was asked about, ``disagreed`` those it
    would not have emitted; ``setting`` is the certified setting that new requests run at, the
    ``point``-th of ``points`` that the worker moves among, 1 being the safest, and ``moves`` says
    how often it changed (0 of 0: it does not move); ``canary`` describes the release that serves a
    share of the requests (``percent``) in its place, None if there is none.
    """
    canary = snapshot.canary
    return {
        "worker": worker,
        **_describe(snapshot, conditions),
        "canary": canary and {"percent": canary.rollout.percent, **_describe(canary, conditions)},
        "state": report.state.value,
        "reason": report.reason,
    }


def _describe(snapshot: PolicySnapshot, conditions: Conditions) -> dict[str, Any]:
    certificate = snapshot.certificate
    tally = snapshot.watch.tally if snapshot.watch else Tally()
    adapters, gap = conditions(snapshot)
    return {
        "generation": snapshot.generation,
        "digest": snapshot.digest,
        "exits": list(snapshot.policy.exits),
        "adapters": adapters,
        "guarantee": snapshot.guarantee,
        "certificate": None if certificate is None else certificate.statement,
        "gap": gap,
        "setting": snapshot.setting,
        **{name: getattr(tally, name) for name in _TOLD_OF_TALLIES},
    }


def energy_of(totals: Mapping[tuple[str, str], tuple[float, int]]) -> list[tuple[Any, ...]]:
    """List method, source, joules and tokens (or texts) of the steps whose energy was read."""
    return [(*read, *taken) for read, taken in tuple(totals.items())]
