"""The evaluation protocol over the policies of several seeds, in several processes, resumable.

Scoring runs in parallel, for nothing is timed then; timing runs alone. Whatever was measured is
kept on disk, so that a tournament goes on where it was stopped.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import offramp.research.rulebook  # noqa: F401  # its families are then known as seeded or not
from offramp.agents.evaluation.archive import Archive, Times
from offramp.agents.evaluation.energy_ratios import Energy, energy_of, metered
from offramp.agents.evaluation.evaluation_rows import Measured
from offramp.agents.evaluation.matched import TARGETS, quality_metrics
from offramp.agents.evaluation.measure import (
    HeldOut,
    Protocol,
    measure_time,
    paired_costs,
    timed_document,
)
from offramp.agents.evaluation.protocol import (
    AssessConfig,
    Entrant,
    Findings,
    Measurer,
    OnRun,
    Taken,
    evaluate,
)
from offramp.agents.evaluation.scores import Metric, Scores
from offramp.agents.placing.contenders import load_saved
from offramp.agents.training.families import is_seeded
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.energy import open_meter
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.spec import WorkerSpec, load_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class TournamentConfig:
    """How a tournament is run.

    Attributes:
        assess: Documents, and what is measured on them.
        spec: What each process loads.
        processes: How many processes score; timing has the machine for itself.
        choosing_documents: Validation documents that are timed.
    """

    assess: AssessConfig
    spec: WorkerSpec
    processes: int = 1
    choosing_documents: int = 6


def gather(policies: Path, seeds: Sequence[int]) -> list[Entrant]:
    """The policies of ``seed-0``, ``seed-1``, …: rules of the first, learned ones of each.

    Raises:
        ConfigError: a folder holds no policies.
    """
    entrants = []
    for seed in seeds:
        folder = policies / f"seed-{seed}"
        for number, (contender, bundle) in enumerate(load_saved(folder)):
            learned = is_seeded(contender.family)
            if learned or seed == seeds[0]:
                certified = bundle.manifest.guarantee == "certified"
                place = folder / f"{number:02d}"
                entrants.append(Entrant(contender, seed if learned else None, certified, place))
    return sorted(entrants, key=lambda each: each.contender.setting is not None)


def run_tournament(
    config: TournamentConfig,
    entrants: Sequence[Entrant],
    out: Path,
    on_run: OnRun = lambda *_: None,
) -> tuple[Findings, Measurer]:
    """Score and time all on validation documents, and what was picked there on test ones.

    Args:
        config: How the tournament is run.
        entrants: Policies that ``gather`` found, full depth first.
        out: Where measurements are kept; what lies there is not measured again.
        on_run: Told how far each phase is.

    Returns:
        What was found, and what measured it.

    Raises:
        ConfigError: ``out`` was measured under other settings.
        TraceError: a split has fewer than two documents that are long enough.
    """
    assert entrants[0].contender.setting is None
    engine = load_engine(config.spec)
    settings = {
        **asdict(config.assess), "threads": config.spec.threads, "dtype": config.spec.dtype,
        "model": engine.model_fingerprint, "choosing_documents": config.choosing_documents,
    }  # fmt: skip
    measurer = ArchivingMeasurer(config, engine, Archive.open(out, settings), on_run)
    return evaluate(measurer, entrants, report_all=False), measurer


def runs_of(findings: Findings, metric: Metric, target: float, family: str) -> list[Measured]:
    """A family's picks for one target, measured on test documents."""
    return [findings.test[index] for index in findings.picks[metric.name, target][family]]


class ArchivingMeasurer(Measurer):
    """Scores in several processes, and measures nothing that the archive holds.

    Args:
        config: How the tournament is run.
        engine: Idle, on the machine whose times count.
        archive: Where measurements are kept.
        on_run: Told how far each phase is.
    """

    def __init__(
        self, config: TournamentConfig, engine: AdaptiveEngine, archive: Archive, on_run: OnRun
    ) -> None:
        super().__init__(config.assess, engine, on_run)
        self._tournament, self._archive = config, archive

    def scores(self, split: str, entrants: Sequence[Entrant]) -> list[Scores]:
        """What the output of each entrant is worth."""
        found = {key_of(each): self._archive.scores(split, key_of(each)) for each in entrants}
        missing = [each for each in entrants if found[key_of(each)] is None]
        for done, (entrant, scores) in enumerate(self._scored(split, missing), 1):
            found[key_of(entrant)] = scores
            self._archive.save_scores(split, key_of(entrant), scores)
            self.on_run(f"{split}: quality", len(entrants) - len(missing) + done, len(entrants))
        return [scores for scores in found.values() if scores is not None]

    def _scored(self, split: str, entrants: Sequence[Entrant]) -> Iterator[tuple[Entrant, Scores]]:
        """Scores as they come, from this process or from several."""
        config = self._tournament
        if config.processes == 1 or len(entrants) < 2:
            for each in entrants:
                yield each, score_saved(self, split, each.folder, each.contender.name)
            return
        # Spawned: a fork of a process that runs torch may hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config.processes, mp_context=context) as pool:
            running = {
                pool.submit(_score_there, config, split, each.folder, each.contender.name): each
                for each in entrants
            }
            for future in as_completed(running):
                yield running[future], future.result()

    def times(
        self, split: str, entrants: Sequence[Entrant], scores: Sequence[Scores]
    ) -> list[Taken]:
        """Seconds of those that may be picked, on the timed documents; no joules.

        Raises:
            ConfigError: field ``targets``; nobody is left but full depth.
        """
        torch.set_num_threads(self._tournament.spec.threads)
        count = self.config.timed_documents
        if split == "validation":
            count = self._tournament.choosing_documents
        documents, full = self.documents[split][:count], scores[0]
        timed = [
            each
            for each, mine in zip(entrants, scores, strict=True)
            if split == "test" or may_be_picked(mine, full)
        ]
        if len(timed) == 1:
            problem = f"none is left on {split} documents: each loses too much or saves no time"
            raise ConfigError("targets", problem, "Their scores lie in --out; try more --targets")
        seconds_CD: list[list[tuple[float, float]]] = [[] for _ in timed[1:]]
        for index, document in enumerate(documents):
            there = self._timed(split, index, document, timed[1:])
            for mine_D, each in zip(seconds_CD, timed[1:], strict=True):
                mine_D.append(there[key_of(each)])
            self.on_run(f"{split}: time", index + 1, len(documents))
        seconds = dict(zip((key_of(each) for each in timed), paired_costs(seconds_CD), strict=True))
        return [(seconds.get(key_of(each)), None) for each in entrants]

    def _timed(
        self, split: str, index: int, document: HeldOut, entrants: Sequence[Entrant]
    ) -> Times:
        there = self._archive.times(split, index)
        missing = [each for each in entrants if key_of(each) not in there]
        if missing:
            policies = [each.contender.policy for each in missing]
            protocol = self.config.protocol
            for c, pair in timed_document(self.engine, policies, document, protocol, index):
                there[key_of(missing[c])] = pair.seconds
            self._archive.save_times(split, index, there)
        return there


def key_of(entrant: Entrant) -> str:
    """The name of a saved policy in the archive, such as ``seed-0/03``."""
    assert entrant.folder is not None
    return f"{entrant.folder.parent.name}/{entrant.folder.name}"


def may_be_picked(mine: Scores, full: Scores) -> bool:
    """Whether a policy keeps the loosest target by any of the metrics it is chosen by."""
    return any(
        metric.loss(metric.of([mine]), metric.of([full])) <= max(TARGETS)
        for metric in quality_metrics(full)
    )


@functools.cache
def loaded(config: TournamentConfig) -> Measurer:
    """This process's engine and documents."""
    return Measurer(config.assess, load_engine(config.spec))


def score_saved(measurer: Measurer, split: str, folder: Path | None, name: str) -> Scores:
    """What the output of a saved policy is worth; as saved, for some go on learning in use."""
    assert folder is not None
    return measurer.score(split, PolicyBundle.load(folder).policy(), name)


def _score_there(config: TournamentConfig, split: str, folder: Path | None, name: str) -> Scores:
    """Score a saved policy in a process that scores."""
    return score_saved(loaded(config), split, folder, name)


def measure_energy(
    engine: AdaptiveEngine,
    policies: Sequence[Policy],
    documents: Sequence[HeldOut],
    protocol: Protocol,
) -> Energy:
    """Joules of decoding the timed tokens of each document at batch 1, interleaved.

    Args:
        engine: Idle, on the machine whose joules count.
        policies: One or more, without full depth, which is metered beside them.
        documents: Documents to decode.
        protocol: How much of each document is decoded.
    """
    pairs_CD = measure_time(engine, policies, documents, protocol, open_meter(engine))
    return energy_of(metered(pairs_CD)[1:], protocol.timed_tokens)
