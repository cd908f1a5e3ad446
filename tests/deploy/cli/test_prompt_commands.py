"""``offramp train --for prompts``, as it is typed: cut off, gone on with, served; and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.agents.placing.contenders import CHOSEN, load_contenders
from offramp.agents.prompting import lesson
from offramp.agents.prompting.prompt_checkpoint import PromptCheckpoint
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, EngineConfig, PromptExits, SamplingParams
from support.models import REFERENCE
from support.recordings import make_corpus

LAYERS, PROMPT, KEPT = 12, 48, {"keep_first": 2, "keep_last": 6}
SETTINGS = f"""
train_documents = 3
validation_documents = 2
test_documents = 2
prompt_tokens = {PROMPT}
following = 4
keep_first = 2
keep_last = 6
exits = [2, 5]
weight = 1000.0
steps = 256
shown = 128
"""
"""Time is all that counts, so that the best of these policies is known beforehand."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("prompts") / "corpus", documents=60)


@pytest.fixture
def write(tmp_path: Path, corpus: Path) -> Any:
    def write(settings: str) -> Path:
        path = tmp_path / "prompts.toml"
        path.write_text(f'model = "{REFERENCE}"\ncorpus = "{corpus}"\n{settings}')
        return path

    return write


def cut_off(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_lesson_goes_on_where_it_was_cut_off_and_its_choice_serves(
    cli: Any, tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ("train", "--for", "prompts", "--config", write(SETTINGS), "--out", out)
    with monkeypatch.context() as patched:
        patched.setattr(lesson, "train_prompt_policy", cut_off)
        _, said = cli(*arguments)
    assert "cut off" in said
    assert not (out / CHOSEN).exists()
    before = PromptCheckpoint.load(out)
    assert before.readings
    assert not before.agents
    status, said = cli(*arguments, "--resume")
    assert status == 0, said
    after = PromptCheckpoint.load(out)
    assert after.prices == before.prices
    for name, readings in before.readings.items():
        assert all(map(torch.equal, readings, after.readings[name]))

    contenders = load_contenders(out)
    families = ["full depth", *["fixed exit"] * (LAYERS - 1), "far ahead first", "PPO for prompts"]
    assert [each.family for each in contenders] == families
    learned = contenders[-1].policy
    assert isinstance(learned, MlpPolicy)
    assert learned.exits == (2, 5)
    told = json.loads((out / "prompts.json").read_text())
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == [*[each.name for each in contenders], "as many at random"]
    assert rows["full depth"]["saved"] == rows["full depth"]["loss_more"]["value"] == 0
    skipped = (LAYERS - 3) / LAYERS * (PROMPT - sum(KEPT.values())) / PROMPT
    assert rows["fixed exit 3"]["saved"] == pytest.approx((1 - told["fill"]) * skipped)
    timed = [name for name, row in rows.items() if row["time"] is not None]
    assert timed == [
        "fixed exit 1", contenders[-2].name, "PPO for prompts seed 0", "as many at random",
    ]  # fmt: skip
    assert all(rows[name]["wall"]["value"] > 0 for name in timed)

    # Nothing saves more than all leaving at once: a fixed rule wins, and the command says so.
    assert told["chosen"] == "fixed exit 1"
    assert "chosen on validation prompts: fixed exit 1;" in said
    assert "fixed exit 1 ←" in said
    assert "learning is ahead" not in said
    prompts = PromptExits.load(out / CHOSEN, **KEPT)
    assert prompts.policy == FixedExit(1)
    for served in (prompts, PromptExits.load(out / "13", **KEPT)):
        engine = AdaptiveEngine.from_pretrained(
            REFERENCE, config=EngineConfig(prefill="exits", prompts=served)
        )
        [done] = engine.generate([[7] * PROMPT], SamplingParams(max_tokens=1))
        assert done.stats.prompt_calls < LAYERS * PROMPT

    refused = cli.refused(
        *arguments[:-3], write(SETTINGS + "seeds = [1]\n"), *arguments[-2:], "--resume"
    )
    assert refused.startswith("seeds: is (1,), and (0,) in the checkpoint")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--traces", "x"), "traces: does not go with --for prompts"),
        (("--insight",), "insight: does not go with --for prompts"),
        (("--exits", "12"), "exits: (12,) do not ascend within [1, 11]"),
        (("--exits", "6,3"), "exits: '6,3' does not ascend"),
        (("--seeds", "0,0"), "seeds: (0, 0) are not one or more numbers"),
        (("--weight", "0"), "weight: 0.0 is no weight"),
        (("--model", "no/such"), "model: "),
        (("--resume",), "resume: "),
    ],
)
def test_options_that_do_not_go_with_prompts_are_named(
    cli: Any, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    given = ("train", "--for", "prompts", "--model", REFERENCE, "--out", tmp_path / "out")
    assert cli.refused(*given, *arguments).startswith(told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("prompt_tokens = 36", "prompt_tokens: 36 are no more than the 36 that are kept"),
        (
            "prompt_tokens = 9999",
            "prompt_tokens: 9999, and what follows, exceed the model's context",
        ),
        ("prompt_tokens = 800", "corpus: has 0 train documents of 1624 tokens or more"),
        ("test_documents = 1", "test_documents: 1 is below 2"),
        ("following = 0", "following: 0 is below 1"),
        ("keep_first = -1", "keep_first: -1 is below 0"),
        ("learning_rate = 0", "learning_rate: 0.0 is not above 0"),
        ("lines = 3", "lines: is no known option"),
    ],
)
def test_a_file_with_errors_is_refused(
    cli: Any, tmp_path: Path, write: Any, settings: str, told: str
) -> None:
    arguments = ("train", "--for", "prompts", "--config", write(settings + "\n"))
    assert cli.refused(*arguments, "--out", tmp_path / "out").startswith(told)
    assert not (tmp_path / "out").exists()


def test_the_price_of_time_is_a_matter_of_prompts_alone(cli: Any, tmp_path: Path) -> None:
    told = cli.refused("train", "--traces", tmp_path, "--weight", "2", "--out", tmp_path / "out")
    assert told.startswith("weight: means nothing without --for prompts")
