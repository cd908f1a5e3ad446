"""A real pool of two models, of which one classifies: policies reach each by its own channel."""

from __future__ import annotations

import asyncio
import re
import signal
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
from offramp.worker.spec import WorkerSpec, load_engine
from support.classifying.labelled_files import encoder_folder, labelled_file
from support.pools.served_pool import ServedPool, run, streams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TEXTS = ["w3 w3 w3 w20 w4", "w4 w4 w4 w30", "w3 w3 w40 w3"]


class Classifying:
    """The pool, its heads, and what publishes to it."""

    def __init__(self, folder: Path) -> None:
        model, heads = encoder_folder(folder / "model"), folder / "heads"
        self.config = ClassifyTuneConfig(model=str(model), data=labelled_file(folder / "d.csv"))
        tune_classes(self.config, heads)
        self.model = SequenceModel.load(model)
        self.heads = heads
        self.others = folder / "others"  # for classes of which one has another name
        self.classifier = self.model.classifier(heads)
        self.home = folder / "home"
        self.file = folder / "models.toml"
        self.file.write_text(
            f"[classes]\nmodel = '{model}'\nclassify = '{heads}'\n"
            "[reference]\nchannel = 'tokens'\nslots = 12\n"
        )
        self.pool = ServedPool(self.home, {"--models": self.file, "--replicas": 1})

    def publish(self, layer: int, heads: Path | None, channel: str = "default") -> int:
        """Have texts leave after a layer, for these heads or, without, for tokens."""
        model: Any = self.model
        fingerprint = self.model.fingerprint
        if channel == "tokens":
            model = load_engine(WorkerSpec(model="models/reference"))
            fingerprint = model.model_fingerprint
        redis = f"redis://127.0.0.1:{self.pool.redis_port}"
        settings = Settings(home=self.home, redis_url=redis, channel=channel)
        registry = open_registry(settings)
        publisher = open_publisher(settings, registry)
        head = publisher.release(
            pack_policy(FixedExit(layer), np.empty((2, 0), np.float32)),
            model=fingerprint,
            tokenizer=model.tokenizer_fingerprint,
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
    with served.pool:
        yield served


async def classified(client: httpx.AsyncClient) -> Any:
    asked = {"model": "classes", "input": TEXTS, "offramp": {"stats": True}}
    reply = await client.post("/v1/classify", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()["data"]


async def told(client: httpx.AsyncClient, model: str = "classes", **said: Any) -> Any:
    """What the worker says of its policy, once it says that."""
    while True:
        policy = (await client.get("/v1/policy", params={"model": model})).json()
        if all(policy.get(name) == value for name, value in said.items()):
            return policy
        await asyncio.sleep(0.05)


def test_texts_run_every_layer_until_a_policy_for_these_heads_comes(served: Classifying) -> None:
    alone = served.classifier.run(served.model.encode(TEXTS))
    labels = [served.classifier.heads.labels[each] for each in alone.label_N]

    async def full(client: httpx.AsyncClient) -> Any:
        both = await asyncio.gather(classified(client), classified(client))
        return (
            both[0],
            both[1],
            await client.post("/v1/completions", json={"model": "classes", "prompt": "w3"}),
        )

    first, second, missing = run(served.pool, full)
    assert [each["label"] for each in first] == labels
    assert {each["offramp"]["exit_layer"] for each in first} == {5}
    assert [each["label"] for each in second] == labels
    # Batches of other sizes sum in another order.
    chances = [[each["probs"] for each in answer] for answer in (first, second)]
    assert np.allclose(chances[0], chances[1], atol=1e-5)
    assert missing.status_code == 400
    assert "classifies texts" in missing.json()["error"]["message"]

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


def test_heads_travel_with_a_release_if_they_tell_the_same_classes_apart(
    served: Classifying, tmp_path: Path
) -> None:
    config = ClassifyTuneConfig(
        model=served.config.model, data=labelled_file(tmp_path / "d.csv", seed=1)
    )
    tune_classes(config, tmp_path / "heads")
    brought = served.model.classifier(tmp_path / "heads")
    assert brought.heads.digest != served.classifier.heads.digest
    generation = served.publish(3, tmp_path / "heads")
    policy = run(served.pool, lambda client: told(client, generation=generation, state="ACK"))
    assert policy["adapters"] == brought.heads.digest
    alone = brought.run(served.model.encode(TEXTS), FixedExit(3))
    found = run(served.pool, classified)
    assert np.allclose([each["probs"] for each in found], alone.probs_NC, atol=1e-5)
    assert {each["offramp"]["generation"] for each in found} == {generation}

    config.data.write_text(config.data.read_text().replace(",a\n", ",another\n"))
    tune_classes(config, served.others)
    served.publish(3, served.others)
    policy = run(served.pool, lambda client: told(client, state="NACK"))
    assert policy["generation"] == generation
    assert "class 0 is 'another', and 'a' as this pool tells its clients" in policy["reason"]


async def asked_of(client: httpx.AsyncClient, model: str, tokens: int = 4) -> Any:
    asked = {"model": model, "prompt": [11, 12], "max_tokens": tokens, "offramp": {"stats": True}}
    reply = await client.post("/v1/completions", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()["offramp"]


def test_another_model_of_the_pool_follows_a_channel_of_its_own(served: Classifying) -> None:
    classes = run(served.pool, lambda client: told(client))["generation"]
    assert run(served.pool, lambda client: asked_of(client, "reference"))["generation"] == 0
    generation = served.publish(6, None, "tokens")

    async def afterwards(client: httpx.AsyncClient) -> Any:
        await told(client, "reference", generation=generation, state="ACK")
        unnamed = await client.get("/v1/policy")
        names = [each["id"] for each in (await client.get("/v1/models")).json()["data"]]
        health = (await client.get("/health")).json()
        metrics = (await client.get("/metrics")).text
        return await asked_of(client, "reference"), unnamed, names, health, metrics

    stats, unnamed, names, health, metrics = run(served.pool, afterwards)
    assert stats["generation"] == generation
    assert set(stats["exit_layers"][1:]) == {6}
    assert run(served.pool, lambda client: told(client))["generation"] == classes
    assert names == ["classes", "reference"]
    assert unnamed.status_code == 400
    assert unnamed.json()["error"]["param"] == "model"
    assert health == {"status": "ok", "models": {"classes": "ok", "reference": "ok"}}
    for model, runs in (("classes", classes), ("reference", generation)):
        labels = f'model_name="{model}",worker="worker-0-[0-9a-f]+"'
        assert re.search(f"offramp_policy_generation{{{labels}}} {float(runs)}", metrics)


def told_to_redeploy(served: Classifying) -> str:
    """What the command says of a redeploy, once it is done."""
    served.pool.process.send_signal(signal.SIGUSR1)
    assert served.pool.process.stdout is not None
    return next(line for line in served.pool.process.stdout if "redeployed: " in line)


def test_a_redeploy_replaces_all_workers_and_loses_no_request(served: Classifying) -> None:
    before = {each.pid for each in served.pool.workers()}
    written = served.file.read_text()
    written = written.replace("classify =", "replicas = 2\nclassify =")
    written = written.replace(str(served.heads), str(served.others))
    served.file.write_text(written.replace("slots = 12", "slots = 12\nkv_mode = 'verify'"))

    async def meanwhile(client: httpx.AsyncClient) -> Any:
        outcomes, tasks = await streams(client, 600)
        said = asyncio.create_task(asyncio.to_thread(told_to_redeploy, served))
        answered = 0
        while not said.done() or {each.pid for each in served.pool.workers()} & before:
            assert await classified(client)
            assert await asked_of(client, "reference")
            answered += 1
            await asyncio.sleep(0.1)
        await asyncio.gather(*tasks)
        return outcomes, said.result(), answered, await asked_of(client, "reference", 16)

    outcomes, said, answered, stats = run(served.pool, meanwhile)
    assert said.startswith("redeployed: classes with 2 workers")
    assert all(outcome.is_whole for outcome in outcomes), outcomes
    assert answered
    # The policy came from the registry again, and the new workers verify what its exits draft.
    assert stats["drafts"] > 0
    # Their release was refused for the classes that clients were told of before.
    policy = run(served.pool, lambda client: told(client, state="ACK"))
    others = served.model.classifier(served.others)
    assert policy["adapters"] == others.heads.digest
    found = run(served.pool, classified)
    assert {each["label"] for each in found} == {"another", "b"}
    assert {each["offramp"]["exit_layer"] for each in found} == {3}


@pytest.mark.parametrize(
    ("models", "why"),
    [("[classes", "models: "), ("[another]\n", "are not classes, reference any more")],
)
def test_what_cannot_be_redeployed_changes_nothing(
    served: Classifying, models: str, why: str
) -> None:
    before = {each.pid for each in served.pool.workers()}
    written = served.file.read_text()
    served.file.write_text(models)
    said = told_to_redeploy(served)
    served.file.write_text(written)
    assert said.startswith("not redeployed: ")
    assert why in said
    assert {each.pid for each in served.pool.workers()} == before
    assert run(served.pool, classified)


def test_one_model_that_loses_its_worker_leaves_the_others_alone(served: Classifying) -> None:
    before = run(served.pool, lambda client: told(client, "reference"))["replica"]
    (lost,) = [each for each in served.pool.workers() if "offramp-reference" in each.cmdline()[0]]
    lost.kill()

    async def meanwhile(client: httpx.AsyncClient) -> Any:
        states = set()
        while True:
            assert await classified(client)
            health = await client.get("/health")
            assert health.status_code == 200
            states.add(tuple(sorted(health.json()["models"].items())))
            now = await client.get("/v1/policy", params={"model": "reference"})
            if now.status_code == 200 and now.json()["replica"] != before:
                return states, await asked_of(client, "reference")
            await asyncio.sleep(0.1)

    states, again = run(served.pool, meanwhile)
    # Whether it is seen without workers depends on how soon another has its place.
    assert {dict(state)["classes"] for state in states} == {"ok"}
    assert {dict(state)["reference"] for state in states} <= {"ok", "without workers"}
    assert len(again["exit_layers"]) == 4


def test_texts_of_a_worker_that_froze_are_answered_by_another(served: Classifying) -> None:
    """Those it has and those that come until Ray has replaced it, which takes it longer."""
    theirs = [each for each in served.pool.workers() if "offramp-classes" in each.cmdline()[0]]
    assert len(theirs) == 2  # since the redeploy above

    async def scenario(client: httpx.AsyncClient) -> list[Any]:
        heard: set[str] = set()
        while len(heard) < 2:
            heard.add((await told(client))["replica"])
        theirs[0].suspend()
        answers: list[Any] = await asyncio.gather(*(classified(client) for _ in range(12)))
        assert theirs[0].is_running()
        return answers

    answers = run(served.pool, scenario)
    theirs[0].kill()  # which Ray would do in a while; a pool that is stopped waits for it
    assert len({tuple(each["label"] for each in answer) for answer in answers}) == 1
