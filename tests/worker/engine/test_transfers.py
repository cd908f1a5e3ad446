"""A decode step waits for its device once per launch, and once per decision of a policy.

There is no device here: tensors pretend to lie on one (``support.pretended``), and whatever a real
one would refuse, or would wait for outside ``fetch``, is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp.controller.features import CANDIDATES_V1, SKETCH_V1, SOFTMAX_V2, STATE_V1
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.worker import AdaptiveEngine, EngineConfig, KVMode, SamplingParams, Schedule
from offramp.worker.decoding.asking.groups import DecidedGroup, ExitGroup
from offramp.worker.decoding.request import Request
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.model.gpu.graphs import GraphedLayers, Record
from offramp.worker.model.kv import BLOCK_TOKENS
from offramp.worker.probes import DeviceProbe, FusedProbe
from offramp.worker.profiling.samples import random_policy
from support.models import VOCAB, make_model
from support.pretended import CrossingError, Crossings, PretendedTensor, pretend
from support.replayed import DriverStandIn
from support.rows import RAGGED, RandomExit, drain

SAMPLING = SamplingParams(max_tokens=10, ignore_eos=True)
TABLE_VK = np.argsort(np.random.default_rng(3).random((VOCAB, VOCAB)))[:, :8].astype(np.int32)


def mlp(threshold: float = 6.0) -> MlpPolicy:
    policy = random_policy(CANDIDATES_V1, (1, 2, 3, 4), TABLE_VK)
    policy.threshold = threshold
    return policy


POLICIES: dict[str, Callable[[], Policy]] = {
    "full depth": NeverExit,
    "fixed": lambda: FixedExit(2),
    "random": lambda: RandomExit(0.4, 1),
    "candidates, mlp": mlp,
    "candidates, mlp stays": lambda: mlp(float("inf")),
    "candidates, threshold": lambda: ThresholdPolicy(
        (1, 3), CANDIDATES_V1, "margin", 0.3, TABLE_VK
    ),
    "softmax": lambda: ThresholdPolicy((1, 2, 4), SOFTMAX_V2, "margin", 0.2),
    "state": lambda: ThresholdPolicy((1, 2, 4), STATE_V1, "update", 0.9),
    "sketch": lambda: ThresholdPolicy((1, 2, 4), SKETCH_V1, "margin", 0.3, TABLE_VK),
}
READS_NOTHING = ("full depth", "fixed", "random")


@contextmanager
def pretended_engine(
    family: str = "llama", make_recorder: Callable[[], Record] | None = None, **config: Any
) -> Iterator[tuple[AdaptiveEngine, Crossings]]:
    # Views of what was made outside inference mode cannot be made inside it, as steps do.
    with torch.inference_mode(), Crossings() as crossings:
        model = pretend(make_model(family))
        engine = AdaptiveEngine(model, slots=8, config=EngineConfig(**config))
        if make_recorder is not None:
            engine.stack.run_compiled = GraphedLayers(engine.stack, make_recorder)
        yield engine, crossings


def decoded(
    engine: AdaptiveEngine, policy: Policy, kv_mode: KVMode, sampling: SamplingParams = SAMPLING
) -> list[Sequence]:
    return drain(engine, [engine.submit(p, sampling, policy, kv_mode=kv_mode) for p in RAGGED])


def watched(
    engine: AdaptiveEngine,
    crossings: Crossings,
    policy: Policy,
    kv_mode: KVMode,
    monkeypatch: pytest.MonkeyPatch,
    sampling: SamplingParams = SAMPLING,
) -> tuple[list[Sequence], Counter[str]]:
    """Rows decoded under the watch; launches and questions."""
    counts = counted(engine, monkeypatch)
    with crossings.watched():
        return decoded(engine, policy, kv_mode, sampling), counts


def counted(engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches and questions to policies."""
    counts: Counter[str] = Counter()

    def counting(owner: Any, name: str, what: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[what] += 1
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    counting(engine.decoder, "launch", "launches")
    for group in (ExitGroup, DecidedGroup):
        counting(group, "ask", "questions")
    return counts


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
@pytest.mark.parametrize("name", POLICIES)
def test_one_wait_per_launch_and_per_decision(
    name: str, kv_mode: KVMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded(AdaptiveEngine(make_model("llama")), POLICIES[name](), kv_mode)
    policy = POLICIES[name]()
    with pretended_engine() as (engine, crossings):
        engine.decoder.probes.prepare(policy)  # as a worker does when a policy arrives
        rows, counts = watched(engine, crossings, policy, kv_mode, monkeypatch)
    for row, other in zip(rows, expected, strict=True):
        assert (row.emitted, row.exit_layers) == (other.emitted, other.exit_layers)
    questions = 0 if name in READS_NOTHING else counts["questions"]
    assert crossings.fetches == len(RAGGED) + counts["launches"] + questions
    assert (counts["questions"] > 0) == (name != "full depth")
    if name == "full depth":  # one for each launch, besides the one for each prompt
        assert crossings.uploads == len(RAGGED) + counts["launches"]


def test_a_family_decodes_on_the_device_as_on_the_host(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = decoded(AdaptiveEngine(make_model(family)), RandomExit(0.4, 1), "project")
    with pretended_engine(family) as (engine, crossings):
        policy = RandomExit(0.4, 1)
        rows, counts = watched(engine, crossings, policy, "project", monkeypatch)
    assert [row.emitted for row in rows] == [row.emitted for row in expected]
    assert crossings.fetches == len(RAGGED) + counts["launches"]


def test_captured_layers_give_the_same_tokens_and_wait_no_more_often(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ``verify`` a step has several tokens of a row, in other launches one."""
    expected = decoded(AdaptiveEngine(make_model(family)), RandomExit(0.4, 1), "verify")
    recorder = DriverStandIn()
    with pretended_engine(family, lambda: recorder) as (engine, crossings):
        policy = RandomExit(0.4, 1)
        rows, counts = watched(engine, crossings, policy, "verify", monkeypatch)
    assert [row.emitted for row in rows] == [row.emitted for row in expected]
    assert crossings.fetches == len(RAGGED) + counts["launches"]
    assert recorder.replays > counts["launches"]


@pytest.mark.parametrize("kv_mode", ["project", "defer"])
def test_captured_layers_serve_rows_that_come_go_and_grow(kv_mode: KVMode) -> None:
    """Rows of other lengths join, change slots when one is cancelled, and outgrow the cache."""

    def served(engine: AdaptiveEngine) -> list[list[int]]:
        schedule = Schedule(holds=(2,), rows=3, patience=2)
        engine.set_schedule(schedule)
        sampling = SamplingParams(max_tokens=14, ignore_eos=True)
        prompts = [*RAGGED, [9] * 120, [4, 8] * 65, *RAGGED]
        asked: list[Request] = []
        finished: dict[str, Sequence] = {}
        for n, prompt in enumerate(prompts):
            policy = RandomExit(0.4, n)
            asked.append(engine.submit(prompt, sampling, policy, kv_mode=kv_mode))
            engine.step(finished)
            if n == 5:
                engine.cancel(asked.pop(1).id)
        while len(finished) < len(asked):
            engine.step(finished)
        return [finished[request.id].emitted for request in asked]

    expected = served(AdaptiveEngine(make_model("llama"), slots=8))
    recorder = DriverStandIn()
    with pretended_engine("llama", lambda: recorder) as (engine, _):
        assert served(engine) == expected
        assert engine.kv.capacity > BLOCK_TOKENS
    assert recorder.replays


@pytest.mark.parametrize("kv_mode", ["project", "defer", "verify"])
def test_rows_that_part_in_cohorts_wait_no_more_often(
    kv_mode: KVMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several policies in a launch, rows that join at their own depths, rows that change slots."""
    schedule = Schedule(holds=(2,), rows=3, patience=2)
    with pretended_engine(schedule=schedule) as (engine, crossings):
        policies = [make() for make in POLICIES.values()]
        for policy in policies:
            engine.decoder.probes.prepare(policy)
        requests = [
            engine.submit(
                prompt,
                SamplingParams(max_tokens=4 + n, ignore_eos=True),
                policies[(n + 1) % len(policies)],
                kv_mode=kv_mode,
            )
            for n, prompt in enumerate(RAGGED * 2)
        ]
        counts = counted(engine, monkeypatch)
        with crossings.watched():
            drain(engine, requests)
    assert crossings.fetches <= len(requests) + counts["launches"] + counts["questions"]


@pytest.mark.parametrize("kv_mode", ["project", "verify"])
def test_rows_that_draw_take_their_logits_along(
    kv_mode: KVMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(
        max_tokens=10, ignore_eos=True, temperature=0.8, seed=3, logprobs=2, frequency_penalty=0.5
    )
    policy = RandomExit(0.4, 1)
    expected = decoded(AdaptiveEngine(make_model("llama")), RandomExit(0.4, 1), kv_mode, sampling)
    with pretended_engine() as (engine, crossings):
        rows, counts = watched(engine, crossings, policy, kv_mode, monkeypatch, sampling)
    assert [row.emitted for row in rows] == [row.emitted for row in expected]
    assert crossings.fetches == len(RAGGED) + counts["launches"]


def read_a_number(x: Tensor) -> None:
    x.flatten()[0].item()


def branch(x: Tensor) -> None:
    bool((x > 0).any())


def copy_to_the_host(x: Tensor) -> None:
    x.cpu()


def index_by_a_list(x: Tensor) -> None:
    x[[0]]


def index_by_a_mask(x: Tensor) -> None:
    x[x > 0]


def use_numbers_of_the_host(x: Tensor) -> None:
    x + torch.tensor([1.0])


def make_from_a_list(x: Tensor) -> None:
    x + torch.tensor([1.0], device=x.device)


@pytest.mark.parametrize(
    "wrong",
    [
        read_a_number, branch, copy_to_the_host, index_by_a_list, index_by_a_mask,
        use_numbers_of_the_host, make_from_a_list,
    ],
)  # fmt: skip
def test_whatever_waits_or_mixes_devices_is_refused(
    wrong: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: one such line in a step, and the checks above fail."""
    with pretended_engine() as (engine, crossings):
        plain = engine.stack.run_layer

        def run_layer(index: int, x_BTD: Tensor, *rest: Any) -> Tensor:
            wrong(x_BTD)
            return plain(index, x_BTD, *rest)

        monkeypatch.setattr(engine.stack, "run_layer", run_layer)
        with crossings.watched(), pytest.raises(Exception, match="failed") as failure:
            decoded(engine, NeverExit(), "project")
        assert isinstance(failure.value.__cause__, CrossingError)


@pytest.mark.parametrize("method", ["tolist", "numpy"])
def test_numbers_are_not_read_past_the_watch(method: str) -> None:
    with Crossings(), pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        getattr(PretendedTensor(torch.ones(2)), method)()


def test_an_mlp_decides_on_the_device_as_compiled_code_does() -> None:
    with pretended_engine() as (engine, _):
        decoded(engine, mlp(), "project")
        engine.submit(RAGGED[0], SAMPLING, mlp())
        engine.step()
        engine.step()
        [row] = engine._roster.rows
        assert row.last_group is not None
        assert isinstance(row.last_group.probe, DeviceProbe)
    host = AdaptiveEngine(make_model("llama"))
    host.submit(RAGGED[0], SAMPLING, mlp())
    host.step()
    host.step()
    [row] = host._roster.rows
    assert row.last_group is not None
    assert isinstance(row.last_group.probe, FusedProbe)
