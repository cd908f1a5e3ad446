"""Prompts that are cut from documents: to learn from, and in mid-line, to complete and to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.agents.evaluation.lines import Line, cut_lines
from offramp.agents.prompting.prompt_config import LEAST_DOCUMENTS, PromptLessonConfig
from offramp.agents.recording.corpus import load_corpus, long_documents, window
from offramp.agents.recording.documents import Document, Split
from offramp.controller.errors import TraceError

LONGEST = 48
"""Tokens of a completed line at most."""

TRIES = 4
"""Places that are tried for each line: one too near a document's beginning makes a short prompt."""

Long = list[tuple[Document, list[int]]]
"""Documents with their tokens."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A prompt, and the document's own next tokens, which are scored behind it."""

    prompt: tuple[int, ...]
    following: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReadTask:
    """A prompt from a document, the rest of its line, and the document's own next tokens."""

    document: int
    line: Line
    following: tuple[int, ...]

    @property
    def stretch(self) -> Stretch:
        """What is scored by its loss."""
        return Stretch(self.line.prompt, self.following)


@dataclass(frozen=True, slots=True, kw_only=True)
class LessonPrompts:
    """What is learned from, what chooses, and what the result is reported on."""

    train: list[Stretch]
    validation: list[Stretch]
    test: list[ReadTask]


def lesson_prompts(config: PromptLessonConfig, tokenizer: Any) -> LessonPrompts:
    """Cut a prompt from each document that is twice as long, or longer.

    Raises:
        TraceError: the corpus cannot be read, or a split has too few such documents.
        ModelError: the model has no tokenizer.
    """
    corpus = load_corpus(Path(config.corpus) if config.corpus else None)
    train = _long(config, corpus, "train", config.train_documents)
    validation = _long(config, corpus, "validation", config.validation_documents)
    test = tasks_from(
        _long(config, corpus, "test", config.test_documents),
        tokenizer,
        lines=1,
        prompt=config.prompt_tokens,
        following=config.following,
    )
    _require("test", len(test), 2 * config.prompt_tokens)
    return LessonPrompts(
        train=[_stretch(config, *each) for each in train],
        validation=[_stretch(config, *each) for each in validation],
        test=test,
    )


def tasks_from(
    documents: Long, tokenizer: Any, *, lines: int, prompt: int, following: int
) -> list[ReadTask]:
    """Cut prompts of exactly so many tokens, each with a line to complete.

    Args:
        documents: With their tokens; those too short for it give none.
        tokenizer: The tokenizer that made them.
        lines: Lines of each document at most.
        prompt: Tokens of a prompt.
        following: Tokens behind it that are scored.
    """
    found: list[ReadTask] = []
    for number, (document, tokens) in enumerate(documents):
        cut = cut_lines(
            tokens,
            tokenizer,
            count=TRIES * lines,
            context=prompt,
            longest=LONGEST,
            digest=document.digest,
        )
        whole = [each for each in cut if len(each.prompt) == prompt][:lines]
        for line in whole:
            end = _end_of(tokens, line.prompt)
            behind = tuple(tokens[end : end + following])
            if len(behind) == following:
                found.append(ReadTask(number, line, behind))
    return found


def _long(config: PromptLessonConfig, corpus: Sequence[Document], split: Split, count: int) -> Long:
    length = 2 * config.prompt_tokens + config.following
    texts = [each for each in corpus if each.split == split]
    found = long_documents(config.model, texts, length, count)
    _require(split, len(found), length)
    return found


def _require(split: str, found: int, length: int) -> None:
    if found < LEAST_DOCUMENTS:
        raise TraceError(
            "corpus",
            f"has {found} {split} documents of {length} tokens or more, of which prompts are cut, "
            f"and {LEAST_DOCUMENTS} are needed",
            "Add longer documents, or ask for shorter prompts",
        )


def _stretch(config: PromptLessonConfig, document: Document, tokens: list[int]) -> Stretch:
    cut = config.prompt_tokens
    part = tuple(window(document, tokens, cut + config.following))
    return Stretch(part[:cut], part[cut:])


def _end_of(tokens: Sequence[int], part: tuple[int, ...]) -> int:
    places = (n for n in range(len(tokens)) if tuple(tokens[n : n + len(part)]) == part)
    return next(places) + len(part)
