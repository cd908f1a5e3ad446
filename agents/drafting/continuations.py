"""Record what drafts are trained on: the model's own greedy continuations of documents.

Lossless decoding emits what full depth says, so its text is the model's own, and along that text
a recorded token is exactly what the engine would meet: keys and values are exact in ``verify``.

Shape suffixes: T tokens, E exits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from offramp.agents.recording.documents import Document
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, IntArray
from offramp.controller.policies.exits import copy_weights
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.cores.draft_tables import CandidateDrafts
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.recording.copy_pass import CopyPass
from offramp.worker.recording.going_on import go_on
from offramp.worker.recording.recorder import record_document

TABLE_WIDTH = 2
"""Columns of the candidate table that recording asks for and the softmax probe never reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """How much of which documents is recorded.

    Attributes:
        exits: Layers to probe, ascending; those on the engine's copy in fewer bytes first.
        prompt_tokens: Tokens of each document that are read first; None: the whole document is a
            prompt.
        new_tokens: Tokens that the model goes on for.
        states: Whether hidden states are kept too, as float16 (2·D bytes per exit and token).
    """

    exits: tuple[int, ...]
    prompt_tokens: int | None = 64
    new_tokens: int = 192
    states: bool = False


def record_continuations(
    engine: AdaptiveEngine,
    documents: Sequence[tuple[Document, Sequence[int]]],
    config: Continuations,
    on_document: Callable[[int, int], None] = lambda *_: None,
    candidates_VK: IntArray | None = None,
    said: Sequence[Sequence[int]] | None = None,
) -> TokenTraces:
    """Continue every document at full depth, and probe the new tokens at every exit.

    Args:
        engine: Idle; its slots continue as many documents at a time.
        documents: With their token ids, the first ``prompt_tokens`` of which are the prompt.
        config: What to record.
        on_document: Told (documents recorded so far, documents in all).
        candidates_VK: Candidate table of policies that draft without the head.
        said: What the model said after each prompt, one token more than is recorded; None: it is
            asked now, greedily.

    Returns:
        ``CandidateDrafts`` if a table is given.

    Raises:
        TraceError: a document is shorter than its prompt.
        ConfigError: exits are on a copy that the engine does not have.
    """
    prompts = [list(tokens[: config.prompt_tokens]) for _, tokens in documents]
    least = config.prompt_tokens or 1
    if any(len(prompt) < least for prompt in prompts):
        problem = f"hold one of fewer than {least} tokens"
        raise TraceError("documents", problem, "Leave it out, or ask for shorter prompts")
    if said is None:
        said = go_on(engine, prompts, config.new_tokens + 1, ignore_eos=True)
    copy = _copy_pass(engine, config)
    chunks = []
    for (document, _), prompt, new in zip(documents, prompts, said, strict=True):
        text = (prompt, list(new))
        chunks.append(_record(engine, document, text, config, candidates_VK, copy))
        on_document(len(chunks), len(prompts))
    header = TraceHeader(
        model=engine.model_fingerprint,
        schema=(SOFTMAX_V2 if candidates_VK is None else CANDIDATES_V1).digest,
        exits=config.exits,
        layers=engine.stack.layers,
        translators=engine.decoder.translators.digest,
        adapters=tuple(
            layer for layer in config.exits if layer in engine.decoder.translators.layers
        ),
        width=engine.stack.width if config.states else 0,
    )
    kind = TokenTraces if candidates_VK is None else CandidateDrafts
    return kind.from_chunks(header, chunks)


def _copy_pass(engine: AdaptiveEngine, config: Continuations) -> CopyPass | None:
    """What runs new tokens on the engine's copy, if there are exits on it."""
    wanted = copy_weights(config.exits)
    if wanted is None:
        return None
    copy, precision = engine.decoder.context.copy, engine.config.draft_precision
    if copy is None or precision is None or precision.weights != wanted:
        raise ConfigError(
            "exits",
            f"({', '.join(map(str, config.exits))}) are on a copy that the engine does not have",
            f"Load it with draft_precision=Precision(weights={wanted!r})",
        )
    return CopyPass(engine.stack, copy.stack)


def _record(
    engine: AdaptiveEngine,
    document: Document,
    text: tuple[list[int], list[int]],
    config: Continuations,
    candidates_VK: IntArray | None,
    copy: CopyPass | None,
) -> TraceChunk:
    """The new tokens of a text (prompt, new): those that a decode step begins with."""
    prompt, new = text
    if copy is not None:
        copy.first = len(prompt)
    headless = candidates_VK is not None
    table_VK = candidates_VK
    if table_VK is None:
        table_VK = np.tile(np.arange(TABLE_WIDTH, dtype=np.int32), (engine.stack.vocab, 1))
    schema = CANDIDATES_V1 if headless else SOFTMAX_V2
    whole = record_document(
        engine.stack,
        document.digest,
        [*prompt, *new],
        config.exits,
        table_VK,
        schema,
        engine.decoder.translators,
        states=config.states,
        headless=headless,
        copy=copy,
    )
    return whole.after(len(prompt))
