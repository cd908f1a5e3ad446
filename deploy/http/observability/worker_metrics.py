"""What Prometheus is told of workers, as they report: how they are, and what they run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from offramp.deploy.http.served_models import ServedModels

PREFIX = "offramp_"
"""Begins every name."""

Said = Sequence[tuple[str, Mapping[str, Any]]]
"""Reports, each with its worker's model."""

REPORTED = {
    "num_requests_running": ("running", "Completions that a worker decodes"),
    "num_requests_waiting": ("waiting", "Completions that wait for a slot of a worker"),
    "tokens_under_way": ("tokens", "Tokens of its requests: prompts, and all that they may make"),
    "kept_prompts_total": ("kept", "Prompts sent to a worker since it had read their beginning"),
    "moved_prompts_total": ("moved", "Those sent to it since all who had were too busy"),
    "policy_generation": ("generation", "Release that a worker runs; 0: full depth"),
    "policy_stale_seconds": ("stale_s", "Since when a worker cannot tell which release is newest"),
    "guardrail_trips_total": ("trips", "Releases that a worker took out of service"),
    "policy_point": (
        "point",
        "Certified setting that it runs at, from 1, the safest, on; 0: fixed",
    ),
    "policy_moves_total": ("moves", "How often that setting changed"),
    "audited_tokens_total": ("audited", "Early tokens that full depth was asked about"),
    "audit_disagreements_total": ("disagreed", "Those that full depth would not have emitted"),
}
"""What workers report: the field of their report, and what it says."""

TRAFFIC = {
    "live_traffic_tokens_total": ("recorded_tokens", "Tokens of live traffic that were recorded"),
    "live_traffic_passed_over_total": (
        "passed_over",
        "Requests that were not recorded: no time was left, or they were too long",
    ),
    "live_traffic_kept_total": ("kept", "Recorded requests that were written to disk"),
    "live_traffic_dropped_total": ("dropped", "Those that gave way to newer ones"),
    "live_traffic_lost_total": ("lost", "Recorded requests that never reached the disk"),
}
"""What workers that keep live traffic report of it: the field under ``traffic``, and what it says.
"""


class WorkerMetrics(Collector):
    """Looks workers' reports up each time Prometheus asks.

    Args:
        models: What answers for each model.
    """

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each thing that is reported."""
        said = [
            (name, report)
            for name, pool in self._models.by_name.items()
            for report in pool.reports()
        ]
        for name, (field, text) in REPORTED.items():
            yield _by_worker(name, text, said, field)
        kept = [
            (model, report["traffic"] | {"worker": report["worker"]})
            for model, report in said
            if report.get("traffic")
        ]
        for name, (field, text) in TRAFFIC.items():
            yield _by_worker(name, text, kept, field)
        yield from _energy(said)
        says = ("worker", "digest", "guarantee", "state")
        info = GaugeMetricFamily(
            PREFIX + "policy_info",
            "1, and which policy a worker runs",
            labels=("model_name", *says),
        )
        for model, report in said:
            info.add_metric((model, *(report[field] for field in says)), 1)
        yield info
        tasks = GaugeMetricFamily(
            PREFIX + "asyncio_tasks",
            "Tasks of a process's event loop: as many as there are requests, and a few",
            labels=("model_name", "process"),
        )
        tasks.add_metric((self._models.only or "", "front"), _tasks_here())
        for model, report in said:
            tasks.add_metric((model, report["worker"]), report["tasks"])
        yield tasks


def _energy(said: Said) -> Iterator[Metric]:
    """Joules and tokens of the steps that were read: no sample where the energy is unknown."""
    labels = ("model_name", "worker", "method", "source")
    joules = CounterMetricFamily(
        PREFIX + "energy_joules",
        "Energy of steps, or of batches of texts, at which it was read",
        labels=labels,
    )
    tokens = CounterMetricFamily(
        PREFIX + "energy_tokens", "Tokens that these steps emitted, or texts", labels=labels
    )
    for model, report in said:
        for method, source, taken, emitted in report.get("energy", ()):
            named = (model, report["worker"], method, source)
            joules.add_metric(named, taken)
            tokens.add_metric(named, emitted)
    yield joules
    yield tokens


def _by_worker(name: str, text: str, said: Said, field: str) -> Metric:
    """One sample per worker: a counter if the name says so, else a gauge."""
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(PREFIX + name, text, labels=("model_name", "worker"))
    for model, report in said:
        family.add_metric((model, report["worker"]), report[field])
    return family


def _tasks_here() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # asked from outside of a loop
        return 0
