"""Who is asked for its load before it gets a request, and who gets it at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.config import RequestRouterConfig

from offramp.deploy.http.backend import WorkerLostError
from offramp.deploy.serve.placing import workers_heard
from offramp.deploy.serve.placing.worker_router import WorkerRouter
from offramp.deploy.serve.placing.workers_heard import WorkersHeard

DEPLOYMENT = DeploymentID(name="workers")
REPLICAS = [
    SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT), max_ongoing_requests=4)
    for name in ("a", "b", "c")
]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> WorkersHeard:
    heard = WorkersHeard()
    monkeypatch.setattr(workers_heard, "HEARD", heard)
    return heard


class Routed:
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
            self.everyone = {each.replica_id.unique_id for each in everyone}
            return named and await router._select_from_candidate_replicas(named, 0)

        found = asyncio.run(choose())
        self.replica = found and found.replica_id.unique_id


def test_only_who_ever_reported_to_this_front_gets_any(heard: WorkersHeard) -> None:
    """Others are those that a rolling update is about to end, and send their tokens elsewhere."""
    assert Routed("").everyone == {"a", "b", "c"}
    heard.note("a")
    heard.note("b")
    assert Routed("").everyone == {"a", "b"}
    assert Routed("c").replica == []


def test_a_worker_that_reported_just_now_gets_the_request_at_once(heard: WorkersHeard) -> None:
    heard.note("b")
    chosen = Routed("b")
    assert (chosen.replica, chosen.asked) == ("b", [])


def test_one_that_was_not_heard_of_lately_is_asked_first(
    heard: WorkersHeard, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard.note("a")
    monkeypatch.setattr(workers_heard, "AWAKE_S", 0.0)
    assert Routed("a").asked == ["a"]


def test_what_ray_knows_of_its_load_is_left_alone(heard: WorkersHeard) -> None:
    heard.note("c")
    assert Routed("c", {"c": 4}).asked == ["c"]  # it had no room a moment ago
    assert Routed("c", {"c": 3}).asked == []


def test_one_that_is_gone_is_no_candidate_and_is_forgotten(
    heard: WorkersHeard, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard.note("d")
    assert Routed("d").replica == []
    monkeypatch.setattr(workers_heard, "FORGET_S", 0.0)
    heard.note("a")
    assert heard.silent_s("d") == float("inf")


def test_only_who_reported_lately_is_named_and_then_waited_for(
    heard: WorkersHeard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router may send what a silent one was to get to another, who is not to be given up."""
    heard.note("a")
    monkeypatch.setattr(workers_heard, "AWAKE_S", 0.05)
    time.sleep(0.1)
    heard.note("b")
    assert heard.awake(["a", "b", "c"]) == {"b"}


CARRIED = """
import pickle, sys
from offramp.deploy.serve.placing import workers_heard

router = pickle.load(sys.stdin.buffer)
workers_heard.HEARD.note("a")
seen = router.choose_replicas.__globals__["workers_heard"].HEARD
print(router.__qualname__, seen.silent_s("a") < 1.0)
"""


def test_routers_that_ray_carries_into_the_front_hear_what_is_noted_there() -> None:
    """Ray does not import a router's class: it pickles it by value, and what its module holds."""
    config = RequestRouterConfig(request_router_class=WorkerRouter)
    carried = config.get_serialized_request_router_cls()
    assert carried is not None
    front = subprocess.run([sys.executable, "-c", CARRIED], input=carried, capture_output=True)
    assert front.stdout.decode().split() == ["WorkerRouter", "True"], front.stderr.decode()


def test_an_answer_is_waited_for_while_its_worker_reports(
    heard: WorkersHeard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_heard, "LOOK_S", 0.01)

    async def waited(*, reports: bool) -> str:
        async def answer() -> str:
            for _ in range(30):
                if reports:
                    heard.note("a")
                await asyncio.sleep(0.01)
            return "an answer"

        heard.note("a")
        return await heard.answered("a", answer(), 0.1)

    assert asyncio.run(waited(reports=True)) == "an answer"
    with pytest.raises(WorkerLostError, match="no longer answers"):
        asyncio.run(waited(reports=False))

    async def failing() -> str:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        asyncio.run(heard.answered(None, failing(), 0.0))
