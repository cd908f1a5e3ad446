"""What train, evaluate and publish say to folders that are missing, damaged or another model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offramp.agents.placing.contenders import load_contenders
from offramp.agents.recording.corpus import SPLIT, load_corpus, write_split
from offramp.agents.recording.training_data import load_training_data, save_facts
from offramp.controller.adapters.adapter_folder import keep_adapters, kept_in, read_description
from offramp.controller.adapters.adapter_index import MAX_ADAPTER_MB
from offramp.controller.costs.cost_file import save_costs
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.exits import Exit, copy_weights, exit_to_json
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import NeverExit, reads_state
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.deploy.cli.evaluating import require_recorded
from offramp.deploy.serve.publishing import adapters_beside
from offramp.envs.traces.candidate_file import save_candidates
from offramp.envs.traces.store import TraceStore
from offramp.worker import AdaptiveEngine, EngineConfig, Precision, SamplingParams
from offramp.worker.model.loading import load_model, model_fingerprint
from offramp.worker.model.translators import ExitTranslators, Translator
from offramp.worker.spec import ModelFacts
from support.cost_tables import measured
from support.models import REFERENCE
from support.recordings import make_corpus, make_recording

FACTS = ModelFacts(
    model="another model", tokenizer="its tokenizer", layers=12, vocab=7, context=9, width=4
)
COSTS = CostTable(
    layer_s=1.0,
    head_s=2.0,
    probe_s=0.1,
    policy_s=0.1,
    fill_s=0.1,
    step_s=0.1,
    layers=12,
    machine="invented",
)

Untouched = Callable[[], None]


def chunk(document: str, tokens: int = 20) -> TraceChunk:
    rng = np.random.default_rng(0)
    shape = (tokens, 3)
    return TraceChunk(
        document=document,
        position_T=np.arange(tokens, dtype=np.int32),
        features_TEF=rng.random((*shape, CANDIDATES_V1.width), dtype=np.float32),
        softmax_TES=rng.random((*shape, 3), dtype=np.float32),
        exit_token_TE=rng.integers(4, size=shape, dtype=np.int32),
        full_token_T=rng.integers(4, size=tokens, dtype=np.int32),
        next_token_T=rng.integers(4, size=tokens, dtype=np.int32),
        gap_TE=np.zeros(shape, np.float32),
    )


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A whole recording, of a model that is not the reference model."""
    folder = tmp_path / "traces"
    header = TraceHeader(
        model=FACTS.model, schema=CANDIDATES_V1.digest, exits=(3, 6, 9), layers=FACTS.layers
    )
    store = TraceStore.create(folder, header)
    store.append(chunk("a" * 64), "train")
    store.append(chunk("b" * 64), "validation")
    save_candidates(folder, np.zeros((FACTS.vocab, 4), np.int32))
    save_facts(folder, FACTS)
    save_costs(folder / "costs.json", COSTS)
    assert load_training_data(folder).facts == FACTS
    return folder


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """One whole contender for that model."""
    folder = tmp_path / "policies"
    bundle = PolicyBundle.draft(
        pack_policy(NeverExit(), np.empty((1, 0), np.float32)),
        model="aa11",
        tokenizer="bb22",
        training={},
        metrics={},
        created_at=1_800_000_000.0,
    )
    bundle.save(folder / "00")
    entry = {"folder": "00", "family": "full depth", "setting": "", "offline_agreement": 1.0}
    (folder / "contenders.json").write_text(json.dumps([entry]))
    assert len(load_contenders(folder)) == 1
    return folder


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def first_chunk(folder: Path) -> Path:
    return min(folder.glob("*.parquet"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut": lambda folder: (folder / "manifest.json").write_text('{"version"'),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[]"),
    "chunk gone": lambda folder: first_chunk(folder).unlink(),
    "chunk damaged": lambda folder: flip_a_byte(first_chunk(folder)),
    "costs gone": lambda folder: (folder / "costs.json").unlink(),
    "costs of another kind": lambda folder: (folder / "costs.json").write_text("[1]"),
    "facts cut": lambda folder: (folder / "model.json").write_text("{"),
    "candidates gone": lambda folder: (folder / "candidates.npy").unlink(),
    "candidates emptied": lambda folder: (folder / "candidates.npy").write_bytes(b""),
    "candidates cut": lambda folder: (folder / "candidates.npy").write_bytes(b"\x93NUMPY\x01"),
}


@pytest.mark.parametrize(
    "damage", [pytest.param(name) if name == "candidates emptied" else name for name in DAMAGES]
)
def test_damaged_traces_are_named(
    cli: Any, tmp_path: Path, traces: Path, policies: Path, untouched: Untouched, damage: str
) -> None:
    DAMAGES[damage](traces)
    untouched()
    message = cli.refused("train", "--traces", traces, "--out", tmp_path / "out")
    assert message.startswith(str(traces))
    message = cli.refused("evaluate", "--traces", traces, "--policies", policies)
    assert message.startswith(str(traces))


def test_missing_traces_are_named(
    cli: Any, tmp_path: Path, policies: Path, untouched: Untouched
) -> None:
    untouched()
    missing = tmp_path / "missing"
    message = cli.refused("train", "--traces", missing, "--out", tmp_path / "out")
    assert message.startswith(str(missing))
    message = cli.refused("evaluate", "--traces", missing, "--policies", policies)
    assert message.startswith(str(missing))


@pytest.mark.parametrize("targets", ["", "a", "1.5", "0", "nan", ".9;.95"])
def test_train_names_bad_targets(
    cli: Any, tmp_path: Path, traces: Path, untouched: Untouched, targets: str
) -> None:
    untouched()
    message = cli.refused(
        "train", "--traces", traces, "--out", tmp_path / "out", "--targets", targets
    )
    assert message.startswith("targets: ")


@pytest.mark.parametrize(
    "index",
    [
        None,
        "",
        "{",
        "[]",
        pytest.param("3"),
        pytest.param("[3]"),
        pytest.param('[{"folder": "00"}]'),
    ],
)
def test_evaluate_names_policies_without_a_readable_index(
    cli: Any, traces: Path, policies: Path, untouched: Untouched, index: str | None
) -> None:
    path = policies / "contenders.json"
    path.unlink() if index is None else path.write_text(index)
    untouched()
    message = cli.refused("evaluate", "--traces", traces, "--policies", policies)
    assert message.startswith("policies: ")


def test_evaluate_names_a_missing_folder(
    cli: Any, tmp_path: Path, traces: Path, untouched: Untouched
) -> None:
    untouched()
    message = cli.refused("evaluate", "--traces", traces, "--policies", tmp_path / "none")
    assert message.startswith("policies: ")


def test_evaluate_refuses_a_damaged_policy(
    cli: Any, traces: Path, policies: Path, untouched: Untouched
) -> None:
    flip_a_byte(policies / "00" / "weights.safetensors")
    untouched()
    message = cli.refused("evaluate", "--traces", traces, "--policies", policies)
    assert message.startswith("policy refused (digest_mismatch)")


def test_evaluate_refuses_another_model_than_the_recorded_one(
    cli: Any, traces: Path, policies: Path, untouched: Untouched
) -> None:
    untouched()
    message = cli.refused("evaluate", "--traces", traces, "--policies", policies)
    assert message.startswith("model: 'models/reference' is not the model of ")


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--model", "no/such/model", "model"),
        ("--dtype", "float16", "dtype"),
        ("--device", "tpu", "device"),
        ("--target-agreement", "1.5", "target_agreement"),
        ("--target-agreement", "nan", "target_agreement"),
        ("--target-edit-loss", "nan", "target_edit_loss"),
        ("--target-edit-loss", "-0.1", "target_edit_loss"),
    ],
)
def test_evaluate_names_the_bad_option(
    cli: Any,
    traces: Path,
    policies: Path,
    untouched: Untouched,
    option: str,
    value: str,
    field: str,
) -> None:
    untouched()
    message = cli.refused("evaluate", "--traces", traces, "--policies", policies, option, value)
    assert message.startswith(f"{field}: ")


def test_costs_of_another_model_are_refused(
    cli: Any, tmp_path: Path, traces: Path, untouched: Untouched
) -> None:
    save_costs(tmp_path / "costs.json", measured(model="12" * 32))
    untouched()
    arguments = ("train", "--traces", traces, "--out", tmp_path / "out", "--costs")
    message = cli.refused(*arguments, tmp_path / "costs.json")
    assert message.startswith("costs: were measured on model 121212121212, not on another")
    message = cli.refused(*arguments, tmp_path / "none.json")
    assert message.startswith(str(tmp_path / "none.json"))


def test_another_tables_prices_replace_the_recordings(tmp_path: Path, traces: Path) -> None:
    save_costs(tmp_path / "costs.json", measured(model=FACTS.model))
    assert load_training_data(traces, tmp_path / "costs.json").costs == measured(model=FACTS.model)


RUN = """
checkpoint_every = 1
targets = [0.9]
[phat]
epochs = 1
[jump]
jumps = 2
warm.steps = 5
[jump.ppo]
steps = 64
envs = 8
rollout = 8
batch = 64
"""


def save_translators(folder: Path, model: str) -> Path:
    """Write the identity at exits 3 and 6 of the reference model."""
    zeros = Translator(torch.zeros(2, 256), torch.zeros(256, 2), torch.zeros(256))
    facts = {"model": model, "layers": 12, "width": 256}
    ExitTranslators({3: zeros, 6: zeros}).save(folder, facts)
    return folder


def test_a_finished_run_is_told_and_left_alone_and_adapters_travel_with_it(
    cli: Any, tmp_path: Path, untouched: Untouched
) -> None:
    traces = make_recording(tmp_path / "traces", make_corpus(tmp_path / "corpus"))
    facts = load_training_data(traces).facts
    tuned = save_translators(tmp_path / "tuned", facts.model)
    digest = read_description(tuned)["digest"]
    save_facts(traces, replace(facts, translators=digest))
    (tmp_path / "run.toml").write_text(f'traces = "{traces}"\n{RUN}')
    arguments = ("train", "--config", tmp_path / "run.toml", "--out", tmp_path / "out")
    assert "Name their folder with --translators" in cli.refused(*arguments)
    keep_adapters(tuned, traces)
    status, said = cli(*arguments)
    assert status == 0, said
    assert "nothing is trained again" not in said
    bundle = PolicyBundle.load(tmp_path / "out" / "01")
    beside = adapters_beside(bundle, tmp_path / "out" / "01", None, MAX_ADAPTER_MB)
    assert beside is not None
    assert beside.index.digest == bundle.manifest.adapters == digest
    untouched()
    status, said = cli(*arguments, "--resume")
    assert status == 0, said
    assert "this run is finished: nothing is trained again" in said
    assert "policies →" in said


DRAFTING = """
documents = 40
prompt_tokens = 16
new_tokens = 8
profile_s = 0.5
[ppo]
steps = 64
envs = 8
rollout = 8
batch = 64
imitated = 64
max_pending = 9
"""


@pytest.mark.parametrize(
    ("exits", "candidates", "insight", "rules"),
    [
        ((3, 6), 8, True, ["headless confidence stop", "headless trust stop"]),
        (
            (Exit(6, "int4"), Exit(12, "int4"), 3),
            8,
            False,
            ["headless confidence stop", "headless trust stop"],
        ),
        ((Exit(12, "int4"),), 0, True, ["confidence stop", "trust stop", "Thompson sampling"]),
    ],
)
def test_drafters_are_taught_chosen_and_lossless(
    cli: Any,
    tmp_path: Path,
    exits: tuple[int, ...],
    candidates: int,
    insight: bool,
    rules: list[str],
) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    tuned = None
    if not copy_weights(exits):
        fingerprint = model_fingerprint(load_model(REFERENCE, torch.float32, "cpu"))
        tuned = save_translators(tmp_path / "tuned", fingerprint)
    (tmp_path / "drafting.toml").write_text(
        f'model = "{REFERENCE}"\ncorpus = "{corpus}"\ntranslators = "{tuned or ""}"\n'
        f"exits = {list(map(exit_to_json, exits))}\ncandidates = {candidates}\n"
        f"insight = {str(insight).lower()}\n{DRAFTING}"
    )
    arguments = ("train", "--for", "drafting", "--config", tmp_path / "drafting.toml")
    status, said = cli(*arguments, "--out", tmp_path / "out")
    assert status == 0, said
    contenders = load_contenders(tmp_path / "out")
    families = [each.family for each in contenders]
    assert families == ["full depth", *rules, "PPO drafting"]
    assert contenders[-1].policy.exits == exits
    # Kangaroo's rule and Thompson sampling have no chances to add insight to.
    assert sum(reads_state(each.policy) for each in contenders) == 2 * insight
    assert "every token full depth's" in said
    named = PolicyBundle.load(tmp_path / "out" / "chosen").manifest.adapters
    kept = kept_in(tmp_path / "out")
    assert named == ("" if kept is None else read_description(kept)["digest"])
    assert (kept is None) == (tuned is None)
    assert said.count("× full depth by replay") == 1 + len(rules)
    assert said.count("← chosen") == 1
    drafter = PolicyBundle.load(tmp_path / "out" / "chosen").policy()
    copy = Precision(weights="int4") if copy_weights(exits) else None
    config = EngineConfig(kv_mode="verify", draft_precision=copy, max_pending=9)
    engine = AdaptiveEngine.from_pretrained(REFERENCE, config=config)
    sampling = SamplingParams(max_tokens=24)
    texts = [
        engine.generate("def main(", sampling, policy)[0].text for policy in (NeverExit(), drafter)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--for", "drafts"), "for: 'drafts' is unknown. Use exits, drafting, prompts or classify"),
        (("--for", "drafting", "--traces", "x"), "traces: does not go with --for drafting"),
        (("--for", "drafting", "--model", "no/such"), "model: "),
        (("--for", "drafting", "--exits", "3,6:int4"), "exits: '3,6:int4' does not ascend"),
        (("--for", "drafting", "--exits", "6:int3"), "exits: '6:int3' is no list of exits"),
        (("--for", "drafting", "--exits", "6:int8,6:int4"), "exits: "),
        (("--exits", "3,6", "--traces", "x"), "exits: is that of the recording"),
    ],
)
def test_train_names_what_does_not_go_with_drafting(
    cli: Any, tmp_path: Path, untouched: Untouched, arguments: tuple[str, ...], told: str
) -> None:
    untouched()
    assert cli.refused("train", "--out", tmp_path / "out", *arguments).startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exits = [6, 3]", "exits: (6, 3) do not ascend"),
        ("exits = [12]", "exits: (12,) do not ascend"),
        ('exits = ["13:int4"]', "exits: (13:int4,) do not ascend"),
        ('exits = ["6:int4", "6:native"]', "exits: ['6:int4', '6:native'] is no list of exits"),
        ("new_tokens = 9999", "new_tokens: 9999 after 64 exceed"),
        ("prompt_tokens = 0", "prompt_tokens: 0 is below 1"),
        ("[ppo]\nsteps = 0", "steps: 0 is below 1"),
        ("tokens = 3", "tokens: is no known option"),
    ],
)
def test_a_drafting_file_with_errors_is_refused(
    cli: Any, tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / "drafting.toml").write_text(f'model = "{REFERENCE}"\n{text}\n')
    arguments = ("--for", "drafting", "--config", tmp_path / "drafting.toml")
    assert cli.refused("train", "--out", tmp_path / "out", *arguments).startswith(told)
    assert not (tmp_path / "out").exists()


def test_publish_asks_for_redis_url_and_makes_no_key_before(
    cli: Any, policies: Path, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched()
    assert cli.refused("publish", policies / "00").startswith("REDIS_URL: is not set")
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    assert cli.refused("publish", policies / "00").startswith("REDIS_URL: ")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "policy folder: "),
        (lambda folder: (folder / "weights.safetensors").unlink(), "policy folder: "),
        (lambda folder: (folder / "manifest.json").write_text("{"), "policy refused (bad_format)"),
        (lambda folder: flip_a_byte(folder / "weights.safetensors"), "policy refused (digest_"),
    ],
)
def test_publish_refuses_a_damaged_policy(
    cli: Any, policies: Path, untouched: Untouched, damage: Callable[[Path], object], told: str
) -> None:
    damage(policies / "00")
    untouched()
    assert cli.refused("publish", policies / "00").startswith(told)


def test_publish_names_a_missing_folder(cli: Any, tmp_path: Path, untouched: Untouched) -> None:
    untouched()
    message = cli.refused("publish", tmp_path / "none")
    assert message.startswith("policy folder: ")
    assert str(tmp_path / "none") in message


def test_the_recording_above_is_whole(traces: Path) -> None:
    data = load_training_data(traces)
    assert data.costs.at(1) == COSTS.at(1)
    assert len(data.train) == len(data.validation) == 20


def test_another_corpus_than_the_recorded_one_is_refused(traces: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.py").write_text(f"# {number}\n" * 600)
    write_split(load_corpus(corpus), traces / SPLIT)
    require_recorded(corpus, 320, traces)
    (corpus / "one more.py").write_text("# more\n" * 600)
    with pytest.raises(ConfigError, match=r"corpus: is not the one .* Give the --corpus"):
        require_recorded(corpus, 320, traces)
