"""What a policy's line completions lose against full depth's, in edit similarity.

The lines are CodeXGLUE's (``agents/evaluation/lines.py``), cut within the calibration windows. A
line's loss is max(0, similarity of full depth's completion − that of the policy's), each to the
document's own line, in [0, 1]. A line that the policy completes better is not set off against
another, so what is bounded is at least the drop of the mean edit similarity, in points. A document
is a unit; its loss is the mean over its lines, which share its style.

Shape suffixes: N documents, L lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from offramp.agents.calibration.losses import CalibrationDocument, serving_mode
from offramp.agents.calibration.pvalues import Losses
from offramp.agents.evaluation.lines import Line, complete, cut_lines, edit_similarity
from offramp.agents.evaluation.statistics import Floats
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.release.certificate import DecodeMode, Unit
from offramp.worker.engine.engine import AdaptiveEngine

LINES = 4
"""Lines completed in each document at most."""

LONGEST = 24
"""Tokens of a completion at most."""


def with_lines(
    documents: Sequence[CalibrationDocument], tokenizer: object, prompt_tokens: int
) -> list[tuple[CalibrationDocument, list[Line]]]:
    """The documents whose window holds a line to complete, with up to ``LINES`` of them.

    Args:
        documents: Windows of documents.
        tokenizer: The tokenizer that made their tokens.
        prompt_tokens: Tokens before a cut at most.

    Raises:
        TraceError: no window holds one.
    """
    cut = [
        cut_lines(
            each.tokens,
            tokenizer,
            count=LINES,
            context=prompt_tokens,
            longest=LONGEST,
            digest=each.digest,
        )
        for each in documents
    ]
    found = [(each, lines) for each, lines in zip(documents, cut, strict=True) if lines]
    if not found:
        raise TraceError(
            "calibration documents",
            f"none of {len(documents)} windows holds a line of at most {LONGEST} tokens",
            "Raise --new-tokens, or give a larger --corpus",
        )
    return found


class CompletedLines:
    """Completes lines with the exits really taken, greedily, each up to its end.

    Args:
        engine: Idle, with a tokenizer, in mode ``project`` or ``defer``.
        lines: The lines of each document, one or more.

    Raises:
        ConfigError: the engine verifies: there is no loss to bound.
    """

    loss = "edit similarity lost in line completion"
    new_tokens = LINES * LONGEST

    def __init__(self, engine: AdaptiveEngine, lines: Sequence[Sequence[Line]]) -> None:
        self.decode_mode: DecodeMode = serving_mode(engine)
        self._engine = engine
        self._lines_L = [line for mine in lines for line in mine]
        ends = np.cumsum([0, *map(len, lines)])
        self._documents_N = [slice(start, end) for start, end in pairwise(ends)]
        self._full_L = self._similarities(NeverExit())

    def losses(self, policy: Policy, unit: Unit) -> Losses:
        """Each document's mean over its lines, [N].

        Raises:
            ConfigError: tokens are asked for as units.
        """
        if unit != "document":
            raise ConfigError("unit", f"a line's loss is not of any {unit}", "Use document")
        lost_L = np.maximum(0.0, self._full_L - self._similarities(policy))
        return np.asarray([lost_L[place].mean() for place in self._documents_N])

    def _similarities(self, policy: Policy) -> Floats:
        """Edit similarity of each completion to the document's line, in [0, 1]; [L]."""
        texts = complete(self._engine, self._lines_L, policy, LONGEST)
        pairs = zip(texts, self._lines_L, strict=True)
        return np.asarray([edit_similarity(text, line.target) / 100 for text, line in pairs])
