"""Record traces: Ray workers decode documents, the store takes their chunks.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util import ActorPool

from offramp.agents.recording.corpus import SPLIT, load_corpus, tokenize, window, write_split
from offramp.agents.recording.documents import Document
from offramp.agents.recording.own_text import OWN_TEXT, Batch, OwnText, begin_all, speak_all
from offramp.agents.recording.record_config import (
    RECORDED_SPLITS,
    RecordConfig,
    quarters,
    require_exits,
)
from offramp.agents.recording.recording import TextWindow, begin, begun_store, forget_if_empty
from offramp.agents.recording.training_data import COSTS, has_begun, is_whole, save_facts
from offramp.controller.adapters.adapter_folder import keep_adapters
from offramp.controller.costs.cost_file import save_costs
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.traces.candidate_file import load_candidates
from offramp.envs.traces.store import TraceStore
from offramp.worker.model.loading import check_model, layers_and_vocab, load_tokenizer
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.recording.recording_actor import TraceRecorderActor
from offramp.worker.spec import ModelFacts

Progress = Callable[[str, int, int], None]
"""Told (what is going on, units done, units in all)."""

TOLD_EVERY_S = 1.0
"""Seconds between two words on how far the measuring of costs is."""


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
        folder: Where the store is created, with candidates, costs and split beside it, and the
            adapters that exits are read through.
        on_progress: Told of "own text" in texts, if that is wanted, of "record" in tokens, and of
            "costs" in seconds of measuring.

    Raises:
        TraceError: the corpus is empty; the folder holds something else than this recording; or
            it cannot be written.
        ModelError: a recorder cannot load the model.
        ConfigError: the adapters cannot be copied.
    """
    check_model(config.worker.model)
    exits = _exits(config)
    if is_finished(config, folder):
        return RecordReport(folder=folder, documents={}, tokens=0, seconds=0.0, exits=exits)
    documents = load_corpus(config.corpus, limit=config.documents)
    begin(folder, config.settings(exits))
    recorders: list[Any] = []
    try:
        recorders += [TraceRecorderActor.remote(config.worker) for _ in range(config.recorders)]
        facts = ray.get([recorder.describe.remote() for recorder in recorders])[0]
        _require_context(config, facts)
        write_split(documents, folder / SPLIT)
        save_facts(folder, facts)
        _keep_adapters(config, folder)
        if config.own_text is None:
            texts, windows = _as_they_are(config, documents)
        else:
            texts, windows = _own(
                config, config.own_text, folder, recorders, documents, on_progress
            )
        store = _store(config, folder, facts, exits, texts, windows)
        table = ray.put(load_candidates(folder))
        ray.get([each.prepare.remote(exits, table, config.states) for each in recorders])
        left = windows[len(store.chunks) :]
        seconds = _record_all(recorders, left, store, on_progress)
        save_costs(folder / COSTS, _measured(recorders[0], config.profile_s, on_progress))
    except BaseException:
        # The beginning of a recording would only be in the way of the next one.
        forget_if_empty(folder)
        raise
    finally:
        for recorder in recorders:
            ray.kill(recorder)
    counts = {s: sum(each.document.split == s for each in left) for s in RECORDED_SPLITS}
    tokens = sum(each.rows for each in left)
    return RecordReport(
        folder=folder, documents=counts, tokens=tokens, seconds=seconds, exits=exits
    )


def _keep_adapters(config: RecordConfig, folder: Path) -> None:
    """Copy what the exits are read through to where training finds it."""
    adapters = config.worker.engine.translators
    if adapters is not None and adapters.exists():  # a cluster's workers may have it elsewhere
        keep_adapters(adapters, folder)


def is_finished(config: RecordConfig, folder: Path) -> bool:
    """Whether a folder holds this recording, carried to its end.

    Raises:
        TraceError: it holds a recording that was begun under other settings.
    """
    if has_begun(folder):
        begin(folder, config.settings(_exits(config)))
    return is_whole(folder)


def _exits(config: RecordConfig) -> tuple[int, ...]:
    layers, _ = layers_and_vocab(config.worker.model)
    exits = config.exits or quarters(layers)
    require_exits(exits, layers)
    return exits


def _as_they_are(
    config: RecordConfig, documents: Sequence[Document]
) -> tuple[list[list[int]], list[TextWindow]]:
    """Training texts that candidates are counted in, and what is recorded: people's text."""
    tokenized = tokenize(config.worker.model, documents)
    train = [tokens for document, tokens in tokenized if document.split == "train"]
    windows = [
        TextWindow(document, window(document, tokens, config.tokens_per_document + 1))
        for document, tokens in tokenized
        if document.split in RECORDED_SPLITS and len(tokens) > 1
    ]
    return train, windows


def _own(
    config: RecordConfig,
    own: OwnText,
    folder: Path,
    recorders: list[Any],
    documents: Sequence[Document],
    on_progress: Progress,
) -> tuple[list[list[int]], list[TextWindow]]:
    """The same of what the model says after the documents' beginnings."""
    facts: ModelFacts = ray.get(recorders[0].describe.remote())
    lengths = own.lengths(config.tokens_per_document + 1)
    wanted = [each for each in documents if each.split in RECORDED_SPLITS]
    prompts = begin_all(load_tokenizer(config.worker.model), wanted, lengths, facts.context)
    settings = {**asdict(own), "new_tokens": lengths[1], "model": facts.model}

    def speak(batches: Iterable[Batch]) -> Iterator[list[list[int]]]:
        yield from ActorPool(recorders).map(
            lambda actor, batch: actor.go_on.remote(
                batch[0], lengths[1], own.temperature, batch[1]
            ),
            batches,
        )

    spoken = speak_all(
        folder / OWN_TEXT, settings, prompts, speak, lambda *count: on_progress("own text", *count)
    )
    train = [each.tokens for each in spoken if each.document.split == "train"]
    return train, [TextWindow(each.document, each.tokens, len(each.prompt)) for each in spoken]


def _store(
    config: RecordConfig,
    folder: Path,
    facts: ModelFacts,
    exits: tuple[int, ...],
    texts: Sequence[Sequence[int]],
    windows: Sequence[TextWindow],
) -> TraceStore:
    """The store that windows are recorded in, with the candidates that training texts give."""
    if not windows:
        raise TraceError("corpus", "has no training document", "Use more documents")
    header = TraceHeader(
        model=facts.model,
        schema=CANDIDATES_V1.digest,
        exits=exits,
        layers=facts.layers,
        translators=facts.translators,
        adapters=tuple(layer for layer in exits if layer in facts.adapters),
        width=facts.width if config.states else 0,
        text=config.own_text.name if config.own_text else "",
    )
    table_VK = successor_table(texts, facts.vocab, config.candidates)
    return begun_store(folder, header, table_VK, windows)


def _measured(recorder: Any, limit_s: float, on_progress: Progress) -> CostTable:
    """What a token's parts cost in a recorder's process, while no other works."""
    start, found = time.perf_counter(), recorder.measure.remote(limit_s)
    while not ray.wait([found], timeout=TOLD_EVERY_S)[0]:
        done = min(time.perf_counter() - start, limit_s)
        on_progress("costs", round(done), round(limit_s))
    costs = ray.get(found)
    assert isinstance(costs, CostTable)
    return costs


def _require_context(config: RecordConfig, facts: ModelFacts) -> None:
    if config.tokens_per_document > facts.context:
        raise ConfigError(
            "tokens_per_document",
            f"{config.tokens_per_document} exceed the model's context of {facts.context}",
        )


def _record_all(
    recorders: list[Any], windows: Sequence[TextWindow], store: TraceStore, on_progress: Progress
) -> float:
    split = {each.document.digest: each.document.split for each in windows}
    done = sum(chunk.rows for chunk in store.chunks)
    total = done + sum(each.rows for each in windows)
    start = time.perf_counter()
    # Ordered, so that the same corpus always gives the same store and the same training run.
    chunks = ActorPool(recorders).map(
        lambda actor, each: actor.record.remote(each.document.digest, each.tokens, each.first),
        windows,
    )
    for chunk in chunks:
        assert isinstance(chunk, TraceChunk)
        store.append(chunk, split[chunk.document])
        done += len(chunk)
        on_progress("record", done, total)
    return time.perf_counter() - start
