"""Who is asked for its load before it gets a request, and who gets it at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from offramp.deploy.serve.placing import worker_router
from offramp.deploy.serve.placing.worker_router import WorkerRouter, WorkersHeard

DEPLOYMENT = DeploymentID(name="workers")
REPLICAS = [
    SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT), max_ongoing_requests=4)
    for name in ("a", "b", "c")
]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> WorkersHeard:
    heard = WorkersHeard()
    monkeypatch.setattr(worker_router, "HEARD", heard)
    return heard


class Chosen:
    """What becomes of a request that names a replica; who was asked for its load."""

    def __init__(self, name: str, known: dict[str, int] | None = None) -> None:
        router = WorkerRouter(
            DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        router._replicas = {each.replica_id: each for each in REPLICAS}
        for replica, load in (known or {}).items():
            router.on_new_queue_len_info(ReplicaID(replica, DEPLOYMENT), load)
        self.asked: list[str] = []

        async def ask(replicas: list[Any], _: int) -> list[tuple[Any, int]]:
            self.asked += [each.replica_id.unique_id for each in replicas]
            return [(each, 1) for each in replicas]

        router._probe_queue_lens = ask
        pending = SimpleNamespace(
            metadata=SimpleNamespace(multiplexed_model_id=name), routing_context=SimpleNamespace()
        )

        async def choose() -> Any:
            named, everyone = await router.choose_replicas(REPLICAS, pending)
            assert {each.replica_id for each in everyone} == {each.replica_id for each in REPLICAS}
            return named and await router._select_from_candidate_replicas(named, 0)

        found = asyncio.run(choose())
        self.replica = found and found.replica_id.unique_id


def test_a_worker_that_reported_just_now_gets_the_request_at_once(heard: WorkersHeard) -> None:
    heard.note("b")
    chosen = Chosen("b")
    assert (chosen.replica, chosen.asked) == ("b", [])


def test_one_that_was_not_heard_of_is_asked_first(
    heard: WorkersHeard, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard.note("a")
    assert Chosen("b").asked == ["b"]
    monkeypatch.setattr(worker_router, "AWAKE_S", 0.0)
    assert Chosen("a").asked == ["a"]


def test_what_ray_knows_of_its_load_is_left_alone(heard: WorkersHeard) -> None:
    heard.note("c")
    assert Chosen("c", {"c": 4}).asked == ["c"]  # it had no room a moment ago
    assert Chosen("c", {"c": 3}).asked == []


def test_one_that_is_gone_is_no_candidate_and_is_forgotten(
    heard: WorkersHeard, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard.note("d")
    assert Chosen("d").replica == []
    monkeypatch.setattr(worker_router, "FORGET_S", 0.0)
    heard.note("a")
    assert not heard.is_awake("d")
