"""Every schema has a probe; one row is computed as many are; norms of every form are recovered."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import (
    CANDIDATES_V1,
    SCHEMAS,
    SKETCH_V1,
    SOFTMAX_V2,
    STATE_V1,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.protocols import ThresholdPolicy
from offramp.research.probe_costs import probe_costs
from offramp.worker import AdaptiveEngine
from offramp.worker.model.families import stack_for
from offramp.worker.model.stack import LayerStack
from offramp.worker.probes import (
    PROBES,
    Candidates,
    Probe,
    ProbeFactory,
    ProbeInputs,
    Readout,
    Sketch,
    SketchProbe,
    make_probe,
)
from offramp.worker.probes.candidates.scorers import DeviceScorer, HostScorer, Scorer
from offramp.worker.probes.candidates.successors import NgramIndex, successor_table
from offramp.worker.probes.readout import FinalNorm
from offramp.worker.profiling.samples import random_policy
from offramp.worker.recording.recorder import record_document
from support.models import VOCAB, make_model

KINDS = (CANDIDATES_V1, SKETCH_V1, STATE_V1, SOFTMAX_V2)
POSITIONS = np.asarray([3, 50, 7], np.int32)


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    return stack_for(make_model("llama"))


@pytest.fixture(scope="module")
def table_VK() -> IntArray:
    tokens = np.random.default_rng(3).integers(1, 20, size=60).tolist()
    return successor_table([tokens], VOCAB, 16)


@pytest.fixture(scope="module")
def states() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(3, 48) + 0.2 for _ in range(4)]


def inputs(stack: Any, table_VK: IntArray, x_ND: Tensor, rows: slice) -> ProbeInputs:
    readout = Readout(stack)
    return ProbeInputs(
        readout, x_ND[rows], POSITIONS[rows], 3, table_VK[[5, 9, 11]][rows], table_VK
    )


def walk(probe: Probe, states: list[Tensor], rows: slice) -> FloatArray:
    seen = [probe.features(layer, x_ND[rows]) for layer, x_ND in enumerate(states[1:], 1)]
    return np.stack(seen)


def test_every_schema_has_a_probe() -> None:
    assert set(PROBES) == set(SCHEMAS)


def test_an_unknown_schema_is_refused(stack: Any, table_VK: IntArray, states: list[Tensor]) -> None:
    schema = FeatureSchema("tea_leaves", 1, ("pattern",))
    with pytest.raises(ConfigError, match="tea_leaves"):
        make_probe(schema, inputs(stack, table_VK, states[0], slice(None)))


@pytest.mark.parametrize("schema", KINDS, ids=lambda schema: schema.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_row_is_computed_as_many_are(
    schema: FeatureSchema, dtype: torch.dtype, table_VK: IntArray, states: list[Tensor]
) -> None:
    stack = stack_for(make_model("llama", dtype))
    typed = [x_ND.to(dtype) for x_ND in states]
    everyone = slice(None)
    together = walk(
        make_probe(schema, inputs(stack, table_VK, typed[0], everyone)), typed, everyone
    )
    assert together.shape == (3, 3, schema.width)
    assert together.dtype == np.float32
    for row in range(3):
        only = slice(row, row + 1)
        alone = walk(make_probe(schema, inputs(stack, table_VK, typed[0], only)), typed, only)
        np.testing.assert_allclose(alone[:, 0], together[:, row], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("schema", KINDS, ids=lambda schema: schema.name)
def test_rows_that_stay_go_on_as_if_alone(
    schema: FeatureSchema, stack: Any, table_VK: IntArray, states: list[Tensor]
) -> None:
    probe = make_probe(schema, inputs(stack, table_VK, states[0], slice(None)))
    probe.features(1, states[1])
    probe.keep(np.asarray([False, True, False]))
    got = probe.features(2, states[2][1:2])
    alone = make_probe(schema, inputs(stack, table_VK, states[0], slice(1, 2)))
    alone.features(1, states[1][1:2])
    np.testing.assert_allclose(got, alone.features(2, states[2][1:2]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schema", KINDS, ids=lambda schema: schema.name)
def test_a_state_may_be_overwritten_and_may_be_zero(
    schema: FeatureSchema, stack: Any, table_VK: IntArray, states: list[Tensor]
) -> None:
    only = slice(0, 1)
    expected = walk(make_probe(schema, inputs(stack, table_VK, 0 * states[0], only)), states, only)
    assert np.isfinite(expected).all()
    buffer = torch.zeros(1, 48)
    probe = make_probe(schema, inputs(stack, table_VK, buffer, only))
    for layer, x_ND in enumerate(states[1:], 1):
        buffer.copy_(x_ND[only])
        np.testing.assert_allclose(probe.features(layer, buffer), expected[layer - 1], atol=1e-6)


@pytest.mark.parametrize("schema", KINDS, ids=lambda schema: schema.name)
def test_what_is_recorded_is_what_live_probes_compute(
    schema: FeatureSchema, table_VK: IntArray
) -> None:
    engine = AdaptiveEngine.from_pretrained(make_model("qwen3"))
    tokens = np.random.default_rng(4).integers(1, 20, size=30).tolist()
    chunk = record_document(engine.stack, "d", tokens, (1, 3), table_VK, schema)
    seen: list[FloatArray] = []

    class WatchingThreshold(ThresholdPolicy):
        def leave(self, features_NF: FloatArray) -> np.ndarray:
            seen.append(features_NF.copy())
            return np.zeros(len(features_NF), np.bool_)

    watcher = WatchingThreshold((1, 3), schema, "depth", 2.0, table_VK)
    engine.submit(tokens[:1], policy=watcher, forced=tokens[1:])
    while engine.load != (0, 0):
        engine.step()
    live = np.concatenate(seen).reshape(-1, 2, schema.width)
    np.testing.assert_allclose(chunk.features_TEF[1 : 1 + len(live)], live, atol=2e-4, rtol=1e-3)


def scorers(readout: Readout, tokens_NK: IntArray, x_ND: Tensor) -> tuple[Scorer, Scorer]:
    """Compiled, and through the model's own norm."""
    assert readout.norm is not None
    place_N = np.full(len(x_ND), 0.25, np.float32)
    return (
        HostScorer.of_rows(readout, tokens_NK, x_ND, place_N, 3),
        DeviceScorer(readout, tokens_NK, x_ND, place_N, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_compiled_features_equal_those_through_the_models_norm(
    family: str, dtype: torch.dtype, table_VK: IntArray, states: list[Tensor]
) -> None:
    typed = [x_ND.to(dtype) for x_ND in states]
    readout = Readout(stack_for(make_model(family, dtype)))
    host, device = scorers(readout, table_VK[[5, 9, 11]], typed[0])
    # The model's norm rounds to bfloat16, the compiled one does not.
    rtol, atol = (1e-4, 1e-4) if dtype is torch.float32 else (0.05, 0.02)
    for depth, x_ND in enumerate(typed[1:], 1):
        one, other = host.features(depth / 4, x_ND), device.features(depth / 4, x_ND)
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def test_compiled_features_of_nan_are_nan(
    stack: Any, table_VK: IntArray, states: list[Tensor]
) -> None:
    host, _ = scorers(Readout(stack), table_VK[[5, 9, 11]], states[0])
    spoiled_ND = states[1].clone()
    spoiled_ND[1, 7] = float("nan")
    features_NF = host.features(0.5, spoiled_ND)
    assert np.isfinite(features_NF[[0, 2]]).all()
    assert np.isnan(features_NF[1, :4]).any()


class GemmaNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def layer_norm(width: int) -> nn.Module:
    norm = nn.LayerNorm(width, eps=1e-5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


def norm_stack(norm: Any, width: int = 48) -> Any:
    head_VD = torch.randn(VOCAB, width)
    return SimpleNamespace(
        norm=lambda x: norm(x).detach(),
        head_rows=lambda tokens_NK: head_VD[tokens_NK],
        width=width,
        vocab=VOCAB,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("make", [GemmaNorm, layer_norm], ids=["1+w", "layer norm"])
def test_norms_of_other_families_are_recovered(make: Any, states: list[Tensor]) -> None:
    torch.manual_seed(0)
    fake = norm_stack(make(48))
    readout = Readout(fake)
    assert readout.norm is not None
    expected = fake.norm(states[1]).numpy()
    np.testing.assert_allclose(readout.norm.rows(states[1].numpy()), expected, atol=2e-5)
    tokens_NK = np.arange(12, dtype=np.int32).reshape(3, 4)
    for rows in (slice(0, 3), slice(1, 2)):
        host, device = scorers(readout, tokens_NK[rows], states[0][rows])
        got, wanted = (each.features(0.5, states[1][rows]) for each in (host, device))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_norm_of_another_form_is_left_to_the_model() -> None:
    assert FinalNorm.of(norm_stack(torch.tanh)) is None
    assert FinalNorm.of(norm_stack(nn.Identity())) is None
    assert FinalNorm.of(norm_stack(lambda x: x * 0)) is None


def test_a_sketch_of_full_rank_scores_as_the_head_does(
    stack: Any, table_VK: IntArray, states: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.worker.probes.sketch.RANK", 48)
    readout = Readout(stack)
    sketch = Sketch.of(readout, table_VK)
    probe = SketchProbe(readout, sketch, POSITIONS, 3)
    expected = stack.logits(states[1])[:, torch.from_numpy(sketch.tokens_M).long()].numpy()
    np.testing.assert_allclose(probe.scores(states[1]), expected, rtol=1e-3, atol=1e-3)


def test_a_sketch_is_deterministic_and_names_frequent_tokens(
    stack: Any, table_VK: IntArray
) -> None:
    first, second = (Sketch.of(Readout(stack), table_VK) for _ in range(2))
    assert first.left_MR.tobytes() == second.left_MR.tobytes()
    counts = np.bincount(table_VK.ravel(), minlength=VOCAB)[first.tokens_M]
    assert (np.diff(counts) <= 0).all()


def test_a_sketch_is_computed_when_its_policy_arrives(stack: Any, table_VK: IntArray) -> None:
    bench = ProbeFactory(stack)
    bench.prepare(ThresholdPolicy((1,), SKETCH_V1, "top1", 0.5, table_VK))
    first = bench.readout.derived(Sketch.of, table_VK)
    assert bench.readout.derived(Sketch.of, table_VK) is first


def test_state_columns_equal_their_definitions(
    stack: Any, table_VK: IntArray, states: list[Tensor]
) -> None:
    probe = make_probe(STATE_V1, inputs(stack, table_VK, states[0], slice(None)))
    probe.features(1, states[1])
    got = probe.features(2, states[2])
    for row in range(3):
        h0, h1, h2 = (x_ND[row].double() for x_ND in states[:3])
        rms = h2.pow(2).mean().sqrt()
        expected = [
            torch.cosine_similarity(h2, h1, dim=0),
            (h2.norm() / h1.norm()).log(),
            (h2 - h1).norm() / h2.norm(),
            torch.cosine_similarity(h2 - h1, h1 - h0, dim=0),
            h2.mean() / rms,
            rms.log(),
            (h2.abs().max() / rms).log(),
            2 / stack.layers,
            int(POSITIONS[row]) / stack.context,
        ]
        np.testing.assert_allclose(got[row], [float(e) for e in expected], rtol=1e-4, atol=1e-5)


def test_a_sketch_policy_without_a_table_is_refused() -> None:
    engine = AdaptiveEngine.from_pretrained(make_model("llama"))
    with pytest.raises(RequestError, match="candidate table"):
        engine.submit([1], policy=ThresholdPolicy((1,), SKETCH_V1, "top1", 0.5))


def test_every_schema_has_a_measured_cost(table_VK: IntArray) -> None:
    engine = AdaptiveEngine.from_pretrained(make_model("llama"))
    costs = probe_costs(engine, table_VK, context=8, repeats=3)
    assert set(costs) == {schema.name for schema in SCHEMAS.values()}
    assert all(cost.layers > 0 and cost.share > 0 for cost in costs.values())


def test_the_bench_builds_what_the_policy_reads(stack: Any, table_VK: IntArray) -> None:
    bench = ProbeFactory(stack)
    policy = ThresholdPolicy((1, 2), CANDIDATES_V1, "top1", 0.5, table_VK)
    ngrams = [NgramIndex([1, 2]), NgramIndex([3])]
    probe = bench.probe(policy, ngrams, torch.randn(2, 48), POSITIONS[:2])
    assert probe.features(1, torch.randn(2, 48)).shape == (2, CANDIDATES_V1.width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_fused_probe_computes_and_decides_as_probe_and_policy_do(
    dtype: torch.dtype, rows: int, table_VK: IntArray
) -> None:
    stack = stack_for(make_model("llama").to(dtype))
    bench = ProbeFactory(stack)
    policy = random_policy(CANDIDATES_V1, (1, 2, 3), table_VK)
    ngrams = [NgramIndex([1, 2, 3, 1, 2]), NgramIndex([4]), NgramIndex([5, 4])][:rows]
    fused = bench.fused_probe(policy, rows)
    assert fused is not None
    for token in range(12):  # each as if there had been none before
        x_LND = torch.randn(4, rows, stack.width).to(dtype)
        drafted: list[list[int]] = [[7] * (token % 2), [], [3, 9]][:rows]
        positions = [5 + token, 1, 3][:rows]
        probe = bench.probe(policy, ngrams, x_LND[0], np.array(positions), drafted)
        fused.begin(ngrams, drafted, x_LND[0], positions)
        expected_NF = probe.features(1, x_LND[1])
        np.testing.assert_array_equal(fused.features(1, x_LND[1]), expected_NF)
        np.testing.assert_array_equal(fused.best_N(), cast(Candidates, probe).best_N())
        here = list(range(rows))
        for layer in (2, 3):
            x_ND = x_LND[layer, here]
            logits_N = policy.logits(probe.features(layer, x_ND)).copy()
            # Sums in another order move a logit by less than this.
            near = 1e-5 if token % 2 else -1e-5
            policy.threshold = float(np.sort(logits_N)[token % len(here)]) + near
            leave_N = logits_N > policy.threshold
            assert fused.leaving(layer, x_ND) == (np.flatnonzero(leave_N).tolist(), [])
            probe.keep(~leave_N)
            here = [row for row, leaves in zip(here, leave_N, strict=True) if not leaves]
            if not here:
                break


def test_of_fused_rows_only_the_one_that_is_not_finite_fails(table_VK: IntArray) -> None:
    stack = stack_for(make_model("llama"))
    policy = random_policy(CANDIDATES_V1, (1, 2), table_VK)
    fused = ProbeFactory(stack).fused_probe(policy, 3)
    assert fused is not None
    x_ND = torch.randn(3, stack.width)
    fused.begin([NgramIndex([1])] * 3, [()] * 3, x_ND, [1, 1, 1])
    x_ND[1, 0] = float("nan")
    policy.threshold = -math.inf
    assert fused.leaving(1, x_ND) == ([0, 2], [1])


def test_what_a_fused_probe_cannot_read_is_left_to_the_others(table_VK: IntArray) -> None:
    bench = ProbeFactory(stack_for(make_model("llama")))
    assert bench.fused_probe(ThresholdPolicy((1,), SOFTMAX_V2, "top1", 0.5), 1) is None
    double = ProbeFactory(stack_for(make_model("llama").to(torch.float64)))
    policy = ThresholdPolicy((1,), CANDIDATES_V1, "top1", 0.5, table_VK)
    assert double.fused_probe(policy, 1) is None
