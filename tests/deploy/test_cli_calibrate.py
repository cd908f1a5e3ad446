"""``offramp calibrate`` on the reference model, and publishing what it certified."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offramp.agents.evaluation.assess import assess
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.protocol import AssessConfig
from offramp.agents.placing.contenders import load_contenders
from offramp.agents.recording.corpus import load_corpus
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.deploy.cli.calibrating import NOTHING_CERTIFIED
from offramp.deploy.cli.evaluating import save_assessment
from offramp.deploy.serve.redis_server import EmbeddedRedis
from offramp.deploy.serve.worker_report import conditions_of, describe_policy
from offramp.envs.traces.candidate_file import save_candidates
from offramp.worker import AdaptiveEngine
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
EXITS = (3, 6, 9)
# Small and quick: eight windows of eight tokens, a bound that even they can certify.
SMALL = ("--documents", 8, "--prompt-tokens", 8, "--new-tokens", 8, "--steps", 3)
LOOSE = ("--delta", 0.5, "--epsilon", 0.2)


@pytest.fixture(scope="module")
def fingerprints() -> tuple[str, str]:
    torch.set_num_threads(1)
    engine = AdaptiveEngine.from_pretrained(REFERENCE)
    return engine.model_fingerprint, engine.tokenizer_fingerprint


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beginnings of some real files: as large a corpus as the tests need, and quick to read."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, document in enumerate(load_corpus(None, limit=40)):
        (folder / f"{number:02d}.py").write_text(document.text[:4000])
    return folder


@pytest.fixture
def traces(tmp_path: Path, corpus: Path) -> Path:
    """A recording that took some documents of the corpus; calibration reads no more of it."""
    folder = tmp_path / "traces"
    folder.mkdir()
    taken = {each.digest: {"split": each.split} for each in load_corpus(corpus, limit=16)}
    (folder / "split.json").write_text(json.dumps(taken))
    return folder


Named = tuple[str, float | None, float, Policy]
"""Family, setting, offline agreement and policy of one operating point."""


def contenders(folder: Path, model: str, tokenizer: str) -> Path:
    calm = [ThresholdPolicy(EXITS, SOFTMAX_V2, "margin", margin) for margin in (0.9, 0.5)]
    named: list[Named] = [
        ("full depth", None, 1.0, NeverExit()),
        ("CALM", 0.9, 0.99, calm[0]),
        ("CALM", 0.5, 0.9, calm[1]),
        ("fixed exit", 3.0, 0.6, FixedExit(3)),
    ]
    save_points(folder, named, model, tokenizer)
    rows = [
        {"policy": "CALM τ=0.9", "family": "CALM", "setting": 0.9, "agreement": 0.97},
        {"policy": "CALM τ=0.5", "family": "CALM", "setting": 0.5, "agreement": 0.91},
    ]
    measured = [row | {"mean_layers": 9.0, "wall_ratio": 0.9} for row in rows]
    (folder / "evaluation.json").write_text(json.dumps({"validation": measured, "test": []}))
    return folder


def save_points(folder: Path, named: list[Named], model: str, tokenizer: str) -> None:
    """Bundles and their index, as training leaves them."""
    index = []
    for number, (family, setting, offline, policy) in enumerate(named):
        width = 0 if policy.schema is None else policy.schema.width
        bundle = PolicyBundle.draft(
            pack_policy(policy, np.zeros((1, width), np.float32)),
            model=model,
            tokenizer=tokenizer,
            training={"family": family},
            metrics={},
            created_at=1_800_000_000.0,
        )
        bundle.save(folder / f"{number:02d}")
        entry = {"folder": f"{number:02d}", "family": family, "setting": setting}
        index.append(entry | {"offline_agreement": offline})
    (folder / "contenders.json").write_text(json.dumps(index))


@pytest.fixture
def policies(tmp_path: Path, fingerprints: tuple[str, str]) -> Path:
    return contenders(tmp_path / "policies", *fingerprints)


@pytest.fixture
def given(policies: Path, traces: Path, corpus: Path) -> tuple[object, ...]:
    """A calibration's command line but for the promise."""
    folders = ("--policies", policies, "--traces", traces, "--corpus", corpus)
    return ("calibrate", *folders, "--family", "CALM", *SMALL)


@pytest.fixture
def calibrate(cli: Any, given: tuple[object, ...]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        found: tuple[int, str] = cli(*given, *LOOSE, *arguments)
        return found

    return run


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        monkeypatch.setenv("REDIS_URL", server.url)
        yield


def test_a_certified_bundle_is_written_published_and_shown(
    cli: Any, calibrate: Callable[..., tuple[int, str]], policies: Path, redis: None
) -> None:
    status, output = calibrate()
    assert status == 0, output
    assert output.count("passed") == 3
    bundle = PolicyBundle.load(policies / "certified")
    certificate = bundle.manifest.certificate
    assert certificate is not None
    assert (certificate.n, certificate.unit, certificate.method) == (
        8,
        "document",
        "hoeffding-bentkus",
    )
    assert (certificate.delta, certificate.epsilon, certificate.decode_mode) == (
        0.5,
        0.2,
        "project",
    )
    assert (certificate.prompt_tokens, certificate.new_tokens) == (8, 8)
    assert certificate.setting == pytest.approx(0.5)  # the most eager point: the walk's end
    assert bundle.policy() == ThresholdPolicy(EXITS, SOFTMAX_V2, "margin", certificate.setting)
    assert bundle.manifest.metrics == {"model_layers": 12}
    assert certificate.statement in output
    report = json.loads((policies / "certified" / "calibration.json").read_text())
    assert [step["setting"] for step in report["walked"]] == [w.setting for w in certificate.walked]
    assert report["certified"] == bundle.manifest.digest

    status, output = cli("publish", policies / "certified", "--promote")
    assert status == 0, output
    assert "certified: disagreement ≤ 0.5" in output
    status, output = cli("status")
    assert f"head: generation 1, certified: {certificate.statement}" in output
    assert "uncertified: was said" in cli.refused(
        "publish", policies / "certified", "--uncertified"
    )


def test_an_uncertified_bundle_is_published_only_by_saying_so(
    cli: Any, policies: Path, redis: None, home: Path
) -> None:
    message = cli.refused("publish", policies / "01")
    assert message.startswith("certificate: the policy has none.")
    assert "--uncertified" in message
    assert not home.exists()  # refused before a key was made
    status, output = cli("publish", policies / "01", "--uncertified", "--promote")
    assert status == 0, output
    assert "head: generation 1, uncertified" in cli("status")[1]
    status, output = cli("publish", policies / "00", "--promote")
    assert status == 0, output
    assert "head: generation 2, full depth" in cli("status")[1]


def test_status_without_the_publishers_key_says_what_it_lacks(
    cli: Any, policies: Path, redis: None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("publish", policies / "01", "--uncertified", "--promote")
    monkeypatch.setenv("OFFRAMP_HOME", str(home / "elsewhere"))
    assert "publisher.pub is not here" in cli("status")[1]


def test_nothing_certified_is_an_outcome_with_its_own_status(
    cli: Any, policies: Path, given: tuple[object, ...]
) -> None:
    strict = ("--family", "fixed exit", "--delta", 0.1, "--epsilon", 0.5)
    status, output = cli(*given, *strict)
    assert status == NOTHING_CERTIFIED, output
    assert "nothing is certified: full depth remains" in output
    report = json.loads((policies / "certified" / "calibration.json").read_text())
    assert report["certified"] is None
    assert [step["passed"] for step in report["walked"]] == [False]
    assert not (policies / "certified" / "manifest.json").exists()


def test_tokens_defer_and_replay_are_said_in_the_certificate(
    calibrate: Callable[..., tuple[int, str]], traces: Path, tmp_path: Path
) -> None:
    save_candidates(traces, np.tile(np.arange(4, dtype=np.int32), (4096, 1)))
    runs: dict[str, tuple[object, ...]] = {
        "tokens": ("--unit", "token", "--method", "binomial"),
        "defer": ("--kv-mode", "defer", "--max-pending", 4, "--method", "betting"),
        "replay": ("--replay",),
    }
    found: dict[str, Any] = {}
    for name, options in runs.items():
        status, output = calibrate(*options, "--out", tmp_path / name)
        assert status == 0, output
        found[name] = PolicyBundle.load(tmp_path / name).manifest.certificate
    assert found["tokens"].unit == "token"
    assert found["tokens"].n == 64
    assert (found["defer"].decode_mode, found["defer"].max_pending) == ("defer", 4)
    assert found["defer"].method == "betting"
    assert (found["replay"].decode_mode, found["replay"].max_pending) == ("replay", None)
    assert found["replay"].data == found["defer"].data  # the same documents and tokens


def test_conformal_risk_control_has_no_epsilon(
    cli: Any, policies: Path, given: tuple[object, ...]
) -> None:
    conformal = ("--method", "conformal", "--delta", 0.5)
    message = cli.refused(*given, *conformal, "--epsilon", 0.2)
    assert message.startswith("epsilon: 0.2 does not go with conformal")
    status, output = cli(*given, *conformal)
    assert status == 0, output
    assert "expected disagreement ≤ 0.5 (conformal)" in output
    certificate = PolicyBundle.load(policies / "certified").manifest.certificate
    assert certificate is not None
    assert (certificate.epsilon, certificate.p_value) == (None, None)


def test_line_completion_is_certified_by_documents(
    cli: Any, given: tuple[object, ...], policies: Path
) -> None:
    lines = ("--loss", "edit-similarity", "--prompt-tokens", 32, "--new-tokens", 48)
    status, output = cli(*given, *LOOSE, *lines)
    assert status == 0, output
    certificate = PolicyBundle.load(policies / "certified").manifest.certificate
    assert certificate is not None
    assert certificate.loss == "edit similarity lost in line completion"
    assert (certificate.unit, certificate.prompt_tokens, certificate.new_tokens) == (
        "document",
        32,
        4 * 24,
    )
    assert "edit similarity lost in line completion ≤ 0.5 with probability" in output
    report = json.loads((policies / "certified" / "calibration.json").read_text())
    assert report["loss"] == certificate.loss


def test_a_quality_or_a_budget_says_where_the_walk_ends(
    calibrate: Callable[..., tuple[int, str]], policies: Path
) -> None:
    status, output = calibrate("--quality", 0.95)
    assert status == 0, output
    assert "walking up to CALM τ=0.9: 0.970 on validation documents" in output
    certificate = PolicyBundle.load(policies / "certified").manifest.certificate
    assert certificate is not None
    assert certificate.setting == pytest.approx(0.9)


def test_an_energy_budget_picks_what_evaluate_metered(
    cli: Any, given: tuple[object, ...], tmp_path: Path, corpus: Path, fingerprints: tuple[str, str]
) -> None:
    engine = AdaptiveEngine.from_pretrained(REFERENCE)
    folder = tmp_path / "metered"
    named: list[Named] = [("full depth", None, 1.0, NeverExit())]
    named += [("p̂", float(layer), layer / 12, FixedExit(layer)) for layer in (11, 9, 3)]
    save_points(folder, named, *fingerprints)
    config = AssessConfig(
        model=str(REFERENCE), corpus=corpus, validation_documents=2, test_documents=2,
        timed_documents=1, protocol=Protocol(prompt_tokens=8, new_tokens=24, lines=0,
        timed_tokens=16),
    )  # fmt: skip
    points = load_contenders(folder)
    save_assessment(folder, points, assess(config, engine, points), engine, config)
    told = json.loads((folder / "evaluation.json").read_text())
    method = told["energy"]["method"]
    assert method in ("modelled", "measured_shared", "measured_device")
    assert {row["energy_method"] for row in (*told["validation"], *told["test"])} == {method}
    assert told["energy"]["source"] in (folder / "report.md").read_text()
    ratios = {row["setting"]: row["energy_ratio"] for row in told["validation"]}
    assert ratios[3.0] < ratios[9.0]
    options = ("--policies", folder, "--family", "p̂", *LOOSE)

    status, output = cli(*given, *options, "--energy-budget", ratios[3.0])
    assert status in (0, NOTHING_CERTIFIED), output
    said = method.replace("_", " ")
    place = f"walking up to p̂ τ=3: {ratios[3.0]:.3f} (energy, {said}) on validation documents"
    assert place in output
    message = cli.refused(*given, *options, "--energy-budget", 0.01, "--out", tmp_path / "none")
    assert message.startswith("energy_budget: no measured point is within 0.01; the least is ")
    assert f"{min(ratios[3.0], ratios[9.0]):.4g} (energy, {said}). Allow more" in message


REFUSED: list[tuple[tuple[object, ...], str]] = [
    (("--delta", 0), "delta: 0.0 is not in (0, 1)"),
    (("--delta", "nan"), "delta: nan is not in (0, 1)"),
    (("--epsilon", 1), "epsilon: 1.0 is not in (0, 1)"),
    (("--method", "wald"), "method: 'wald' is unknown. Use one of binomial, hoeffding-bentkus"),
    (("--unit", "sentence"), "unit: 'sentence' is unknown"),
    (("--method", "binomial"), "method: binomial is for losses of 0 or 1"),
    (("--delta", 0.01), "documents: 8 unseen ones can certify no bound of 0.01, it takes 161"),
    (("--kv-mode", "verify"), "kv_mode: verify emits what full depth would"),
    (("--loss", "rouge"), "loss: 'rouge' is unknown. Use one of disagreement, edit-similarity"),
    (("--loss", "edit-similarity", "--unit", "token"), "unit: edit-similarity is not a token's"),
    (("--loss", "edit-similarity", "--replay"), "replay: has no completions to take edit-simil"),
    (("--family", "PPO"), "family: 'PPO' was not trained. Trained: CALM, fixed exit"),
    (("--family", ""), "family: "),
    (("--quality", 0.99), "quality: no measured point keeps 0.99; the best 0.97"),
    (("--quality", 0.9, "--latency-budget", 0.9), "quality: and the budgets exclude each other"),
    (("--energy-budget", 0.9), "policies: the evaluation has no energy_ratio of 'CALM'"),
    (("--prompt-tokens", 100_000), "calibration documents: none of "),
    (("--model", "no/such/model"), "model: "),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=[str(each[1])[:24] for each in REFUSED])
def test_what_cannot_be_calibrated_is_named(
    cli: Any,
    given: tuple[object, ...],
    untouched: Callable[[], None],
    options: tuple[object, ...],
    told: str,
) -> None:
    untouched()
    assert cli.refused(*given, *LOOSE, *options).startswith(told)


def test_policies_of_another_model_are_refused(
    cli: Any, given: tuple[object, ...], tmp_path: Path, fingerprints: tuple[str, str]
) -> None:
    for other in (("aa11", fingerprints[1]), (fingerprints[0], "bb22")):
        folder = contenders(tmp_path / other[0][:4], *other)
        message = cli.refused(*given, *LOOSE, "--policies", folder)
        assert message.startswith(("model: the policies were", "tokenizer: the policies were"))


def test_a_folder_with_something_in_it_is_not_written_to(
    calibrate: Callable[..., tuple[int, str]], policies: Path
) -> None:
    (policies / "certified").mkdir()
    (policies / "certified" / "old").touch()
    status, output = calibrate()
    assert status == 1
    assert "out: " in output


def test_a_worker_reports_what_stands_behind_its_policy_and_where_it_ends(
    policies: Path, calibrate: Callable[..., tuple[int, str]]
) -> None:
    class Accepted:
        state = type("State", (), {"value": "ACK"})
        reason = ""

    assert calibrate()[0] == 0
    bundle = PolicyBundle.load(policies / "certified")
    certificate = bundle.manifest.certificate
    engine = AdaptiveEngine.from_pretrained(REFERENCE)
    policy: Any = bundle.policy()
    report: Any = Accepted()

    def told(snapshot: PolicySnapshot) -> tuple[str, str | None, str]:
        found = describe_policy("w", snapshot, report, conditions_of(engine))
        return found["guarantee"], found["certificate"], found["gap"]

    assert told(FULL_DEPTH) == ("full depth", None, "")
    assert told(PolicySnapshot(1, "d", policy)) == ("uncertified", None, "")
    assert certificate is not None
    statement = certificate.statement
    assert told(PolicySnapshot(1, "d", policy, certificate)) == ("certified", statement, "")
    deferred = replace(certificate, decode_mode="defer", max_pending=8)
    gap = told(PolicySnapshot(1, "d", policy, deferred))[2]
    assert gap == "certified for decode_mode 'defer', served with 'project'"
