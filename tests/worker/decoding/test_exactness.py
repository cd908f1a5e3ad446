"""The spine: what the engine emits is what the model says at that depth, token for token.

Shape suffixes: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offramp.controller.features import SOFTMAX_V2, BoolArray, FloatArray
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, NeverExit, ThresholdPolicy
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.decoder import Decoder
from support.exactness import assert_same, check_fill, hf_greedy
from support.models import LAYERS, VOCAB, make_model, truncated

PROMPTS = [[5, 17, 33, 2, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [60, 3, 60]]
GREEDY = SamplingParams(max_tokens=24)


@dataclass
class CoinFlipExit:
    """Leaves at random, so that every mixture of depths in a batch occurs."""

    exits: tuple[int, ...]
    seed: int = 0
    schema: None = None
    candidates_VK: None = None

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return self.rng.random(len(features_NF)) < 0.4


@contextmanager
def counted_rows(blocks: list[nn.Module]) -> Iterator[Counter[int]]:
    """Counts, outside the engine, how many decode rows each layer was called with."""
    counts: Counter[int] = Counter()

    def hook(index: int) -> Any:
        def count(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.shape[1] == 1:
                counts[index] += output.shape[0]

        return count

    handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(blocks)]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exits_off_equals_generate_alone(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    engine = AdaptiveEngine.from_pretrained(model)
    for prompt in PROMPTS:
        expected = hf_greedy(model, [prompt], GREEDY.max_tokens)
        assert_same(model, [prompt], [engine.generate(prompt, GREEDY)[0].token_ids], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exits_off_equals_generate_in_a_ragged_batch(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    engine = AdaptiveEngine.from_pretrained(model)
    completions = engine.generate(PROMPTS, GREEDY, NeverExit())
    expected = hf_greedy(model, PROMPTS, GREEDY.max_tokens)
    assert_same(model, PROMPTS, [c.token_ids for c in completions], expected)


def test_the_model_is_no_degenerate_one(family: str) -> None:
    rows = hf_greedy(make_model(family), PROMPTS, GREEDY.max_tokens)
    assert len({token for row in rows for token in row}) > 12


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(1, torch.float32), (2, torch.float32), (4, torch.float32), (2, torch.bfloat16)],
    ids=str,
)
def test_a_static_exit_equals_the_truncated_model(
    family: str, layer: int, dtype: torch.dtype
) -> None:
    model = make_model(family, dtype)
    short = truncated(model, layer)
    engine = AdaptiveEngine.from_pretrained(model)
    # The first token comes from the prompt's full-depth pass; after it, every token comes from
    # the first layers, whose cached entries the truncated model shares.
    done = [engine.generate(prompt, GREEDY, FixedExit(layer))[0] for prompt in PROMPTS]
    begun = [prompt + each.token_ids[:1] for prompt, each in zip(PROMPTS, done, strict=True)]
    # In bfloat16 a batch's padding can break a tie the other way: there each row is asked alone.
    batches = [begun] if dtype is torch.float32 else [[each] for each in begun]
    expected = [row for each in batches for row in hf_greedy(short, each, GREEDY.max_tokens - 1)]
    assert_same(short, begun, [each.token_ids[1:] for each in done], expected)
    for each in done:
        assert each.exit_layers[1:] == [layer] * (len(each.token_ids) - 1)


def test_static_exits_in_a_ragged_batch_equal_the_rows_alone(family: str) -> None:
    engine = AdaptiveEngine.from_pretrained(make_model(family))
    together = engine.generate(PROMPTS, GREEDY, FixedExit(2))
    alone = [engine.generate(prompt, GREEDY, FixedExit(2))[0] for prompt in PROMPTS]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_mixed_policies_in_a_batch_equal_the_rows_alone(family: str) -> None:
    engine = AdaptiveEngine.from_pretrained(make_model(family))
    policies: list[ExitPolicy] = [FixedExit(1), NeverExit(), FixedExit(3), FixedExit(1)]
    requests = [
        engine.submit(prompt, GREEDY, policy)
        for prompt, policy in zip(PROMPTS, policies, strict=True)
    ]
    finished: dict[str, Any] = {}
    while len(finished) < len(requests):
        engine.step(finished)
    for request, prompt, policy in zip(requests, PROMPTS, policies, strict=True):
        row = finished[request.id]
        assert row.emitted == engine.generate(prompt, GREEDY, policy)[0].token_ids


def test_executed_layer_calls_equal_the_reported_depths(family: str) -> None:
    engine = AdaptiveEngine.from_pretrained(make_model(family))
    with counted_rows(engine.stack.blocks) as counts:
        completions = engine.generate(
            [[*prompt, 1] for prompt in PROMPTS], GREEDY, CoinFlipExit((1, 2, 4))
        )
    # The first token of each row comes from the prompt's pass, which is no decode row.
    depths = [layer for c in completions for layer in c.exit_layers[1:]]
    assert sum(counts.values()) == sum(depths)
    for index in range(LAYERS):
        assert counts[index] == sum(depth > index for depth in depths)
    assert len(set(depths)) == 4  # all of 1, 2, 4 and full depth happened


def test_a_layer_finds_an_entry_at_every_position_it_reads(family: str) -> None:
    # Exited tokens are projected when a layer is about to read them, and not before.
    engine = AdaptiveEngine.from_pretrained(make_model(family), slots=1)
    update, addresses, reads = engine.kv.update, engine.kv.addresses, []

    def require_entries(keys_SGCH: torch.Tensor, span: int) -> None:
        reads.append(span)
        assert (keys_SGCH[0, :, :span].abs().sum(-1) > 0).all()

    def checked(keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        found = update(keys, values, layer)
        require_entries(found[0], engine.kv._window.runs[0].span)
        return found

    def asked() -> tuple[int, int, int]:
        # Compiled layers write the step's own entries themselves, after they have asked.
        before = int(engine.kv._window.cells_M3[0, 1])
        for keys_SGCH in engine.kv.keys_LSGCH[: run[1]][run[0] :]:
            require_entries(keys_SGCH, before)
        return addresses()

    run_layers, run = engine.stack.run_layers, [0, 0]

    def told(first: int, last: int, *rest: Any) -> torch.Tensor:
        run[:] = first, last
        return run_layers(first, last, *rest)

    engine.stack.run_layers = told  # type: ignore[method-assign,assignment]
    engine.kv.update = checked  # type: ignore[method-assign,assignment]
    engine.kv.addresses = asked  # type: ignore[method-assign]
    [completion] = engine.generate(PROMPTS[0], GREEDY, CoinFlipExit((1, 3)))
    assert len(reads) == LAYERS + completion.stats.layer_calls


def test_without_the_fill_a_static_exit_goes_wrong_later(family: str) -> None:
    """Negative control: a row that exits, then goes deep, needs the entries it skipped."""
    model = make_model(family)
    engine = AdaptiveEngine.from_pretrained(model)
    policy = CoinFlipExit((1, 2))
    with_fill = engine.generate(PROMPTS[0], GREEDY, policy)[0].token_ids
    engine = AdaptiveEngine.from_pretrained(model)
    engine.decoder = Decoder(engine.stack, engine.kv, fills=False)
    without_fill = engine.generate(PROMPTS[0], GREEDY, CoinFlipExit((1, 2)))[0].token_ids
    assert with_fill != without_fill


def test_projected_entries_are_those_of_an_unchanged_state(family: str) -> None:
    check_fill(AdaptiveEngine.from_pretrained(make_model(family)), first_layer=2)


def test_rows_that_join_and_leave_midway_do_not_disturb_the_others() -> None:
    engine = AdaptiveEngine.from_pretrained(make_model("llama"), slots=3)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, VOCAB - 1, size=rng.integers(1, 9)).tolist() for _ in range(9)]
    lengths = [SamplingParams(max_tokens=int(n)) for n in rng.integers(1, 30, size=9)]
    requests = [
        engine.submit(prompt, sampling, FixedExit(2))
        for prompt, sampling in zip(prompts, lengths, strict=True)
    ]
    finished: dict[str, Any] = {}
    engine.step(finished)
    engine.cancel(requests[1].id)
    engine.cancel(requests[8].id)
    while len(finished) < 7:
        engine.step(finished)
    assert engine.load == (0, 0)
    for index in (0, 2, 3, 4, 5, 6, 7):
        alone = engine.generate(prompts[index], lengths[index], FixedExit(2))[0].token_ids
        assert finished[requests[index].id].emitted == alone


def test_the_softmax_probe_runs_one_head_per_emitted_token_less() -> None:
    """A row that leaves on whole-vocabulary confidence has had its head already."""
    model = make_model("llama")
    engine = AdaptiveEngine.from_pretrained(model)
    rows = Counter[str]()
    model.lm_head.register_forward_hook(
        lambda _, args, output: rows.update(head=output.reshape(-1, output.shape[-1]).shape[0])
    )
    always = ThresholdPolicy((2,), SOFTMAX_V2, "margin", 0.0)
    leaving = engine.generate(PROMPTS, GREEDY, always)
    assert rows["head"] == sum(len(c.token_ids) for c in leaving)
    fixed = engine.generate(PROMPTS, GREEDY, FixedExit(2))
    assert [c.token_ids for c in leaving] == [c.token_ids for c in fixed]
