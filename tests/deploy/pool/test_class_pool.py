"""A real pool that classifies: policies reach it through Redis as those for tokens do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import tune_classes
from offramp.controller.adapters.adapter_index import AdapterSource
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.deploy.serve.publishing import open_publisher, open_registry
from offramp.deploy.serve.settings import Settings
from offramp.worker.classifying.sequence_model import SequenceModel
from support.classifying.labelled_files import encoder_folder, labelled_file
from support.pools.served_pool import PATIENCE_S, ServedPool, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TEXTS = ["w3 w3 w3 w20 w4", "w4 w4 w4 w30", "w3 w3 w40 w3"]


class Classifying:
    """The pool, its heads, and what publishes to it."""

    def __init__(self, folder: Path) -> None:
        model, heads = encoder_folder(folder / "model"), folder / "heads"
        tune_classes(
            ClassifyTuneConfig(model=str(model), data=labelled_file(folder / "d.csv")), heads
        )
        self.model = SequenceModel.load(model)
        self.heads = heads
        self.classifier = self.model.classifier(heads)
        self.home = folder / "home"
        options = {"--model": model, "--classify": heads, "--replicas": 1}
        self.pool = ServedPool(self.home, options)

    def publish(self, layer: int, heads: Path | None) -> int:
        """Have texts leave after a layer, for these heads or, without, for tokens."""
        settings = Settings(home=self.home, redis_url=f"redis://127.0.0.1:{self.pool.redis_port}")
        registry = open_registry(settings)
        publisher = open_publisher(settings, registry)
        head = publisher.release(
            pack_policy(FixedExit(layer), np.empty((2, 0), np.float32)),
            model=self.model.fingerprint,
            tokenizer=self.model.tokenizer_fingerprint,
            training={},
            metrics={},
            uncertified=True,
            adapters=None if heads is None else AdapterSource.open(heads),
        )
        publisher.promote(head.generation)
        registry.close()
        return head.generation


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classifying]:
    served = Classifying(tmp_path_factory.mktemp("classes"))
    try:
        served.pool.await_start()
        yield served
    finally:
        if served.pool.process.poll() is None:
            served.pool.process.terminate()
            served.pool.process.wait(PATIENCE_S)


async def classified(client: httpx.AsyncClient) -> Any:
    asked = {"model": "model", "input": TEXTS, "offramp": {"stats": True}}
    reply = await client.post("/v1/classify", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()["data"]


async def told(client: httpx.AsyncClient, **said: Any) -> Any:
    """What the worker says of its policy, once it says that."""
    while True:
        policy = (await client.get("/v1/policy")).json()
        if all(policy.get(name) == value for name, value in said.items()):
            return policy
        await asyncio.sleep(0.05)


def test_texts_run_every_layer_until_a_policy_for_these_heads_comes(served: Classifying) -> None:
    alone = served.classifier.run(served.model.encode(TEXTS))
    labels = [served.classifier.heads.labels[each] for each in alone.label_N]

    async def full(client: httpx.AsyncClient) -> Any:
        both = await asyncio.gather(classified(client), classified(client))
        return both[0], both[1], await client.post("/v1/completions", json={"prompt": "w3"})

    first, second, missing = run(served.pool, full)
    assert [each["label"] for each in first] == labels
    assert {each["offramp"]["exit_layer"] for each in first} == {5}
    assert [each["label"] for each in second] == labels
    # Batches of other sizes sum in another order.
    chances = [[each["probs"] for each in answer] for answer in (first, second)]
    assert np.allclose(chances[0], chances[1], atol=1e-5)
    assert missing.status_code == 404

    generation = served.publish(2, served.heads)
    run(served.pool, lambda client: told(client, generation=generation, state="ACK"))
    early = run(served.pool, classified)
    alone = served.classifier.run(served.model.encode(TEXTS), FixedExit(2))
    assert [each["label"] for each in early] == [
        served.classifier.heads.labels[each] for each in alone.label_N
    ]
    assert {each["offramp"]["exit_layer"] for each in early} == {2}
    assert {each["offramp"]["generation"] for each in early} == {generation}

    # A policy for tokens of the same model is refused, and the one before it stays.
    served.publish(1, None)
    policy = run(served.pool, lambda client: told(client, state="NACK"))
    assert policy["generation"] == generation
    assert "it names no heads: it is for tokens" in policy["reason"]
