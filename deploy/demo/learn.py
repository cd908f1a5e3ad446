"""The demo's first half: record, train, evaluate, choose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from offramp.agents.evaluation.assess import Assessment, assess
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.protocol import AssessConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.record import RecordConfig, RecordReport, record_traces
from offramp.agents.recording.training_data import TrainingData, load_training_data
from offramp.agents.training.train import train
from offramp.agents.training.train_config import GATE_FAMILIES, TrainConfig
from offramp.deploy.cli.console import console, progress, say
from offramp.deploy.cli.evaluating import SLOTS, save_assessment
from offramp.deploy.cli.tables import evaluation_table
from offramp.deploy.demo.demo_config import DemoConfig
from offramp.worker.spec import WorkerSpec, load_engine


@dataclass(frozen=True, slots=True)
class Learned:
    """What the first half found."""

    recorded: RecordReport
    data: TrainingData
    contenders: list[Contender]
    assessment: Assessment

    @property
    def chosen(self) -> Contender:
        """What is to be published."""
        return self.contenders[self.assessment.chosen]


def learn(config: DemoConfig, spec: WorkerSpec) -> Learned:
    """Record traces on Ray workers, train, evaluate on-policy, choose."""
    console.rule("[bold]1  Record[/]: Ray workers decode documents at full depth", align="left")
    with progress("record", "tokens") as advance:
        recorded = record_traces(
            RecordConfig(
                worker=spec,
                documents=config.documents,
                tokens_per_document=config.tokens_per_document,
                recorders=config.replicas,
            ),
            config.out / "traces",
            advance,
        )
    console.print(
        f"  {recorded.tokens:,} tokens, exits {recorded.exits}, "
        f"{recorded.tokens_per_s:,.0f} tokens/s"
    )
    console.rule("[bold]2  Learn[/]: p̂ and PPO on the replayed traces", align="left")
    training = TrainConfig(
        traces=str(config.out / "traces"),
        families=GATE_FAMILIES,
        seed=config.seed,
        gate=PPOConfig(steps=config.ppo_steps),
    )
    with progress("PPO", "steps") as advance:
        contenders = train(
            training, config.out / "policies", on_progress=lambda _, *count: advance(*count)
        )
    console.rule("[bold]3  Evaluate[/]: held-out documents, exits really taken", align="left")
    data = load_training_data(config.out / "traces")
    engine = load_engine(replace(spec, slots=SLOTS))
    how = assess_config(config, spec.model)
    with progress("evaluate", "runs") as advance:
        found = assess(how, engine, contenders, lambda _, *count: advance(*count))
    save_assessment(config.out / "policies", contenders, found, engine, how)
    learned = Learned(recorded, data, contenders, found)
    console.print(evaluation_table(found.test, learned.chosen.name))
    console.print(
        "  agreement with full depth; promised by replay; next-token accuracy; mean layers;\n"
        "  wall time per token over KV-cached full depth, interleaved at batch 1, 95 % intervals;\n"
        f"  energy likewise ({found.energy.label})"
    )
    say(f"  {found.reason}")
    return learned


def assess_config(config: DemoConfig, model: str) -> AssessConfig:
    """How the demo evaluates."""
    return AssessConfig(
        model=model,
        corpus_limit=config.documents,
        validation_documents=config.validation_documents,
        test_documents=config.test_documents,
        timed_documents=config.timed_documents,
        protocol=Protocol(lines=config.lines),
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
