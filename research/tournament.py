"""Many trained policies on held-out documents: score, choose on validation, report on test.

Scoring runs in several processes, for nothing is timed then; timing runs alone.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from offramp.agents.evaluation.assess import AssessConfig
from offramp.agents.evaluation.matched import (
    TARGETS,
    MatchedRow,
    Picks,
    choose,
    matched_row,
    needed,
)
from offramp.agents.evaluation.measure import Split, held_out, measure_quality, timed_document
from offramp.agents.evaluation.rows import Clock, Measured
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY, METRICS, Metric, Scores
from offramp.agents.placing.contenders import Contender, load_contenders
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.training.families import is_seeded
from offramp.controller.release.bundle import PolicyBundle
from offramp.research.archive import Archive, Times
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.spec import WorkerSpec, load_engine

OnRun = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TournamentConfig:
    """How a tournament is run.

    Attributes:
        assess: Documents and protocol.
        spec: What each process loads.
        processes: That score; timing has the machine for itself.
        choosing_documents: Validation documents that are timed.
    """

    assess: AssessConfig
    spec: WorkerSpec
    processes: int = 1
    choosing_documents: int = 6


@dataclass(frozen=True, slots=True)
class Entrant:
    """A saved policy that takes part.

    Attributes:
        folder: Of its bundle.
        key: Unique within the tournament.
        contender: What it is.
        seed: Of its training; None for rules.
        certified: Whether its bundle carries a certificate.
    """

    folder: Path
    key: str
    contender: Contender
    seed: int | None
    certified: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tournament found.

    Attributes:
        validation: Every entrant, full depth first.
        test: Those that some family picked, by their place in ``validation``.
        picks: Per (metric, target loss), each family's picks.
        matched: What they are worth on test documents.
    """

    validation: list[Measured]
    test: dict[int, Measured]
    picks: dict[tuple[str, float], Picks]
    matched: list[MatchedRow]


def gather(policies: Path, seeds: Sequence[int]) -> list[Entrant]:
    """The policies of ``seed-0``, ``seed-1``, …: rules of the first, learned ones of each.

    Raises:
        ConfigError: a folder holds no policies.
    """
    entrants = []
    for seed in seeds:
        folder = policies / f"seed-{seed}"
        for number, contender in enumerate(load_contenders(folder)):
            learned = is_seeded(contender.family)
            if learned or seed == seeds[0]:
                place = folder / f"{number:02d}"
                key = f"{folder.name}/{number:02d}"
                manifest = PolicyBundle.load(place).manifest
                certified = manifest.guarantee == "certified"
                run = seed if learned else None
                entrants.append(Entrant(place, key, contender, run, certified))
    return sorted(entrants, key=lambda each: each.contender.setting is not None)


def run_tournament(
    config: TournamentConfig,
    entrants: Sequence[Entrant],
    out: Path,
    on_run: OnRun = lambda *_: None,
) -> tuple[Outcome, AdaptiveEngine]:
    """Score and time all on validation documents, and what was picked there on test ones.

    Args:
        config: How.
        entrants: Full depth first.
        out: Where measurements are kept; what lies there is not measured again.
        on_run: Told (phase, runs done, runs in all).

    Raises:
        ConfigError: ``out`` was measured under other settings.
        TraceError: a split has fewer than two documents that are long enough.
    """
    assert entrants[0].contender.setting is None
    engine, _ = bench(config, "validation")
    settings = {
        **asdict(config.assess), "threads": config.spec.threads, "dtype": config.spec.dtype,
        "model": engine.model_fingerprint, "choosing_documents": config.choosing_documents,
    }  # fmt: skip
    archive = Archive.open(out, settings)
    validation = _measure(config, archive, entrants, "validation", on_run)
    metrics = [m for m in (AGREEMENT, EDIT_SIMILARITY) if m.is_measured(validation[0].scores)]
    picks = {
        (metric.name, target): choose(validation, metric, target)
        for metric in metrics
        for target in TARGETS
    }
    indices = needed(picks)
    measured = _measure(config, archive, [entrants[k] for k in indices], "test", on_run)
    test = dict(zip(indices, measured, strict=True))
    return Outcome(validation, test, picks, savings(picks, test, config.assess.seed)), engine


def savings(
    picks: dict[tuple[str, float], Picks], test: dict[int, Measured], seed: int
) -> list[MatchedRow]:
    """Every family at every target: its picks on test documents."""
    return [
        matched_row(family, [test[k] for k in chosen], test[0], METRICS[name], target, seed)
        for (name, target), families in picks.items()
        for family, chosen in families.items()
    ]


def runs_of(outcome: Outcome, metric: Metric, target: float, family: str) -> list[Measured]:
    """A family's picks for one target, measured on test documents."""
    return [outcome.test[index] for index in outcome.picks[metric.name, target][family]]


@functools.cache
def bench(config: TournamentConfig, split: str) -> tuple[AdaptiveEngine, Split]:
    """This process's engine, with the documents of a split."""
    assess = config.assess
    engine = load_engine(config.spec)
    corpus = load_corpus(assess.corpus, limit=assess.corpus_limit)
    count = assess.validation_documents if split == "validation" else assess.test_documents
    documents = held_out(assess.model, corpus, split, count, assess.protocol, engine.tokenizer)
    return engine, Split.of(engine, documents, assess.protocol)


def score(config: TournamentConfig, split: str, folder: Path, name: str) -> Scores:
    """Scores of a saved policy; what each scoring process runs."""
    engine, documents = bench(config, split)
    policy = PolicyBundle.load(folder).policy()
    return measure_quality(engine, policy, documents, config.assess.protocol, name)


def _measure(
    config: TournamentConfig,
    archive: Archive,
    entrants: Sequence[Entrant],
    split: str,
    on_run: OnRun,
) -> list[Measured]:
    _score_all(config, archive, entrants, split, on_run)
    found = [archive.scores(split, each.key) for each in entrants]
    scores = [each for each in found if each is not None]
    assert len(scores) == len(entrants)
    # Time is only asked of those that some target lets through.
    timed = [
        each
        for each, mine in zip(entrants, scores, strict=True)
        if split == "test" or _keeps(mine, scores[0])
    ]
    clocks = dict(
        zip(
            (each.key for each in timed),
            _time_all(config, archive, timed, split, on_run),
            strict=True,
        )
    )
    return [
        Measured(each.contender, each.seed, mine, clocks.get(each.key), each.certified)
        for each, mine in zip(entrants, scores, strict=True)
    ]


def _keeps(mine: Scores, full: Scores) -> bool:
    """Whether a policy keeps the loosest target by any of the metrics it is chosen by."""
    return any(
        metric.is_measured(full)
        and metric.loss(metric.of([mine]), metric.of([full])) <= max(TARGETS)
        for metric in (AGREEMENT, EDIT_SIMILARITY)
    )


def _score_all(
    config: TournamentConfig,
    archive: Archive,
    entrants: Sequence[Entrant],
    split: str,
    on_run: OnRun,
) -> None:
    missing = [each for each in entrants if archive.scores(split, each.key) is None]
    done = len(entrants) - len(missing)
    for entrant, scores in _scored(config, missing, split):
        archive.save_scores(split, entrant.key, scores)
        done += 1
        on_run(f"{split}: quality", done, len(entrants))


def _scored(
    config: TournamentConfig, entrants: Sequence[Entrant], split: str
) -> Iterator[tuple[Entrant, Scores]]:
    """Scores as they come, from this process or from several."""
    if config.processes == 1 or len(entrants) < 2:
        for each in entrants:
            yield each, score(config, split, each.folder, each.contender.name)
        return
    # Spawned: a fork of a process that runs torch may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.processes, mp_context=context) as pool:
        running = {
            pool.submit(score, config, split, each.folder, each.contender.name): each
            for each in entrants
        }
        for future in as_completed(running):
            yield running[future], future.result()


def _time_all(
    config: TournamentConfig,
    archive: Archive,
    entrants: Sequence[Entrant],
    split: str,
    on_run: OnRun,
) -> list[Clock]:
    torch.set_num_threads(config.spec.threads)
    engine, documents = bench(config, split)
    count = config.assess.timed_documents if split == "test" else config.choosing_documents
    times = []
    timed = documents.documents[:count]
    others = entrants[1:]
    for index, document in enumerate(timed):
        there = archive.times(split, index)
        missing = [each for each in others if each.key not in there]
        if missing:
            policies = [each.contender.policy for each in missing]
            protocol = config.assess.protocol
            for c, pair in timed_document(engine, policies, document, protocol, index):
                there[missing[c].key] = pair.seconds
            archive.save_times(split, index, there)
        times.append(there)
        on_run(f"{split}: time", index + 1, len(timed))
    return [_full_clock(others, times), *(_clock(each, times) for each in others)]


def _clock(entrant: Entrant, times: Sequence[Times]) -> Clock:
    mine_D, full_D = np.asarray([there[entrant.key] for there in times]).T
    return Clock(mine_D, full_D)


def _full_clock(others: Sequence[Entrant], times: Sequence[Times]) -> Clock:
    full_D = np.asarray([np.mean([there[each.key][1] for each in others]) for there in times])
    return Clock(full_D, full_D)
