"""From trained contenders to the one that is published: choose on validation, report on test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.agents.contenders import LEARNED, Contender
from offramp.agents.corpus import Document, load_corpus
from offramp.agents.evaluate import EvaluationRow, evaluate
from offramp.agents.record import tokenize, window
from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.worker.engine import AdaptiveEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessConfig:
    """How to evaluate.

    Attributes:
        model: Folder of the model.
        corpus: Folder of documents; None takes the interpreter's standard library.
        corpus_limit: As in recording, so that the splits are cut from the same documents.
        validation_documents: Documents the choice is made on.
        test_documents: Documents the report is made on.
        timed_documents: Of those, how many are timed.
        timed_tokens: Tokens timed in each.
        prompt_tokens: Tokens of each document read at full depth first.
        new_tokens: Tokens decoded after them.
        target_agreement: Least on-policy agreement with full depth of what is published.
        threads: Torch threads.
        seed: Of the bootstrap.
    """

    model: str
    corpus: Path | None = None
    corpus_limit: int | None = 320
    validation_documents: int = 16
    test_documents: int = 24
    timed_documents: int = 12
    timed_tokens: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 96
    target_agreement: float = 0.93
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("validation_documents", "test_documents", "timed_documents", "timed_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1")
        if not 0 < self.target_agreement <= 1:
            raise ConfigError("target_agreement", f"{self.target_agreement} is not in (0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What was found.

    Attributes:
        validation: Rows the choice was made on (learned families, quality only).
        test: Rows of every contender, full depth first.
        chosen: Index into the contenders.
        reason: Why, in words.
    """

    validation: list[EvaluationRow]
    test: list[EvaluationRow]
    chosen: int
    reason: str


def assess(
    config: AssessConfig,
    engine: AdaptiveEngine,
    contenders: Sequence[Contender],
    costs: CostTable,
    on_run: Callable[[str, int, int], None] = lambda *_: None,
) -> Assessment:
    """Choose among the learned contenders on validation documents, then report all on test ones.

    Args:
        config: How to evaluate.
        engine: Idle, on the machine whose times count.
        contenders: Full depth first.
        costs: Measured costs; the cheapest contender that keeps the target is chosen.
        on_run: Told (split, runs done, runs in all).

    Raises:
        TraceError: a split has no document long enough.
    """
    torch.set_num_threads(config.threads)
    documents = load_corpus(config.corpus, limit=config.corpus_limit)
    learned = [contenders[0], *(c for c in contenders if c.family in LEARNED)]
    validation = evaluate(
        engine,
        learned,
        _tokens(config, documents, "validation", config.validation_documents),
        prompt_tokens=config.prompt_tokens,
        timed_documents=0,
        timed_tokens=0,
        seed=config.seed,
        on_run=lambda done, total: on_run("validation", done, total),
    )
    best, reason = choose(validation[1:], costs, config.target_agreement)
    tested = _tokens(config, documents, "test", config.test_documents)
    test = evaluate(
        engine,
        contenders,
        tested,
        prompt_tokens=config.prompt_tokens,
        timed_documents=min(config.timed_documents, len(tested)),
        timed_tokens=config.timed_tokens,
        seed=config.seed,
        on_run=lambda done, total: on_run("test", done, total),
    )
    chosen = contenders.index(learned[1 + best])
    return Assessment(validation=validation, test=test, chosen=chosen, reason=reason)


def choose(
    rows: Sequence[EvaluationRow], costs: CostTable, target_agreement: float
) -> tuple[int, str]:
    """Index of the cheapest row that keeps the target; of the most agreeing one if none does."""
    keeping = [index for index, row in enumerate(rows) if row.agreement >= target_agreement]
    if not keeping:
        best = max(range(len(rows)), key=lambda index: rows[index].agreement)
        return best, (
            f"no learned policy kept {target_agreement:.3f} agreement on validation; "
            f"{rows[best].policy} came closest with {rows[best].agreement:.3f}"
        )
    best = min(keeping, key=lambda index: expected_cost(rows[index], costs))
    return best, (
        f"{rows[best].policy} is the cheapest of {len(keeping)} learned policies that kept "
        f"{target_agreement:.3f} agreement on validation ({rows[best].agreement:.3f}), at "
        f"{expected_cost(rows[best], costs):.3f} of the full-depth cost"
    )


def expected_cost(row: EvaluationRow, costs: CostTable) -> float:
    """Mean cost of the exits really taken, in units of a full-depth token's time."""
    price = dict(zip((*row.exits, costs.layers), costs.leaving(row.exits), strict=True))
    return float(sum(price[layer] * count for layer, count in row.depths.items()) / row.tokens)


def _tokens(
    config: AssessConfig, documents: Sequence[Document], split: str, count: int
) -> list[list[int]]:
    length = config.prompt_tokens + config.new_tokens
    mine = [document for document in documents if document.split == split]
    encoded = tokenize(config.model, mine)
    long_enough = [window(doc, tokens, length) for doc, tokens in encoded if len(tokens) >= length]
    if not long_enough:
        raise TraceError(
            "corpus", f"no {split} document has {length} tokens", "Use more or longer documents"
        )
    return long_enough[:count]
