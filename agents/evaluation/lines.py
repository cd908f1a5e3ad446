"""Line completion by CodeXGLUE's protocol (Lu et al. 2021, line-level code completion).

A document is cut at a random place; what comes before is the prompt, and the rest of that line is
the target. The model decodes greedily up to the end of the line. Both are stripped. *Exact match*
compares them word by word, whatever the white space between; *edit similarity* is fuzzywuzzy's
``ratio``, in 0 … 100.

What differs from CodeXGLUE's py150 set: the documents are ours, as they are (no tokenised
literals), and a prompt holds at most so many tokens before the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from offramp.controller.policies.protocols import Policy
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.engine import AdaptiveEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One unfinished line: token ids before the cut, and the stripped rest of the line's text."""

    prompt: tuple[int, ...]
    target: str


def cut_lines(
    tokens: Sequence[int], tokenizer: Any, *, count: int, context: int, longest: int, digest: str
) -> list[Line]:
    """Cut a document at random token boundaries.

    Args:
        tokens: The whole document's token ids.
        tokenizer: The tokenizer that made them.
        count: Lines to cut at most; fewer where the document offers fewer.
        context: Tokens before a cut at most, and at least a quarter of it.
        longest: Lines whose rest is longer are left out, tokens.
        digest: The document's, hexadecimal: seeds the places, the same in every run.
    """
    least = max(1, context // 4)
    rng = np.random.default_rng(int(digest[:12], 16))
    lines: list[Line] = []
    for cut in rng.permutation(np.arange(least, max(least, len(tokens) - 1))):
        if len(lines) == count:
            break
        target = _rest_of_line(tokens[cut : cut + longest + 1], tokenizer)
        if target is not None:
            lines.append(Line(prompt=tuple(tokens[max(0, cut - context) : cut]), target=target))
    return lines


def complete(
    engine: AdaptiveEngine, lines: Sequence[Line], policy: Policy, longest: int
) -> list[str]:
    """Greedy completions up to the end of the line, stripped, as many at a time as fit.

    A completion that has no end after ``longest`` tokens is cut there.
    """
    if not lines:
        return []
    sampling = SamplingParams(max_tokens=longest, stop=("\n",))
    completions = engine.generate([list(line.prompt) for line in lines], sampling, policy)
    return [completion.text.strip() for completion in completions]


def exact_match(prediction: str, target: str) -> bool:
    """Whether two lines hold the same words.

    >>> exact_match("return  x", "return x")
    True
    """
    return prediction.split() == target.split()


def edit_similarity(prediction: str, target: str) -> int:
    """fuzzywuzzy's ``fuzz.ratio``: 100 · 2M / T, rounded, with difflib's matching blocks.

    M is the number of characters in the blocks, T that of both texts. CodeXGLUE's evaluator
    calls it; this is fuzzywuzzy without the optional C extension, whose numbers differ slightly.

    >>> edit_similarity("this is a test", "this is a test!")
    97
    """
    return round(100 * SequenceMatcher(None, prediction, target).ratio())


def _rest_of_line(tokens: Sequence[int], tokenizer: Any) -> str | None:
    """The text up to a newline, stripped; None if there is no newline, or nothing before it."""
    text, newline, _ = tokenizer.decode(list(tokens)).partition("\n")
    return text.strip() or None if newline else None
