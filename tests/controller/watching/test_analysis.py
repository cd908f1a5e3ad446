"""When a canary passes, holds or fails, and whether its intervals hold at every look."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.watching.analysis import StepOutcome, judge, judge_shadow
from offramp.controller.watching.quantiles import BUCKETS, bucket_of
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import (
    SEVERAL,
    Tally,
    add_up,
    tallies_from_json,
    tallies_to_json,
)


def tally(
    *,
    pace_s: float = 0.01,
    depth: float = 8.0,
    spread: float = 0.1,
    late_s: float = 0.02,
    **changes: Any,
) -> Tally:
    """Requests whose seconds and layers per token lie around a mean."""
    requests = changes.get("requests", 100)
    times = [0] * BUCKETS
    times[bucket_of(late_s)] = 2000
    values: dict[str, Any] = {
        "tokens": 5000, "seconds": 50.0, "layers": 40_000, "requests": requests,
        "audited": 500, "disagreed": 10, "early": 4000,
        "paces": requests * pace_s, "paces_squared": requests * pace_s**2 * (1 + spread**2),
        "depths": requests * depth, "depths_squared": requests * depth**2 * (1 + spread**2),
        "firsts": times, "gaps": times, "exits": {"6": 4000, "12": 1000},
    }  # fmt: skip
    return Tally(**(values | changes))


STABLE = tally(audited=0, disagreed=0)
BOUNDS = Steps(max_layers=1.0)


@pytest.mark.parametrize(
    ("canary", "stable", "outcome", "reason"),
    [
        (tally(), STABLE, StepOutcome.PASS, "seconds per token 1.00 times the stable release's"),
        (tally(tokens=1999), STABLE, StepOutcome.HOLD, "1999 tokens of the canary, 2000 are asked"),
        (tally(), tally(tokens=7), StepOutcome.HOLD, "7 tokens of the stable release"),
        (tally(requests=29), STABLE, StepOutcome.HOLD, "29 requests that ended of the canary, 30"),
        (tally(audited=199), STABLE, StepOutcome.HOLD, "199 audited tokens, 200 are asked for"),
        (tally(disagreed=115), STABLE, StepOutcome.HOLD, "too wide to tell from 25.0%"),
        (
            tally(disagreed=250),
            STABLE,
            StepOutcome.FAIL,
            "of what is audited (500 tokens), 25.0% are",
        ),
        (
            tally(tokens=9, audited=40, disagreed=40),
            STABLE,
            StepOutcome.FAIL,
            "full depth disagrees",
        ),
        (tally(failures=200), STABLE, StepOutcome.FAIL, "the policy fails on"),
        (
            tally(pace_s=0.014),
            STABLE,
            StepOutcome.FAIL,
            "seconds per token 1.40 times the stable release's (",
        ),
        (tally(pace_s=0.0112), STABLE, StepOutcome.HOLD, "seconds per token 1.12 times"),
        (
            tally(pace_s=0.0112, tokens=300_000),
            STABLE,
            StepOutcome.FAIL,
            "are allowed; 300000 tokens should have told",
        ),
        (tally(late_s=0.08), STABLE, StepOutcome.FAIL, "99% of first tokens within 4.00 times"),
        (
            tally(late_s=0.08, firsts=STABLE.firsts),
            STABLE,
            StepOutcome.FAIL,
            "99% of later tokens within 4.00 times",
        ),
        (
            tally(depth=10.0),
            STABLE,
            StepOutcome.FAIL,
            "layers per token 1.25 times the stable release's",
        ),
        (tally(audited=0, disagreed=0), STABLE, StepOutcome.HOLD, "0 audited tokens"),
        (
            tally(audited=0, disagreed=0, early=0),
            STABLE,
            StepOutcome.PASS,
            "no token left early, seconds per token 1.00",
        ),
        (
            tally(tokens=300_000, audited=9, disagreed=0, early=9),
            STABLE,
            StepOutcome.FAIL,
            "9 audited tokens, 200 are asked for; 300000 tokens should have told",
        ),
        (
            tally(audited=0, disagreed=0, verified=9),
            STABLE,
            StepOutcome.PASS,
            "lossless, seconds per token 1.00 times",
        ),
        (
            tally(audited=0, disagreed=0, verified=9, pace_s=0.014),
            STABLE,
            StepOutcome.FAIL,
            "seconds per token 1.40 times",
        ),
    ],
)
def test_outcomes(canary: Tally, stable: Tally, outcome: StepOutcome, reason: str) -> None:
    found = judge(BOUNDS, canary, stable)
    assert found.outcome is outcome, found
    assert reason in found.reason


METER = "attributed: RAPL package-0"


def read(token_j: float, meter: str = METER, batches: int = 100) -> dict[str, Any]:
    """Energy of a track, batch by batch around a mean."""
    squared = batches * token_j**2 * 1.01
    return {
        "meter": meter, "batches": batches, "joules": batches * token_j, "joules_squared": squared
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "outcome", "reason"),
    [
        (read(0.8), read(1.0), StepOutcome.PASS, "seconds per token 1.00"),
        (
            read(1.3),
            read(1.0),
            StepOutcome.FAIL,
            f"joules per token ({METER}) 1.30 times the stable release's",
        ),
        (read(1.02), read(1.0), StepOutcome.HOLD, "joules per token"),
        ({}, read(1.0), StepOutcome.HOLD, "energy of the canary is not known: too few tokens"),
        (read(1.0), {}, StepOutcome.HOLD, "energy of the stable release is not known"),
        (read(1.0), read(1.0, "modelled: 3 W"), StepOutcome.HOLD, "cannot be compared: attributed"),
        (read(1.0, SEVERAL), read(1.0), StepOutcome.HOLD, "it was read by several meters"),
    ],
)
def test_energy_is_judged_where_it_is_bounded(
    ours: dict[str, Any], theirs: dict[str, Any], outcome: StepOutcome, reason: str
) -> None:
    canary, stable = tally(**ours), tally(audited=0, disagreed=0, **theirs)
    found = judge(Steps(max_energy=1.0), canary, stable)
    assert found.outcome is outcome, found
    assert reason in found.reason
    assert judge(Steps(), canary, stable).outcome is StepOutcome.PASS  # nobody asked about it


def test_what_other_bounds_say_is_not_held_up_by_missing_energy() -> None:
    found = judge(Steps(max_energy=1.0), tally(pace_s=0.014), STABLE)
    assert found.outcome is StepOutcome.FAIL


def test_energy_of_different_meters_is_never_added() -> None:
    parts = [tally(**read(0.5)), tally(**read(1.5)), tally()]
    assert add_up(0, parts).token_j == pytest.approx(1.0)
    total = add_up(0, [*parts, tally(**read(1.0, "modelled: 3 W"))])
    assert (total.meter, total.token_j) == (SEVERAL, None)


def test_tallies_add_up_by_release_and_survive_their_text() -> None:
    parts = [tally(generation=3), tally(generation=3, disagreed=1), tally(generation=1)]
    total = add_up(3, parts)
    assert (total.tokens, total.disagreed, total.speed, total.depth) == (10_000, 11, 100.0, 8.0)
    assert total.exits == {"6": 8000, "12": 2000}
    assert (total.requests, round(total.paces, 6), sum(total.gaps)) == (200, 2.0, 4000)
    assert add_up(9, parts) == Tally(generation=9)
    assert tallies_from_json(tallies_to_json(parts)) == tuple(parts)


def test_workers_that_count_no_early_tokens_are_not_taken_for_full_depth() -> None:
    values = asdict(tally(early=0))
    said = {name: values[name] for name in ("generation", "tokens", "seconds", "layers")}
    said |= dict.fromkeys(("failures", "audited", "disagreed", "verified"), 0)
    (read,) = tallies_from_json(json.dumps([said]))
    assert (read.early, read.requests, sum(read.gaps)) == (5000, 0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[3]",
        "[{}]",
        '[{"generation": -1}]',
        tallies_to_json([tally(seconds=-1.0)]),
        tallies_to_json([tally(gaps=[1])]),
        tallies_to_json([tally(exits={"last": 1})]),
        tallies_to_json([tally(exits={"6": -1})]),
        tallies_to_json([tally(exits={str(n): 1 for n in range(1000)})]),
    ],
)
def test_other_texts_are_no_tallies(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        tallies_from_json(text)


def test_steps_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "steps.yaml"
    path.write_text("percents: [5, 50, 100]\nmax_disagreement: 0.1 # of audited tokens\n")
    steps = Steps.load(path)
    assert (steps.max_disagreement, steps.min_audited) == (0.1, 200)
    assert [steps.after(percent) for percent in (0, 5, 20, 50, 100)] == [5, 50, 50, 100, None]


@pytest.mark.parametrize(
    ("canary", "outcome", "reason"),
    [
        (tally(pace_s=9.0), StepOutcome.PASS, "80% of the tokens left early or were drafted, "),
        (tally(), StepOutcome.PASS, "after 7.2 layers on average"),
        (tally(exits={"6:int4": 5}), StepOutcome.PASS, "after 6.0 layers on average"),
        (tally(tokens=7), StepOutcome.HOLD, "7 tokens of the canary, 2000 are asked for"),
        (tally(audited=199), StepOutcome.HOLD, "199 audited tokens, 200 are asked for"),
        (tally(tokens=200_000, audited=199), StepOutcome.FAIL, "200000 tokens should have told"),
        (tally(disagreed=300), StepOutcome.FAIL, "full depth disagrees with "),
        (tally(failures=400), StepOutcome.FAIL, "the policy fails on "),
        (tally(audited=0, disagreed=0, verified=9), StepOutcome.PASS, "lossless, "),
    ],
)
def test_a_canary_in_shadow_is_judged_by_audits_alone(
    canary: Tally, outcome: StepOutcome, reason: str
) -> None:
    found = judge_shadow(BOUNDS, canary)
    assert found.outcome is outcome
    assert reason in found.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("percents: [5, 5]", "percents: [5, 5] is not a list of numbers in [0, 100], ascending"),
        ("percents: [50, 101]", "percents: "),
        ("percents: []", "percents: "),
        ("percents: 5", "percents: 5 is not a list"),
        ("max_disagreement: 1.5", "max_disagreement: 1.5 is not a number in (0, 1)"),
        ("min_audited: many", "min_audited: 'many' is not an integer from 0 on"),
        ("min_speed: 0", "min_speed: 0 is not a number above 0"),
        ("max_gap_p99: fast", "max_gap_p99: 'fast' is not a number above 0 or null"),
        ("max_tokens: 9", "max_tokens: 9 is below min_tokens, 2000"),
        ("max_lateness: 3", "max_lateness: is no known setting. Use percents, min_tokens"),
        ("- 5\n- 25", "steps: "),
        ("percents: [5", "steps: "),
        ("a: !!python/object/apply:os.getpid []", "steps: "),
    ],
)
def test_a_file_with_errors_is_refused_by_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "steps.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        Steps.load(path)
    assert said in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        Steps.load(tmp_path / "nowhere.yaml")
