"""States of the frozen model: computed in the first pass alone, the same ones read in later ones.

Shape suffixes: B rows, T tokens, N = B·T, D width.
"""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.agents.recording.documents import Document
from offramp.agents.tuning import state_feed
from offramp.agents.tuning.distil import states_at
from offramp.agents.tuning.state_feed import STATES, StateFeed, States
from offramp.agents.tuning.stream import WindowStream
from offramp.agents.tuning.tune_config import TuneConfig
from offramp.controller.errors import ConfigError
from offramp.worker.model.families import HFStack, stack_for
from support.models import VOCAB, make_model

EXITS = (1, 3)
ROWS, LENGTH = 2, 4
CONFIG = TuneConfig(model="unread", steps=40, batch_tokens=ROWS * LENGTH, length=LENGTH)
DOCUMENTS = [Document.of(chr(ord("a") + i) * (3 * i + 5), f"{i}.py") for i in range(5)]
TOKENS = sum(len(each.text) for each in DOCUMENTS)
BATCHES = TOKENS // CONFIG.batch_tokens


def streams() -> WindowStream:
    def encode(document: Document) -> list[int]:
        first = ord(document.text[0])
        return [(7 * first + 3 * place) % VOCAB for place in range(len(document.text))]

    return WindowStream(DOCUMENTS, encode, None, rows=ROWS, length=LENGTH, seed=0)


@pytest.fixture(scope="module")
def stack() -> HFStack:
    return stack_for(make_model("llama", torch.bfloat16))


def feed(stack: HFStack, folder: Path, config: TuneConfig = CONFIG) -> StateFeed:
    return StateFeed(config, stack, EXITS, streams, TOKENS, folder)


def windows(steps: list[States]) -> list[bytes]:
    """All that is known of each window, over all places."""
    found = []
    for states, last_ND in steps:
        places = torch.stack([*(states[layer] for layer in EXITS), last_ND]).float()
        found += [part.numpy().tobytes() for part in torch.split(places, LENGTH, dim=1)]
    return found


def test_later_passes_read_what_the_first_computed(
    stack: HFStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def counted(*arguments: Any) -> States:
        computed.append(1)
        return states_at(*arguments)

    monkeypatch.setattr(state_feed, "states_at", counted)
    given = feed(stack, tmp_path)
    assert given.plan == f"states of {BATCHES} steps are kept, 0.00 GB"
    steps = [given.next(step) for step in range(3 * BATCHES)]
    assert len(computed) == BATCHES
    again = streams()
    for states, last_ND in steps[:BATCHES]:
        fresh, fresh_last_ND = states_at(stack, again.next(), EXITS)
        assert torch.equal(last_ND, fresh_last_ND)
        assert all(torch.equal(states[layer], fresh[layer]) for layer in EXITS)
    passes = [windows(steps[i * BATCHES : (i + 1) * BATCHES]) for i in range(3)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2])
    assert passes[0] != passes[1] != passes[2]
    assert (tmp_path / STATES).stat().st_size == given.size
    given.remove()
    assert not (tmp_path / STATES).exists()


@pytest.mark.parametrize("stopped_after", [BATCHES - 2, BATCHES + 3])
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_feed_goes_on_where_another_was(
    stack: HFStack, tmp_path: Path, stopped_after: int, is_lost: bool
) -> None:
    straight = feed(stack, tmp_path / "straight")
    expected = windows([straight.next(step) for step in range(2 * BATCHES)])
    cut = feed(stack, tmp_path / "cut")
    for step in range(stopped_after):
        cut.next(step)
    cut.settle()
    if is_lost:
        (tmp_path / "cut" / STATES).unlink()
    again = feed(stack, tmp_path / "cut")
    again.seek(cut.position, stopped_after)
    rest = windows([again.next(step) for step in range(stopped_after, 2 * BATCHES)])
    assert rest == expected[stopped_after * ROWS :]


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"steps": BATCHES}, "read once"), ({"states_gb": 1e-9}, "exceed --states-gb")],
)
def test_states_that_nobody_reads_or_that_are_too_many_are_not_kept(
    stack: HFStack, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    given = feed(stack, tmp_path, replace(CONFIG, **changes))
    assert given.plan.endswith(told)
    for step in range(2 * BATCHES):
        given.next(step)
    assert not (tmp_path / STATES).exists()


def test_a_disk_without_room_is_named_before_anything_is_computed(
    stack: HFStack, tmp_path: Path
) -> None:
    given, limits = feed(stack, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (given.size // 2, limits[1]))
    try:
        with pytest.raises(
            ConfigError, match=r"cannot have its .* GB \(File too large\)"
        ) as caught:
            given.next(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.field == "states_gb"
    assert not (tmp_path / STATES).exists()


def test_more_steps_fit_where_later_passes_are_read(stack: HFStack, tmp_path: Path) -> None:
    given = feed(stack, tmp_path)
    assert given.steps_within(1e-9, lambda _: None) == 1
    kept = feed(stack, tmp_path).steps_within(0.5, lambda _: None)
    config = replace(CONFIG, states_gb=0.0)
    assert kept > feed(stack, tmp_path, config).steps_within(0.5, lambda _: None) > BATCHES
