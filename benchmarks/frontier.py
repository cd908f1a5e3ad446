"""Every family of policies at matched quality, on-policy, on documents nothing was chosen on.

    python benchmarks/frontier.py --json frontier.json
    python benchmarks/frontier.py --quick --json frontier.json
    python benchmarks/frontier.py --model models/smollm2 --translators runs/layers --corpus FILE \\
        --dtype bfloat16 --exits 8,15,22 --prompt 32 --families "fixed exit,CALM,p̂,PPO"

Records traces, trains every seed, scores all on validation documents, and what was picked there on
test documents. Goes on where it was stopped if `--out` is the same. Needs `make setup`, and nothing
from outside. The report is `OUT/report/report.html`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from offramp.agents.evaluation.energy_ratios import Energy
from offramp.agents.evaluation.matched import TARGETS, MatchedRow, matched_row
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.page import (
    conditions,
    energy_section,
    gap_headline,
    gaps,
    savings_headline,
    volumes,
)
from offramp.agents.evaluation.protocol import AssessConfig, Findings, Measurer
from offramp.agents.evaluation.report import EvaluationReport, write_report
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY
from offramp.agents.learning.jump_ppo import JumpConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.placing.contenders import INDEX
from offramp.agents.recording.record import record_traces
from offramp.agents.recording.record_config import RecordConfig
from offramp.agents.recording.training_data import is_whole, load_training_data
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.durable import write_durably
from offramp.deploy.serve.serve_app import ray_session
from offramp.research.comparisons import benchmark_row, comparisons, matched_points
from offramp.research.hindsight import FAMILY as ORACLE
from offramp.research.hindsight import measure_oracle
from offramp.research.lineup import train_lineup
from offramp.research.tournament import (
    TournamentConfig,
    gather,
    measure_energy,
    run_tournament,
    runs_of,
)
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.spec import WorkerSpec

HEADLINE = (EDIT_SIMILARITY, 0.01)
"""The question: at most 1 % relative loss of line-completion edit similarity."""
PAIRS = (
    ("PPO jumps", "p̂ on best exits"),
    ("PPO jumps", "p̂"),
    ("PPO", "p̂"),
    ("p̂ on best exits", "p̂"),
    ("p̂", "CALM"),
    ("p̂", "fixed exit"),
)
OFFLINE_TARGETS = (0.93, 0.96, 0.98, 0.99, 0.997)
"""Replayed agreements at which every family gets an operating point."""
ENERGY_DOCUMENTS = 4
TIMED_TOKENS = 32
STEPS = 1_500_000
QUICK = {
    "documents": 96, "tokens_per_document": 128, "seeds": 1, "steps": 200_000, "validation": 4,
    "test": 6, "timed": 2, "lines": 2, "targets": (0.96, 0.99),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--quick", action="store_true", help="under 4 minutes: one small seed")
    parser.add_argument("--model", default="models/reference")
    parser.add_argument("--corpus", type=Path, help="default: the standard library")
    parser.add_argument("--translators", type=Path, help="exits' adapters, of `offramp tune`")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--exits", type=parse_layers, default=(),
                        help="like 3,6,9; default: quarters of the depth")  # fmt: skip
    parser.add_argument("--families", type=lambda names: tuple(names.split(",")), default=None,
                        help="default: all; like 'fixed exit,CALM,p̂,PPO'")  # fmt: skip
    parser.add_argument("--documents", type=int, default=320)
    parser.add_argument("--tokens-per-document", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--validation", type=int, default=32, help="documents")
    parser.add_argument("--test", type=int, default=48, help="documents")
    parser.add_argument("--prompt", type=int, default=64, help="tokens read before those")
    parser.add_argument("--tokens", type=int, default=64, help="teacher-forced in each document")
    parser.add_argument("--targets", type=float, nargs="+", default=OFFLINE_TARGETS,
                        help="replayed agreements to place operating points at")  # fmt: skip
    parser.add_argument("--timed", type=int, default=12, help="of the test documents")
    parser.add_argument("--lines", type=int, default=6, help="completed in each document")
    parser.add_argument("--processes", type=int, default=2, help="that score; timing runs alone")
    parser.add_argument("--kv-mode", choices=("project", "defer"), default="project")
    given = parser.parse_args()
    if given.quick:
        vars(given).update(QUICK)
    return given


def parse_layers(text: str) -> tuple[int, ...]:
    return tuple(int(layer) for layer in text.split(","))


def main() -> None:
    given = arguments()
    start = time.perf_counter()

    def tell(phase: str, done: int, total: int) -> None:
        print(f"\r{time.perf_counter() - start:6.0f} s  {phase}: {done}/{total}   ", end="")
        if done == total:
            print()

    prepare(given, tell)
    config = tournament(given)
    entrants = gather(given.out / "policies", range(given.seeds))
    findings, measurer = run_tournament(config, entrants, given.out / "measured", tell)
    report = report_of(given, config, findings, measurer)
    folder = given.out / "report"
    write_report(report, folder)
    for sentence in report.headlines:
        print(sentence)
    if given.json:
        rows = [benchmark_row(row) for row in report.matched]
        write_durably(given.json, json.dumps(rows, indent=1).encode())
    print(f"{time.perf_counter() - start:.0f} s → {folder / 'report.html'}")


def report_of(
    given: argparse.Namespace, config: TournamentConfig, findings: Findings, measurer: Measurer
) -> EvaluationReport:
    """All that the page says, energy and oracle measured for it."""
    metric, target = HEADLINE
    protocol, timed = config.assess.protocol, config.assess.timed_documents
    families = findings.picks[metric.name, target]
    runs = {family: runs_of(findings, metric, target, family) for family in families}
    exits = {family: mine for family, mine in runs.items() if mine[0].contender.setting is not None}
    engine, test = measurer.engine, measurer.split("test")
    energy = measure_energy(
        engine,
        [mine[0].contender.policy for mine in exits.values()],
        test.documents[:ENERGY_DOCUMENTS],
        protocol,
    )
    recorded = load_training_data(given.out / "traces").train.header.exits
    oracle = measure_oracle(engine, test, protocol, recorded, timed)
    bound = [matched_row(ORACLE, [oracle], findings.test[0], AGREEMENT, each) for each in TARGETS]
    promises = gaps(list(findings.test.values()))
    folder = given.out / "report"
    chosen = min(config.choosing_documents, given.validation)
    return EvaluationReport(
        title="Learned early exits at matched quality",
        headlines=[
            savings_headline(findings.matched, metric, target),
            savings_headline(findings.matched, AGREEMENT, 0.05),
            gap_headline(promises),
        ],
        conditions=conditions(
            engine,
            protocol,
            {
                "validation": len(findings.validation[0].scores.tokens_D),
                "test": len(test.documents),
            },
            threads=config.spec.threads,
            seeds=", ".join(map(str, range(given.seeds))),
            training=f"{given.steps:,} PPO steps a seed",
            timed=f"{timed} test documents; {chosen} validation documents for the choice",
        ),
        matched=with_energy([*findings.matched, *bound], list(exits), energy),
        points=matched_points(findings, (AGREEMENT, EDIT_SIMILARITY)),
        gaps=promises,
        depths={
            family: dict(sum((Counter(run.scores.depths) for run in mine), Counter()))
            for family, mine in exits.items()
        },
        layers=engine.stack.layers,
        extra=[
            energy_section([(each, each) for each in exits], energy, ENERGY_DOCUMENTS, folder),
            comparisons(runs, PAIRS),
            volumes(list(findings.test.values()), (AGREEMENT, EDIT_SIMILARITY)),
        ],
    )


def prepare(given: argparse.Namespace, tell: Callable[[str, int, int], None]) -> None:
    """Traces and policies, where they are not there yet."""
    traces, policies = given.out / "traces", given.out / "policies"
    if not is_whole(traces):
        recording = RecordConfig(
            worker=worker(given), corpus=given.corpus, documents=given.documents,
            tokens_per_document=given.tokens_per_document, exits=given.exits,
            states=given.families is None,
        )  # fmt: skip
        with ray_session(None, 2):
            record_traces(recording, traces, tell)
    for seed in range(given.seeds):
        folder = policies / f"seed-{seed}"
        if not (folder / INDEX).exists():
            jump = JumpConfig()
            config = TrainConfig(
                traces=str(traces),
                seed=seed,
                targets=tuple(given.targets),
                gate=PPOConfig(steps=given.steps),
                jump=replace(jump, ppo=replace(jump.ppo, steps=given.steps)),
            )
            train_lineup(config, folder, lambda who, *n, s=seed: tell(f"seed {s}: {who}", *n),
                         given.families)  # fmt: skip


def worker(given: argparse.Namespace) -> WorkerSpec:
    """What records and what scores; its folders as actors elsewhere on this machine see them."""
    folder = Path(given.model)
    return WorkerSpec(
        model=str(folder.resolve()) if folder.exists() else given.model,
        dtype=given.dtype,
        threads=1,
        slots=16,
        engine=EngineConfig(
            kv_mode=given.kv_mode, translators=given.translators and given.translators.resolve()
        ),
    )


def tournament(given: argparse.Namespace) -> TournamentConfig:
    protocol = Protocol(
        lines=given.lines, new_tokens=given.tokens, prompt_tokens=given.prompt,
        timed_tokens=min(TIMED_TOKENS, given.tokens - 1),
    )  # fmt: skip
    assess = AssessConfig(
        model=given.model, corpus=given.corpus, corpus_limit=given.documents,
        validation_documents=given.validation, test_documents=given.test,
        timed_documents=given.timed, protocol=protocol,
    )  # fmt: skip
    return TournamentConfig(
        assess=assess, spec=worker(given), processes=given.processes,
        choosing_documents=2 if given.quick else 6,
    )  # fmt: skip


def with_energy(
    rows: Sequence[MatchedRow], families: Sequence[str], energy: Energy
) -> list[MatchedRow]:
    """Rows of the headline's target, with what was metered."""
    ratios = dict(zip(families, energy.ratios, strict=True))
    metered = []
    for row in rows:
        ratio = ratios.get(row.policy)
        if ratio is not None and (row.metric, row.target_loss) == (HEADLINE[0].name, HEADLINE[1]):
            row = replace(
                row,
                energy_ratio=ratio.value,
                energy_ratio_low=ratio.low,
                energy_ratio_high=ratio.high,
                energy_method=energy.method.value,
            )
        metered.append(row)
    return metered


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
