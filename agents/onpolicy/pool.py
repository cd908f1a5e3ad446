"""Collectors at work: tasks out, whole rollouts back, whatever dies in between.

A task is lost with the collector that held it, and reissued to another under the same number; the
place of a dead collector is taken by a new one. Weights travel once per version, through Ray's
object store; nothing is asked of the learner while a document is decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from offramp.agents.onpolicy.collector import CollectorActor, CollectSpec, PolicyVersion, Task
from offramp.agents.onpolicy.rollout import DecodedRollout
from offramp.controller.errors import ConfigError
from offramp.controller.features import IntArray

LOST = (RayActorError, ObjectLostError)

MOST_DEATHS_IN_A_ROW = 5
"""Collectors that die without one task in between are beyond help."""


@dataclass(slots=True)
class PoolCounts:
    """What became of the work so far.

    Attributes:
        rollouts: Handed to the learner.
        stale: Dropped, because their version was too old.
        reissued: Tasks lost with a collector, and given out again.
        respawned: Collectors that took a dead one's place.
    """

    rollouts: int = 0
    stale: int = 0
    reissued: int = 0
    respawned: int = 0


@dataclass(slots=True)
class CollectorPool:
    """Some collectors, one task at a time for each.

    Attributes:
        spec: What each collector loads and records.
        candidates_VK: Their candidate table.
        size: Number of collectors.
        max_lag: Versions by which a rollout may be older than the learner's.
        cpus: CPUs that Ray sets aside for each.
        counts: What became of the work.
    """

    spec: CollectSpec
    candidates_VK: IntArray
    size: int
    max_lag: int = 1
    cpus: float = 1.0
    counts: PoolCounts = field(default_factory=PoolCounts)
    actors: list[Any] = field(default_factory=list)
    _running: dict[Any, tuple[Any, Task]] = field(default_factory=dict)
    _lost: deque[Task] = field(default_factory=deque)
    _policy: tuple[int, Any] = (0, None)
    _deaths: int = 0

    def start(self) -> None:
        """Start the collectors, and wait until each has loaded its engine.

        Raises:
            ConfigError: the cluster cannot hold them.
        """
        available = ray.cluster_resources().get("CPU", 0)
        if self.size < 1 or self.size * self.cpus > available:
            raise ConfigError(
                "collectors",
                f"{self.size} with {self.cpus:g} CPUs each do not fit into {available:g}",
                "Start fewer, or join a larger cluster with --ray-address",
            )
        self.actors = [self._spawn() for _ in range(self.size)]
        ray.get([actor.describe.remote() for actor in self.actors])

    def publish(self, policy: PolicyVersion) -> None:
        """Collect under this version from the next task on."""
        self._policy = (policy.version, ray.put(policy))

    def collect(self, tasks: Iterator[Task], documents: int) -> list[DecodedRollout]:
        """At least so many fresh rollouts, in the order of their tasks.

        Args:
            tasks: Gives tasks; as many are taken as are needed, and collectors that find none wait.
            documents: Number of documents whose rollouts are wanted.

        Raises:
            ConfigError: collectors die again and again.
            PolicyFaultError: the policy failed.
        """
        fresh: list[DecodedRollout] = []
        while len(fresh) < documents:
            self._hand_out(tasks)
            done, _ = ray.wait(list(self._running), num_returns=1)
            for reference in done:
                fresh += self._take(reference)
        self.counts.rollouts += len(fresh)
        return sorted(fresh, key=attrgetter("task"))

    def stop(self) -> None:
        """End the collectors and forget what they were doing."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors, self._running = [], {}

    def _hand_out(self, tasks: Iterator[Task]) -> None:
        busy = {id(actor) for actor, _ in self._running.values()}
        for actor in self.actors:
            if id(actor) not in busy:
                task = self._lost.popleft() if self._lost else next(tasks, None)
                if task is None:
                    return
                reference = actor.collect.remote(self._policy[1], task)
                self._running[reference] = (actor, task)

    def _take(self, reference: Any) -> list[DecodedRollout]:
        actor, task = self._running.pop(reference)
        try:
            rollouts: list[DecodedRollout] = ray.get(reference)
        except LOST as error:
            self._replace(actor, task, error)
            return []
        self._deaths = 0
        fresh = [each for each in rollouts if self._policy[0] - each.version <= self.max_lag]
        self.counts.stale += len(rollouts) - len(fresh)
        return fresh

    def _replace(self, actor: Any, task: Task, error: Exception) -> None:
        self._deaths += 1
        if self._deaths > MOST_DEATHS_IN_A_ROW:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                "collectors", f"die again and again ({reason})", "Look at the workers' memory"
            ) from error
        self._lost.append(task)
        self.counts.reissued += 1
        self.counts.respawned += 1
        self.actors[self.actors.index(actor)] = self._spawn()

    def _spawn(self) -> Any:
        return CollectorActor.options(num_cpus=self.cpus).remote(self.spec, self.candidates_VK)
