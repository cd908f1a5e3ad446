"""What the demo learns: when to draft, with nothing lost; then what some loss would buy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.agents.drafting.draft_ppo import DraftPPOConfig
from offramp.agents.drafting.teach import DRAFTER, TIMED_TOKENS, Taught
from offramp.agents.evaluation.assess import Assessment, assess
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.protocol import AssessConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.record import RecordReport, record_traces
from offramp.agents.recording.record_config import RecordConfig
from offramp.agents.recording.training_data import TrainingData, load_training_data
from offramp.agents.training.train import train
from offramp.agents.training.train_config import GATE_FAMILIES, TrainConfig
from offramp.agents.tuning.kv_quality import LEAVING, FillQuality
from offramp.agents.tuning.kv_tuning import KVTuneConfig, tune_kv
from offramp.deploy.cli.console import console, progress, say
from offramp.deploy.cli.drafting import teach_and_tell
from offramp.deploy.cli.evaluating import SLOTS, save_assessment
from offramp.deploy.cli.tables import evaluation_table
from offramp.deploy.demo.demo_config import DemoConfig
from offramp.worker.model.loading import layers_and_vocab
from offramp.worker.spec import ModelFacts, WorkerSpec, describe, load_engine

TARGETS = (0.92, 0.95, 0.985)
"""Agreements by replay at which each family gets a setting: each is evaluated, which takes time."""


@dataclass(frozen=True, slots=True)
class Drafted:
    """What came of the first act.

    Attributes:
        taught: The drafters, and which was chosen on validation documents.
        facts: The model that they are for.
    """

    taught: Taught
    facts: ModelFacts

    @property
    def chosen(self) -> Contender:
        """What is published."""
        return self.taught.contenders[self.taught.chosen]

    def report(self) -> dict[str, object]:
        """What the report says of drafting."""
        drafters = self.taught.contenders[1:]
        names = [each.name for each in drafters]
        rates = {each.name: 1 / (each.offline_cost or 1.0) for each in drafters}
        return {
            "times_full_depth_by_replay": rates,
            "times_full_depth": dict(zip(names, self.taught.speeds[1:], strict=True)),
            "chosen": self.chosen.name,
            "timed_documents": self.taught.timed,
            "timed_tokens": TIMED_TOKENS,
        }


def learn_to_draft(config: DemoConfig, spec: WorkerSpec) -> Drafted:
    """Record what the model says, measure costs, teach drafters, time them, choose."""
    console.rule(
        "[bold]1  Learn to draft[/]: exits propose, full depth confirms, nothing is lost",
        align="left",
    )
    lesson = DraftingConfig(
        model=spec.model,
        dtype=spec.dtype,
        exits=config.exits(layers_and_vocab(spec.model)[0]),
        candidates=config.candidates,
        documents=config.documents,
        new_tokens=config.drafted_tokens,
        profile_s=config.profile_s,
        threads=config.threads,
        seed=config.seed,
        ppo=DraftPPOConfig(steps=config.draft_steps),
    )
    engine = load_engine(replace(spec, slots=1, engine=config.engine))
    taught = teach_and_tell(lesson, engine, config.out / "drafters")
    drafted = Drafted(taught, describe(engine))
    won = (
        "PPO won" if drafted.chosen.family == DRAFTER else "PPO did not win; what did is published"
    )
    console.print(
        f"  {won}: {drafted.chosen.name} decoded {taught.speeds[taught.chosen]:.2f} × as fast as "
        f"full depth at batch 1, on the {taught.timed} validation documents that chose it, and "
        "every token was full depth's",
        style="bold",
    )
    return drafted


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of the second act."""

    filled: list[FillQuality]
    recorded: RecordReport
    data: TrainingData
    contenders: list[Contender]
    assessment: Assessment

    @property
    def chosen(self) -> Contender:
        """What would be published."""
        return self.contenders[self.assessment.chosen]


MAPPED = 12
"""Held-out documents on which the map of the fill is measured."""


def fit_map(config: DemoConfig, spec: WorkerSpec) -> tuple[WorkerSpec, list[FillQuality]]:
    """Fit what skipped layers are filled through; give engines that use it, and what it is worth.

    Its exits are those that traces are recorded at.
    """
    folder = config.out / "kv"
    lesson = KVTuneConfig(
        model=spec.model,
        documents=config.documents,
        length=config.tokens_per_document,
        held_out=MAPPED,
        dtype=spec.dtype,
        threads=config.threads,
        seed=config.seed,
    )
    with progress("map", "texts") as advance:
        found = tune_kv(lesson, folder, lambda stage, done, total: advance(done, total, stage))
    changed = ", ".join(f"{e.plain:.3f} → {e.mapped:.3f} after {e.layer}" for e in found)
    console.print(
        "  a map for the fill of skipped layers; of the tokens that stay where "
        f"{LEAVING:.0%} leave at random, filling changes {changed}"
    )
    engine = replace(spec.engine, translators=folder.resolve())
    return replace(spec, engine=engine), found


def learn(config: DemoConfig, spec: WorkerSpec) -> Learned:
    """Fit a map, record traces on Ray workers, train gates, evaluate them on-policy, choose."""
    console.rule("[bold]6  If some loss is allowed[/]: exits without verification", align="left")
    spec, filled = fit_map(config, spec)
    with progress("record", "tokens", costs="") as advance:
        recorded = record_traces(
            RecordConfig(
                worker=spec,
                documents=config.documents,
                tokens_per_document=config.tokens_per_document,
                recorders=config.replicas,
                profile_s=config.profile_s,
            ),
            config.out / "traces",
            lambda stage, done, total: advance(done, total, stage),
        )
    console.print(
        f"  {recorded.tokens:,} tokens, exits {recorded.exits}, "
        f"{recorded.tokens_per_s:,.0f} tokens/s"
    )
    training = TrainConfig(
        traces=str(config.out / "traces"),
        families=GATE_FAMILIES,
        targets=TARGETS,
        seed=config.seed,
        gate=PPOConfig(steps=config.ppo_steps),
    )
    with progress("PPO", "steps") as advance:
        contenders = train(
            training, config.out / "policies", on_progress=lambda _, *count: advance(*count)
        )
    data = load_training_data(config.out / "traces")
    engine = load_engine(replace(spec, slots=SLOTS))
    how = assess_config(config, spec.model)
    with progress("evaluate", "runs") as advance:
        found = assess(how, engine, contenders, lambda _, *count: advance(*count))
    save_assessment(config.out / "policies", contenders, found, engine, how)
    learned = Learned(filled, recorded, data, contenders, found)
    console.print(evaluation_table(found.test, learned.chosen.name))
    console.print(
        "  agreement with full depth; promised by replay; next-token accuracy; mean layers;\n"
        "  wall time per token over KV-cached full depth, interleaved at batch 1, 95 % intervals;\n"
        f"  energy likewise ({found.energy.label})"
    )
    say(f"  {found.reason}")
    return learned


FOLLOWED = 64
"""Tokens of a held-out document that gates decode after its prompt."""


def assess_config(config: DemoConfig, model: str) -> AssessConfig:
    """How the demo evaluates."""
    return AssessConfig(
        model=model,
        corpus_limit=config.documents,
        validation_documents=config.validation_documents,
        test_documents=config.test_documents,
        timed_documents=config.timed_documents,
        protocol=Protocol(new_tokens=FOLLOWED, lines=config.lines),
        target_agreement=config.target_agreement,
        threads=config.threads,
        seed=config.seed,
    )


SHOWN = ("def read_config(path):\n    ", "import argparse\n\ndef main():\n    parser = argparse.")
"""Prompts whose completions are printed."""


def prompts(config: DemoConfig, count: int) -> list[str]:
    """The prompts that are shown, then passages of held-out documents."""
    documents = load_corpus(None, limit=config.documents)
    texts = [document.text for document in documents if document.split == "test"]
    passages = [_passage(texts[index % len(texts)]) for index in range(count)]
    return [*SHOWN, *passages][:count]


def _passage(text: str) -> str:
    middle = len(text) // 2
    start = text.index("\n", middle) + 1 if "\n" in text[middle:] else middle
    return text[start : start + 240]


def traces_report(learned: Learned) -> dict[str, object]:
    """What the report says of the traces."""
    return {
        "documents": learned.recorded.documents,
        "tokens": learned.recorded.tokens,
        "seconds": learned.recorded.seconds,
        "tokens_per_s": learned.recorded.tokens_per_s,
        "exits": list(learned.recorded.exits),
        "costs": asdict(learned.data.costs),
    }
