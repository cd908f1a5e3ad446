"""A whole tournament on the reference model: two seeds, resumed, and its pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.agents.evaluation.archive import plain_scores
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.protocol import AssessConfig, Findings
from offramp.agents.evaluation.scores import AGREEMENT
from offramp.controller.errors import ConfigError
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.research.comparisons import comparisons, matched_points
from offramp.research.hindsight import measure_oracle
from offramp.research.tournament import (
    TournamentConfig,
    gather,
    key_of,
    loaded,
    measure_energy,
    run_tournament,
    runs_of,
)
from offramp.worker.spec import WorkerSpec
from support.models import REFERENCE

CONTENDERS: list[tuple[Any, float | None, Policy]] = [
    ("full depth", None, NeverExit()),
    ("fixed exit", 6, FixedExit(6)),
    ("p̂", 0.9, FixedExit(11)),
    ("p̂", 0.5, FixedExit(9)),
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    for seed in (0, 1):
        index = []
        for number, (family, setting, policy) in enumerate(CONTENDERS):
            name = f"{number:02d}"
            bundle = PolicyBundle.draft(
                pack_policy(policy, np.empty((1, 0), np.float32)),
                model="aa11", tokenizer="bb22", training={}, metrics={}, created_at=0.0,
            )  # fmt: skip
            bundle.save(folder / f"seed-{seed}" / name)
            entry = {"folder": name, "family": family, "setting": setting}
            index.append({**entry, "offline_agreement": None if setting is None else 0.95})
        (folder / f"seed-{seed}" / "contenders.json").write_text(json.dumps(index))
    return folder


def config(**changes: Any) -> TournamentConfig:
    values: dict[str, Any] = {
        "model": str(REFERENCE), "corpus_limit": 60, "validation_documents": 3,
        "test_documents": 3, "timed_documents": 2,
        "protocol": Protocol(prompt_tokens=16, new_tokens=12, lines=2, timed_tokens=6),
    }  # fmt: skip
    spec = WorkerSpec(model=str(REFERENCE), slots=4)
    return TournamentConfig(
        assess=AssessConfig(**{**values, **changes}), spec=spec, choosing_documents=2
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def outcome(policies: Path, out: Path) -> Findings:
    return run_tournament(config(), gather(policies, [0, 1]), out)[0]


def test_rules_take_part_once_and_learned_policies_by_seed(policies: Path) -> None:
    entrants = gather(policies, [0, 1])
    found = [(each.contender.family, each.seed) for each in entrants]
    learned = [("p̂", 0), ("p̂", 0), ("p̂", 1), ("p̂", 1)]
    assert found == [("full depth", None), ("fixed exit", None), *learned]
    assert len({key_of(each) for each in entrants}) == 6


def test_every_family_is_matched_at_every_target(outcome: Findings) -> None:
    assert len(outcome.matched) == 2 * 4 * 2
    for row in outcome.matched:
        assert row.seeds == (2 if row.policy == "p̂" else 1)
        assert row.wall_ratio is not None
    assert len(outcome.validation) == 6
    assert set(outcome.test) == {
        0,
        *(k for p in outcome.picks.values() for v in p.values() for k in v),
    }


def test_equal_seeds_score_equally(outcome: Findings) -> None:
    a, b = (plain_scores(outcome.validation[index].scores) for index in (2, 4))
    assert a == b


def test_a_resumed_tournament_measures_only_what_is_missing(
    policies: Path, out: Path, outcome: Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    entrants = gather(policies, [0, 1])
    again, _ = run_tournament(config(), entrants, out, lambda phase, *_: told.append(phase))
    assert again.matched == outcome.matched
    assert not [phase for phase in told if "quality" in phase]
    lost = out / "validation" / "seed-0-01.json"
    kept = lost.read_text()
    lost.unlink()
    run_tournament(config(), entrants, out, lambda phase, *_: told.append(phase))
    assert [phase for phase in told if "quality" in phase] == ["validation: quality"]
    assert lost.read_text() == kept


def test_other_settings_are_refused_in_the_same_folder(policies: Path, out: Path) -> None:
    entrants = gather(policies, [0])
    with pytest.raises(ConfigError, match=r"out: .* was measured under another test_documents"):
        run_tournament(config(test_documents=2), entrants, out)


def test_that_nobody_is_left_beside_full_depth_is_said(policies: Path, tmp_path: Path) -> None:
    full = gather(policies, [0])[:1]
    with pytest.raises(ConfigError, match="targets: none is left on validation documents"):
        run_tournament(config(), full, tmp_path / "alone")


def test_damaged_measurements_are_named(policies: Path, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(out, folder)
    (folder / "validation" / "seed-0-00.json").write_text("{")
    with pytest.raises(ConfigError, match=r"out: .*seed-0-00.json is unreadable"):
        run_tournament(config(), gather(policies, [0, 1]), folder)


def test_pages_are_made_of_an_outcome(outcome: Findings) -> None:
    for point in matched_points(outcome, [AGREEMENT])["agreement"]:
        assert point.family in ("fixed exit", "p̂")
    runs = {name: runs_of(outcome, AGREEMENT, 0.05, name) for name in ("p̂", "fixed exit")}
    section = comparisons(runs, [("p̂", "fixed exit"), ("PPO", "p̂")])
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == ["p̂ – fixed exit"]


def test_energy_has_a_method_and_fewer_layers_take_less() -> None:
    measurer = loaded(config())
    engine, split = measurer.engine, measurer.split("test")
    found = measure_energy(engine, [FixedExit(2)], split.documents, config().assess.protocol)
    assert found.method.value in ("measured_shared", "measured_device", "modelled")
    [ratio] = found.ratios
    assert ratio is not None
    assert 0 < ratio.value < 1


def test_the_oracle_leaves_early_and_agrees_nearly_always() -> None:
    measurer = loaded(config())
    engine, split = measurer.engine, measurer.split("test")
    found = measure_oracle(engine, split, config().assess.protocol, (3, 6, 9), 1)
    # All but what its own exits did to the cache.
    assert AGREEMENT.of([found.scores]) > 0.9
    assert found.scores.mean_layers < 9
    assert found.scores.tokens_D.tolist() == [11.0] * 3
    assert found.scores.lines_D.sum() == 0
