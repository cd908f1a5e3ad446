"""What the fill keeps of exits that nothing leaves by any more."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.model.products import UNUSED_S, KeptProduct
from support.models import LAYERS, make_model

PROMPT = [5, 17, 33, 2, 41]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds by the fill's clock, to be changed."""
    now_s = [1000.0]
    monkeypatch.setattr("offramp.worker.model.products.time.monotonic", lambda: now_s[0])
    yield now_s
    monkeypatch.undo()


def leave(engine: AdaptiveEngine, layer: int) -> list[int]:
    [done] = engine.generate(
        [PROMPT], SamplingParams(max_tokens=40, ignore_eos=True), FixedExit(layer)
    )
    assert layer in done.exit_layers
    return done.token_ids


def packed() -> int:
    gc.collect()
    # by type: isinstance asks a weak proxy of another test for its class, which may be gone
    return sum(type(each) is KeptProduct for each in gc.get_objects())


def test_weights_of_exits_go_once_nothing_leaves_there(clock: list[float]) -> None:
    engine = AdaptiveEngine(make_model("llama"), config=EngineConfig(kv_mode="project"))
    before = packed()
    first = leave(engine, 1)
    for layer in range(2, LAYERS):
        clock[0] += UNUSED_S / 4
        leave(engine, layer)
        leave(engine, 1)
    assert packed() - before == LAYERS - 1  # each was used a moment ago
    clock[0] += UNUSED_S + 1
    leave(engine, 2)  # nothing is packed, so nothing is forgotten
    assert packed() - before == LAYERS - 1
    del engine
    again = AdaptiveEngine(make_model("llama"), config=EngineConfig(kv_mode="project"))
    before = packed()
    for layer in range(1, LAYERS):
        clock[0] += UNUSED_S + 1
        leave(again, layer)
        assert packed() - before == 1  # as with policies that come one after the other
    clock[0] += UNUSED_S + 1
    assert leave(again, 1) == first  # packed anew, with the same bits
