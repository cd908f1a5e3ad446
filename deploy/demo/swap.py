"""What the demo does with a pool: publish, swap under load, query, roll back."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.controller.adapters.adapter_index import MAX_ADAPTER_MB
from offramp.controller.errors import RegistryUnavailableError
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import AckState, PolicyRegistry
from offramp.deploy.cli.releases.control import release_bundle
from offramp.deploy.demo.traffic import StreamRecord, Traffic, tokens_per_s
from offramp.deploy.serve.publishing import adapters_beside
from offramp.worker.spec import ModelFacts

ACK_DEADLINE_S = 60.0
ACK_POLL_S = 0.005

LIVE_TOKENS = 640
"""Tokens of a stream under which the policy is swapped: so many that it outlives the swap by far.

Workers compile a policy's probe before they acknowledge it, while other streams go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """One move of the head, as the workers acknowledged it.

    Attributes:
        generation: The new generation.
        ack_ms: Milliseconds from the start of publishing (signing, ledger, upload, promotion) to
            each worker's acknowledgement.
    """

    generation: int
    ack_ms: dict[str, float]


class ControlPanel:
    """Publishes to a pool and waits for its workers.

    Args:
        publisher: The channel's writer.
        registry: Where acknowledgements arrive.
        workers: How many workers must acknowledge.
        facts: The model that the pool serves.
    """

    def __init__(
        self, publisher: Publisher, registry: PolicyRegistry, workers: int, facts: ModelFacts
    ) -> None:
        self.publisher = publisher
        self.registry = registry
        self.workers = workers
        self.facts = facts

    def publish_full_depth(self) -> int:
        """Release and promote a policy that never exits; what a rollback returns to."""
        release = self.publisher.release(
            pack_policy(NeverExit(), np.empty((1, 0), np.float32)),
            model=self.facts.model,
            tokenizer=self.facts.tokenizer,
            training={"family": "full depth"},
            metrics={},
        )
        self.publisher.promote(release.generation)
        return release.generation

    def publish(self, folder: Path) -> Swapped:
        """Sign a trained bundle with its adapters, promote it, wait for every worker."""
        bundle = PolicyBundle.load(folder)
        adapters = adapters_beside(bundle, folder, None, MAX_ADAPTER_MB)
        started = time.time()
        uncertified = bundle.manifest.guarantee == "uncertified"
        release = release_bundle(self.publisher, bundle, uncertified=uncertified, adapters=adapters)
        self.publisher.promote(release.generation)
        return self._moved(started, release.generation)

    def roll_back(self) -> Swapped:
        """Return to the last good policy, wait for every worker."""
        started = time.time()
        return self._moved(started, self.publisher.rollback().generation)

    def await_workers(self, generation: int) -> dict[str, float]:
        """When each worker acknowledged a generation, unix seconds.

        Raises:
            RegistryUnavailableError: they did not all do so in time.
        """
        deadline = time.monotonic() + ACK_DEADLINE_S
        ready: dict[str, float] = {}
        while time.monotonic() < deadline:
            for ack in self.registry.acks():
                if ack.generation == generation and ack.state is AckState.ACK:
                    # Later polls acknowledge again; the first one counts.
                    ready.setdefault(ack.worker, ack.at)
            if len(ready) >= self.workers:
                return ready
            time.sleep(ACK_POLL_S)
        states = [f"{ack.worker} {ack.state.value} {ack.reason}" for ack in self.registry.acks()]
        raise RegistryUnavailableError(
            "workers", f"did not all acknowledge generation {generation}: {'; '.join(states)}"
        )

    def _moved(self, started: float, generation: int) -> Swapped:
        acknowledged = self.await_workers(generation)
        ack_ms = {name: 1e3 * (at - started) for name, at in sorted(acknowledged.items())}
        return Swapped(generation=generation, ack_ms=ack_ms)


def swap_under_load(
    panel: ControlPanel, traffic: Traffic, folder: Path, prompts: list[str]
) -> dict[str, Any]:
    """Publish a policy while streams are under way; the report's ``swap``."""
    moved: list[Swapped] = []
    acknowledged_s: list[float] = []

    def swap() -> None:
        moved.append(panel.publish(folder))
        acknowledged_s.append(time.monotonic())

    early, late = traffic.across_a_swap(prompts, swap, tokens=LIVE_TOKENS)
    records = early + late
    return {
        **asdict(moved[0]),
        "guarantee": PolicyBundle.load(folder).manifest.guarantee,
        "requests": len(records),
        "failed": sum(record.failed for record in records),
        "torn": sum(record.torn for record in records),
        "errors": [record.error for record in records if record.failed],
        "in_flight_generations": [sorted(set(record.generations)) for record in early],
        # What each stream really executed: a swap that reached it would show as earlier exits,
        # whatever generation it reports.
        "in_flight_layers": [sorted(set(record.exit_layers)) for record in early],
        "after_generations": [sorted(set(record.generations)) for record in late],
        # Tokens of each stream that came before all workers had acknowledged, and after.
        "in_flight_tokens": [record.tokens_around(acknowledged_s[0]) for record in early],
    }


def request_report(records: list[StreamRecord]) -> list[dict[str, Any]]:
    """What the report says of timed requests."""
    return [
        {
            "prompt": record.prompt,
            "text": "".join(record.texts),
            "exit_layers": record.exit_layers,
            "generation": record.generations[-1] if record.generations else None,
            "finish_reason": record.finish_reason,
            "tokens_per_s": tokens_per_s([record]),
            "error": record.error,
        }
        for record in records
    ]
