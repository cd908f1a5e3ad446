"""The model's own text: prompts are the beginnings of documents, and the model goes on.

Lossless decoding emits what full depth says, so that this is the text which drafts are made of. It
is written batch by batch to a file of JSON lines, which a run that was cut off goes on with.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.agents.recording.documents import Document, encode, encode_turns
from offramp.controller.errors import ConfigError, TraceError
from offramp.envs.traces.store import write_traces

OWN_TEXT = "own_text.jsonl"
"""The texts: a line of settings, then a line per document with the ids of prompt and new tokens."""

TOGETHER = 16
"""Prompts that the model goes on from side by side; a file holds whole batches."""

LEAST_NEW = 2
"""Tokens below which a text has nothing to record: the first comes from reading the prompt."""

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnText:
    """How the model is asked for text of its own.

    Attributes:
        temperature: 0 decodes greedily; else logits are divided by it.
        prompt_share: Share of a text's tokens that is prompt, the document's beginning. Of a
            conversation the prompt is all before its first answer, by the model's chat template.
    """

    temperature: float = 0.0
    prompt_share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            problem = f"{self.temperature} is no temperature"
            raise ConfigError("temperature", problem, "Use 0 for greedy text, or try 0.7")
        if not 0 < self.prompt_share < 1:
            raise ConfigError("prompt_share", f"{self.prompt_share} is not in (0, 1)", "Try 0.25")

    @classmethod
    def asked_for(cls, wanted: bool, temperature: float, prompt_share: float) -> OwnText | None:
        """Read the options of a command line; None where people's text is wanted.

        Raises:
            ConfigError: a value is out of range, or a temperature nothing is drawn at.
        """
        asked = cls(temperature=temperature, prompt_share=prompt_share)
        if temperature and not wanted:
            raise ConfigError("temperature", "does nothing without --own-text", "Give both")
        return asked if wanted else None

    @property
    def name(self) -> str:
        """Whose text it is, in words, for manifests."""
        how = f"at temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"the model's own, {how}"

    def lengths(self, tokens: int) -> tuple[int, int]:
        """Prompt and new tokens of a text of so many."""
        prompt = max(1, round(self.prompt_share * tokens))
        return prompt, max(LEAST_NEW, tokens - prompt)


@dataclass(frozen=True, slots=True)
class Spoken:
    """A document's beginning, and what the model said after it."""

    document: Document
    prompt: list[int]
    new: list[int]

    @property
    def tokens(self) -> list[int]:
        """The whole text."""
        return [*self.prompt, *self.new]


Batch = tuple[list[list[int]], list[int]]
"""Prompts, and a seed of each."""

Speak = Callable[[Iterable[Batch]], Iterable[list[list[int]]]]
"""Gives the new tokens of each batch, in order."""


def only_texts(folder: Path, *made_anew: str) -> bool:
    """Whether a run that was cut off left the model's texts, and at most files made anew."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return names - set(made_anew) == {OWN_TEXT}


def beginning(tokenizer: Any, document: Document, length: int) -> list[int]:
    """The prompt that a document makes: its first tokens, or all before its first answer.

    Raises:
        TraceError: a conversation, and the model has no chat template for it.
    """
    if not document.turns:
        return encode(tokenizer, document)[:length]
    roles = [role for role, _ in document.turns]
    asked = document.turns[: roles.index("assistant")] if "assistant" in roles else document.turns
    return encode_turns(tokenizer, document.path, asked, answers=True) if asked else []


def begin_all(
    tokenizer: Any, documents: Iterable[Document], lengths: tuple[int, int], context: int
) -> list[tuple[Document, list[int]]]:
    """The documents that make a prompt which leaves room in the context, with their prompts.

    Raises:
        TraceError: none does, or as ``beginning``.
    """
    prompts = [(each, beginning(tokenizer, each, lengths[0])) for each in documents]
    found = [pair for pair in prompts if 0 < len(pair[1]) <= context - lengths[1]]
    if len(found) < len(prompts):
        LOG.warning("%d documents make no prompt that fits", len(prompts) - len(found))
    if not found:
        raise TraceError("corpus", "makes no prompt that fits the model's context", "Use others")
    return found


def speak_all(
    path: Path,
    settings: dict[str, Any],
    prompts: Sequence[tuple[Document, list[int]]],
    speak: Speak,
    on_text: Callable[[int, int], None] = lambda *_: None,
) -> list[Spoken]:
    """What the model says after every prompt; those of an earlier run are read back.

    Args:
        path: File that texts are kept in: each batch is durable once it is there.
        settings: All that decides what the model says, beside the prompts.
        prompts: Documents and the prompts they make.
        speak: Goes on from batches of prompts.
        on_text: Told (texts so far, in all) after each batch.

    Returns:
        The texts with something to record.

    Raises:
        TraceError: the file is of other settings or prompts, or cannot be written.
    """
    texts = _kept(path, settings, prompts)
    on_text(len(texts), len(prompts))
    left = prompts[len(texts) :]
    batches = [left[start : start + TOGETHER] for start in range(0, len(left), TOGETHER)]
    asked = [
        ([prompt for _, prompt in batch], [int(doc.digest[:8], 16) for doc, _ in batch])
        for batch in batches
    ]
    for batch, new in zip(batches, speak(asked), strict=True):
        spoken = [Spoken(*pair, tokens) for pair, tokens in zip(batch, new, strict=True)]
        _append(path, ([] if texts else [json.dumps(settings)]) + [_line(each) for each in spoken])
        texts += spoken
        on_text(len(texts), len(prompts))
    return [each for each in texts if len(each.new) >= LEAST_NEW]


def _line(spoken: Spoken) -> str:
    return json.dumps(
        {"document": spoken.document.digest, "prompt": spoken.prompt, "new": spoken.new}
    )


def _append(path: Path, lines: Sequence[str]) -> None:
    """Add lines durably: all of them, or, if that fails, none."""
    before = path.stat().st_size if path.exists() else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with path.open("ab") as file:
            file.truncate(before)
        raise TraceError(
            str(path),
            f"cannot be written ({error.strerror or error})",
            "Make room, and run the same command again: what lies there already is whole",
        ) from error


def _kept(
    path: Path, settings: dict[str, Any], prompts: Sequence[tuple[Document, list[int]]]
) -> list[Spoken]:
    """Whole batches of an earlier run; what was cut off behind them is forgotten."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # the last is empty, or was cut off
    try:
        told = json.loads(lines[0]) if lines else settings
        texts = [json.loads(line) for line in lines[1:]]
        found = [(each["document"], each["prompt"], each["new"]) for each in texts]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceError(
            str(path), f"is unreadable ({error})", "Remove it to begin anew"
        ) from error
    other = "Give the settings it was written with, or another folder"
    if told != settings:
        raise TraceError(str(path), f"is text of {told}, not {settings}", other)
    wanted = [(document.digest, prompt) for document, prompt in prompts[: len(found)]]
    if [text[:2] for text in found] != wanted:
        raise TraceError(str(path), "is text of other documents", other)
    whole = len(found) if len(found) == len(prompts) else len(found) // TOGETHER * TOGETHER
    if not whole:
        path.unlink()
        return []
    kept = b"".join(line + b"\n" for line in lines[: 1 + whole])
    if kept != path.read_bytes():
        write_traces(path, kept)
    return [Spoken(pair[0], *text[1:]) for pair, text in zip(prompts, found[:whole], strict=False)]
