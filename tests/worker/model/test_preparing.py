"""A policy's probe is made ready by the refresher's thread, while the engine decodes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.controller.features import SKETCH_V1, IntArray
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import trusted_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit, Policy, ThresholdPolicy
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import AckState, InMemoryRegistry
from offramp.controller.release.trust import ReleaseVerifier
from offramp.worker import FULL_DEPTH, AdaptiveEngine, SamplingParams
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.probes.readout import DERIVED, Readout

THREADS, TURNS = 4, 20_000


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


class PlainLayer:
    """A publisher, and what a refresher with ``prepare`` makes of its releases."""

    def __init__(self, folder: Path) -> None:
        registry, key = InMemoryRegistry(), load_or_create_key(folder / "key.pem")
        self.publisher = Publisher(registry, FolderLedger(folder / "ledger"), key, "c")
        verifier = ReleaseVerifier(trusted_keys(key.public_bytes), "c", "aa", "bb")
        self.parts = (registry, verifier, folder / "state", "w0", 5.0)

    def serve(self, layer: int) -> None:
        packed = pack_policy(FixedExit(layer), np.zeros((2, 3), np.float32))
        release = self.publisher.release(
            packed, model="aa", tokenizer="bb", training={}, metrics={}, uncertified=True
        )
        self.publisher.promote(release.generation)


@pytest.fixture
def line(tmp_path: Path) -> PlainLayer:
    return PlainLayer(tmp_path)


def test_a_policy_is_prepared_before_it_is_current_and_once(line: PlainLayer) -> None:
    seen: list[tuple[Policy, int]] = []

    def prepare(policy: Policy, _: object) -> None:
        seen.append((policy, worker.current.generation))

    worker = PolicyRefresher(*line.parts, prepare)
    assert seen == []
    line.serve(3)
    worker.poll_once()
    worker.poll_once()
    line.serve(5)
    worker.poll_once()
    assert seen == [(FixedExit(3), 0), (FixedExit(5), 1)]
    assert worker.current.policy == FixedExit(5)


def test_the_last_known_good_policy_is_prepared_at_the_start(line: PlainLayer) -> None:
    line.serve(3)
    PolicyRefresher(*line.parts).poll_once()
    seen: list[Policy] = []
    worker = PolicyRefresher(*line.parts, lambda policy, _: seen.append(policy))
    assert worker.current.policy == FixedExit(3)
    assert seen == [FixedExit(3)]


def test_a_policy_that_cannot_be_prepared_is_refused_and_the_old_one_stays(
    line: PlainLayer,
) -> None:
    def prepare(policy: Policy, _: object) -> None:
        if policy == FixedExit(5):
            raise MemoryError("no room")

    worker = PolicyRefresher(*line.parts, prepare)
    line.serve(3)
    assert worker.poll_once().state is AckState.ACK
    line.serve(5)
    ack = worker.poll_once()
    assert ack.state is AckState.NACK
    assert ack.reason == "unsupported: it cannot be prepared: no room"
    assert worker.current.policy == FixedExit(3)
    assert PolicyRefresher(*line.parts).current.policy == FixedExit(3)

    def refuse(*_: object) -> None:
        raise MemoryError("no room")

    assert PolicyRefresher(*line.parts, refuse).current is FULL_DEPTH


def table(seed: int, engine: AdaptiveEngine) -> IntArray:
    random = np.random.default_rng(seed)
    shape = (engine.stack.vocab, 8)
    return random.integers(engine.stack.vocab, size=shape, dtype=np.int32)


@pytest.mark.usefixtures("restless")
def test_tables_are_derived_from_many_threads_at_once(reference: AdaptiveEngine) -> None:
    readout, tables = Readout(reference.stack), [np.full((2, 2), i) for i in range(3 * DERIVED)]
    start = threading.Barrier(THREADS)

    def total(_: Readout, table_VK: IntArray) -> int:
        return int(table_VK.sum())

    def derive(offset: int) -> None:
        start.wait()
        for turn in range(TURNS):
            number = (turn * 7 + offset) % len(tables)
            assert readout.derived(total, tables[number]) == 4 * number

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(derive, range(THREADS)))


def test_preparing_in_another_thread_disturbs_no_decoding(reference: Any) -> None:
    engine = AdaptiveEngine(reference.stack.model, reference.tokenizer)
    policies = [
        ThresholdPolicy((3, 6, 9), SKETCH_V1, "top1", 0.5, table(seed, engine)) for seed in range(3)
    ]
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)

    def decode() -> list[Any]:
        return [engine.generate("def main():\n", sampling, policy)[0] for policy in policies]

    expected = [each.token_ids for each in decode()]
    stop = threading.Event()

    def prepare() -> int:
        count = 0
        while not stop.is_set():
            for seed in range(2 * DERIVED):
                policy = ThresholdPolicy((3,), SKETCH_V1, "top1", 0.5, table(100 + seed, engine))
                engine.decoder.probes.prepare(policy)
                count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(prepare)
        try:
            found = [[each.token_ids for each in decode()] for _ in range(3)]
        finally:
            stop.set()
        assert prepared.result() > 0
    assert found == [expected] * 3
