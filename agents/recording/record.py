"""Record traces: Ray workers decode documents, the store takes their chunks.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool

from offramp.agents.recording.corpus import SPLIT, load_corpus, tokenize, window, write_split
from offramp.agents.recording.documents import Document
from offramp.agents.recording.recording import Window, begin, begun_store, forget_if_empty
from offramp.agents.recording.training_data import COSTS, has_begun, is_whole, save_facts
from offramp.controller.costs.cost_file import save_costs
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.exits import ascend, is_on_copy
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.traces.store import TraceStore
from offramp.worker.model.loading import check_model, layers_and_vocab
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.recording.recording_actor import RECORD_S, TraceRecorderActor
from offramp.worker.spec import ModelFacts, WorkerSpec

RECORDED_SPLITS = ("train", "validation")
"""Test documents are never recorded: they are only met on-policy, in evaluation."""

Progress = Callable[[str, int, int], None]
"""Told (what is going on, units done, units in all)."""

TOLD_EVERY_S = 1.0
"""Seconds between two words on how far the measuring of costs is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """Settings of a recording.

    Attributes:
        worker: What each recorder loads.
        corpus: Folder of documents; None takes the interpreter's standard library.
        documents: Documents to take from the corpus, over all splits; None takes all.
        tokens_per_document: Tokens recorded of each, from a place its digest picks.
        exits: Layers to probe; () places three at the quarters of the depth.
        candidates: Candidate tokens per token.
        recorders: Ray actors at work.
        states: Whether hidden states are kept too, as float16 (2·D bytes per exit and token).
    """

    worker: WorkerSpec
    corpus: Path | None = None
    documents: int | None = 320
    tokens_per_document: int = 256
    exits: tuple[int, ...] = ()
    candidates: int = 64
    recorders: int = 2
    states: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens_per_document", "recorders"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1")

    def settings(self, exits: tuple[int, ...]) -> dict[str, Any]:
        """What a recording is held to when it goes on, beside the model and its documents."""
        names = ("documents", "tokens_per_document", "candidates", "states")
        told = {name: getattr(self, name) for name in names}
        return {**told, "exits": exits, "dtype": self.worker.dtype}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReport:
    """What a recording came to.

    Attributes:
        folder: The trace store.
        documents: Documents recorded by this run, by split.
        tokens: Tokens recorded by it.
        seconds: Wall time of recording, model loading left out.
        exits: Layers after which every token was probed.
    """

    folder: Path
    documents: dict[str, int]
    tokens: int
    seconds: float
    exits: tuple[int, ...]

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all recorders together."""
        return self.tokens / self.seconds if self.seconds else 0.0


def record_traces(
    config: RecordConfig, folder: Path, on_progress: Progress = lambda *_: None
) -> RecordReport:
    """Record the training and validation documents of a corpus into a trace store.

    Each document is durable once recorded. A recording that is cut off (killed, full disk) goes on
    when it is asked for again; one that was carried to its end is left alone; one that kept
    nothing is removed.

    Args:
        config: What to record.
        folder: Where the store is created, with candidates, costs and split beside it.
        on_progress: Told of "record" in tokens, then of "costs" in seconds of measuring.

    Raises:
        TraceError: the corpus is empty; the folder holds something else than this recording; or
            it cannot be written.
        ModelError: a recorder cannot load the model.
    """
    exits = config.exits or quarters(layers_and_vocab(config.worker.model)[0])
    if has_begun(folder):
        begin(folder, config.settings(exits))
        if is_whole(folder):
            return RecordReport(folder=folder, documents={}, tokens=0, seconds=0.0, exits=exits)
    check_model(config.worker.model)
    documents = load_corpus(config.corpus, limit=config.documents)
    tokenized = tokenize(config.worker.model, documents)
    recorders = [TraceRecorderActor.remote(config.worker) for _ in range(config.recorders)]
    try:
        facts = ray.get([recorder.describe.remote() for recorder in recorders])[0]
        _require_context(config, facts)
        require_exits(exits, facts.layers)
        begin(folder, config.settings(exits))
        write_split(documents, folder / SPLIT)
        save_facts(folder, facts)
        windows, seconds = _record(config, folder, recorders, facts, exits, tokenized, on_progress)
        save_costs(folder / COSTS, _measured(recorders[0], on_progress))
    except BaseException:
        # The beginning of a recording would only be in the way of the next one.
        forget_if_empty(folder)
        raise
    finally:
        for recorder in recorders:
            ray.kill(recorder)
    counts = {s: sum(doc.split == s for doc, _ in windows) for s in RECORDED_SPLITS}
    tokens = sum(len(tokens) - 1 for _, tokens in windows)
    return RecordReport(
        folder=folder, documents=counts, tokens=tokens, seconds=seconds, exits=exits
    )


def _record(
    config: RecordConfig,
    folder: Path,
    recorders: list[Any],
    facts: ModelFacts,
    exits: tuple[int, ...],
    tokenized: list[tuple[Document, list[int]]],
    on_progress: Progress,
) -> tuple[list[Window], float]:
    """Create or open the store and fill it; the windows recorded, and the seconds it took."""
    train = [tokens for doc, tokens in tokenized if doc.split == "train"]
    candidates_VK = successor_table(train, facts.vocab, config.candidates)
    header = TraceHeader(
        model=facts.model,
        schema=CANDIDATES_V1.digest,
        exits=exits,
        layers=facts.layers,
        translators=facts.translators,
        width=facts.width if config.states else 0,
    )
    windows = [
        (doc, window(doc, tokens, config.tokens_per_document + 1))
        for doc, tokens in tokenized
        if doc.split in RECORDED_SPLITS and len(tokens) > 1
    ]
    if not windows:
        raise TraceError("corpus", "has no training document", "Use more documents")
    store = begun_store(folder, header, candidates_VK, windows)
    left = windows[len(store.chunks) :]
    table = ray.put(candidates_VK)
    ray.get([each.prepare.remote(exits, table, config.states) for each in recorders])
    done = sum(chunk.rows for chunk in store.chunks)
    return left, _record_all(
        recorders, left, store, lambda new, more: on_progress("record", done + new, done + more)
    )


def _measured(recorder: Any, on_progress: Progress) -> CostTable:
    """What a token's parts cost in a recorder's process, while no other works."""
    start, found = time.perf_counter(), recorder.measure.remote()
    while not ray.wait([found], timeout=TOLD_EVERY_S)[0]:
        done = min(time.perf_counter() - start, RECORD_S)
        on_progress("costs", round(done), round(RECORD_S))
    costs = ray.get(found)
    assert isinstance(costs, CostTable)
    return costs


def quarters(layers: int) -> tuple[int, ...]:
    """Exits after one, two and three quarters of the layers.

    >>> quarters(12)
    (3, 6, 9)
    """
    return tuple(sorted({max(1, layers * part // 4) for part in (1, 2, 3)}))


def _require_context(config: RecordConfig, facts: ModelFacts) -> None:
    if config.tokens_per_document > facts.context:
        raise ConfigError(
            "tokens_per_document",
            f"{config.tokens_per_document} exceed the model's context of {facts.context}",
        )


def require_exits(exits: tuple[int, ...], layers: int) -> None:
    """Refuse exits that are not layers of a model's own, ascending.

    Raises:
        ConfigError: naming them.
    """
    if not ascend(exits) or not all(e < layers and not is_on_copy(e) for e in exits):
        raise ConfigError(
            "exits", f"{exits} do not ascend within [1, {layers - 1}]", "Use layers of the model"
        )


def _record_all(
    recorders: list[Any],
    windows: list[tuple[Document, list[int]]],
    store: TraceStore,
    on_chunk: Callable[[int, int], None],
) -> float:
    split = {doc.digest: doc.split for doc, _ in windows}
    total = sum(len(tokens) - 1 for _, tokens in windows)
    done = 0
    start = time.perf_counter()
    pool = ActorPool(recorders)
    # Ordered, so that the same corpus always gives the same store and the same training run.
    chunks = pool.map(lambda actor, item: actor.record.remote(item[0].digest, item[1]), windows)
    for chunk in chunks:
        assert isinstance(chunk, TraceChunk)
        store.append(chunk, split[chunk.document])
        done += len(chunk)
        on_chunk(done, total)
    return time.perf_counter() - start
