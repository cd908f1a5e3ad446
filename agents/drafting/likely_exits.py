"""Exits that drafts are likely to pay at, by the model itself: how often each agrees, and its cost.

A look at some hundred tokens, before anything is recorded, so that no model begins with the exits
of another. Costs are counted in layers here; what they are by the clock is measured later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.documents import Document, encode
from offramp.agents.tuning.quality import measure, summarise
from offramp.worker.engine.engine import AdaptiveEngine

LOOKED_AT = 4
"""Documents that exits are looked at on."""

WINDOW = 128
"""Tokens of each."""

PARTS = 12
"""Exits lie at these parts of the depth, and before the last layer."""

LONGEST = 8
"""Most drafts between two passes at full depth."""

MOST = 4
"""Exits that drafters are offered."""

PAYS = 1.05
"""Times full depth below which an exit is not worth drafting at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelyExit:
    """An exit, and what fixed drafts there would be worth.

    Attributes:
        layer: Layers executed before it.
        agreement: Share of tokens on which it says what full depth says.
        rate: Times full depth at the best length, were every draft right so often and a layer's
            cost the same for several tokens.
    """

    layer: int
    agreement: float
    rate: float

    @property
    def pays(self) -> bool:
        """Whether drafts here are likely to be worth their time."""
        return self.rate >= PAYS


def likely_exits(
    engine: AdaptiveEngine, documents: Sequence[Document] | None = None, parts: int = PARTS
) -> list[LikelyExit]:
    """Look at exits as the engine reads them, through adapters if it has any; ascending.

    Args:
        engine: Idle, with a tokenizer.
        documents: Where agreement is counted; None: the standard library.
        parts: Parts of the depth at which exits are looked at, beside those with adapters.

    Raises:
        TraceError: a document does not fit the model's chat template.
    """
    stack, translators = engine.stack, engine.decoder.translators
    adapted = set(translators.layers)
    exits = {max(1, stack.layers * part // parts) for part in range(1, parts)} | adapted
    texts = load_corpus(None) if documents is None else documents
    tokens = [encode(engine.tokenizer, each)[: WINDOW + 1] for each in texts[:LOOKED_AT]]
    windows = [each for each in tokens if len(each) > 1]
    sums = measure(stack, translators, windows, sorted(exits | {stack.layers - 1} - {0}))
    rows = summarise(sums, sum(len(each) - 1 for each in windows))
    agreement = {row.layer: row.agreement for row in rows if row.layer < stack.layers}
    one_layer = sum(each.numel() for each in stack.last_layer.parameters())
    head = stack.head_weight_VD.numel() / one_layer
    return [
        LikelyExit(
            layer=layer,
            agreement=share,
            rate=draft_rate(share, layer + (layer in adapted) + head, stack.layers + head),
        )
        for layer, share in agreement.items()
    ]


def draft_rate(agreement: float, draft: float, full: float) -> float:
    """Times full depth of fixed drafts at their best length (LayerSkip, DEL's formula).

    Args:
        agreement: Share of drafts that are right, each by itself.
        draft: Cost of a draft, in layers, the head included.
        full: Cost of a pass at full depth, in layers, the head included.

    >>> round(draft_rate(0.8, 5, 15), 2), round(draft_rate(0.1, 25, 38), 2)
    (1.48, 0.66)
    """

    def rate(length: int) -> float:
        emitted = sum(agreement**right for right in range(length + 1))
        return emitted * full / (length * draft + full)

    return max(rate(length) for length in range(1, LONGEST + 1))


def best_of(exits: Sequence[LikelyExit]) -> tuple[int, ...]:
    """The layers of the best few, ascending."""
    found = sorted(exits, key=lambda each: -each.rate)[:MOST]
    return tuple(sorted(each.layer for each in found))
