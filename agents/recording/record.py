"""Record traces: Ray workers decode documents, the store takes their chunks.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool

from offramp.agents.recording.corpus import SPLIT, load_corpus, tokenize, window, write_split
from offramp.agents.recording.documents import Document
from offramp.agents.recording.recording import Window, begun_store, is_whole, require_no_store
from offramp.agents.recording.training_data import save_measured
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.exits import ascend, is_on_copy
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.traces.store import TraceStore
from offramp.worker.model.loading import check_model
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.recording.recording_actor import TraceRecorderActor
from offramp.worker.spec import ModelFacts, WorkerSpec

RECORDED_SPLITS = ("train", "validation")
"""Test documents are never recorded: they are only met on-policy, in evaluation."""


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
    config: RecordConfig,
    folder: Path,
    on_chunk: Callable[[int, int], None] = lambda *_: None,
    *,
    resume: bool = False,
) -> RecordReport:
    """Record the training and validation documents of a corpus into a trace store.

    Each document is durable once recorded. A recording that is cut off (killed, full disk) keeps
    them for ``resume``; with none it removes what it began.

    Args:
        config: What to record.
        folder: Where the store is created, with candidates, costs and split beside it.
        on_chunk: Told (tokens recorded so far, tokens in all) after each chunk.
        resume: Go on with what the folder holds, if it was recorded under these settings. A
            finished recording is left alone.

    Raises:
        TraceError: the corpus is empty; the folder already holds traces, or others than those to
            go on with; or it cannot be written.
        ModelError: a recorder cannot load the model.
    """
    if resume and is_whole(folder):
        found = TraceStore.open(folder).header.exits
        return RecordReport(folder=folder, documents={}, tokens=0, seconds=0.0, exits=found)
    check_model(config.worker.model)
    documents = load_corpus(config.corpus, limit=config.documents)
    tokenized = tokenize(config.worker.model, documents)
    if not resume:
        require_no_store(folder)
    begins = not folder.exists() or not any(folder.iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    recorders = [TraceRecorderActor.remote(config.worker) for _ in range(config.recorders)]
    try:
        facts = ray.get([recorder.describe.remote() for recorder in recorders])[0]
        _require_context(config, facts)
        exits = config.exits or quarters(facts.layers)
        require_exits(exits, facts.layers)
        windows, seconds = _record(config, folder, recorders, facts, exits, tokenized, on_chunk)
        write_split(documents, folder / SPLIT)
        save_measured(folder, ray.get(recorders[0].measure.remote()), facts)
    except BaseException:
        if begins and not any(folder.glob("*.parquet")):
            # The beginning of a recording would only be in the way of the next one.
            shutil.rmtree(folder, ignore_errors=True)
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
    on_chunk: Callable[[int, int], None],
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
    store = begun_store(folder, header, config.worker.dtype, candidates_VK, windows)
    left = windows[len(store.chunks) :]
    table = ray.put(candidates_VK)
    ray.get([each.prepare.remote(exits, table, config.states) for each in recorders])
    done = sum(chunk.rows for chunk in store.chunks)
    return left, _record_all(
        recorders, left, store, lambda new, more: on_chunk(done + new, done + more)
    )


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
