"""The texts that exits are fitted to and measured on: people's, and the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from offramp.agents.recording.corpus import load_corpus, window
from offramp.agents.recording.documents import Document, encode
from offramp.agents.recording.own_text import (
    OWN_TEXT,
    TOGETHER,
    Batch,
    OwnText,
    Spoken,
    begin_all,
    speak_all,
)
from offramp.agents.tuning.stream import Encode
from offramp.agents.tuning.tune_config import OnTuning, TuneConfig
from offramp.controller.errors import TraceError
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.recording.going_on import go_on


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Windows that exits are measured on.

    Attributes:
        windows: Token ids of each; the last is only ever a label.
        firsts: Position in each of the first token measured.
    """

    windows: list[list[int]]
    firsts: list[int]

    @property
    def tokens(self) -> list[int]:
        """Tokens measured of each."""
        return [
            len(each) - 1 - first for each, first in zip(self.windows, self.firsts, strict=True)
        ]

    def few(self, count: int) -> HeldOutText:
        """The first windows of them."""
        return HeldOutText(self.windows[:count], self.firsts[:count])


@dataclass(frozen=True, slots=True)
class TuneTexts:
    """What one run reads.

    Attributes:
        train: Documents to fit to.
        encode: Gives the tokens of one: its own, or what the model says after its beginning.
        people: Held-out documents as they are.
        own: What the model says after their beginnings, prompts left out.
    """

    train: list[Document]
    encode: Encode
    people: HeldOutText
    own: HeldOutText


def chosen_documents(config: TuneConfig) -> tuple[list[Document], list[Document]]:
    """Documents to fit to, and those held out."""
    documents = load_corpus(config.corpus, limit=config.documents)
    train = [each for each in documents if each.split == "train"]
    return train, [each for each in documents if each.split == "validation"][: config.held_out]


def read_texts(
    config: TuneConfig,
    documents: tuple[list[Document], list[Document]],
    folder: Path,
    model: Any,
    tokenizer: Any,
    on_progress: OnTuning,
) -> TuneTexts:
    """All texts of a run; the model's own are written first, or read back from the folder.

    Args:
        config: Says whether the model's own text is fitted to, and how long windows are.
        documents: Documents to fit to, and those held out.
        folder: Keeps the model's own text.
        model: Hugging Face's; left as it is.
        tokenizer: The model's.
        on_progress: Told of "own text" in texts.

    Raises:
        TraceError: a split has no text, or the folder's texts are of other settings.
    """
    train, held_out = documents
    engine = AdaptiveEngine(model, tokenizer, slots=TOGETHER)
    own, lengths = (
        config.own_text or OwnText(),
        (config.own_text or OwnText()).lengths(config.length + 1),
    )
    prompts = begin_all(tokenizer, held_out, lengths, engine.stack.context)
    if config.own_text is not None:
        prompts += begin_all(tokenizer, train, lengths, engine.stack.context)

    def speak(batches: Iterable[Batch]) -> Iterator[list[list[int]]]:
        for tokens, seeds in batches:
            yield go_on(engine, tokens, lengths[1], own.temperature, seeds=seeds)

    settings = {
        **asdict(own), "new_tokens": lengths[1], "model": engine.model_fingerprint,
        "dtype": config.dtype,
    }  # fmt: skip
    spoken = speak_all(
        folder / OWN_TEXT,
        settings,
        prompts,
        speak,
        lambda n, all_: on_progress("own text", n, all_, ""),
    )
    by_digest = {each.document.digest: each.tokens for each in spoken}
    people: Encode = partial(encode, tokenizer)
    held = {each.digest for each in held_out}
    return TuneTexts(
        train=train if config.own_text is None else [d for d in train if d.digest in by_digest],
        encode=people if config.own_text is None else lambda each: by_digest[each.digest],
        people=_as_they_are(held_out, people, config.length),
        own=_own([each for each in spoken if each.document.digest in held]),
    )


def _as_they_are(documents: Sequence[Document], encode: Encode, length: int) -> HeldOutText:
    windows = [window(each, encode(each), length + 1) for each in documents]
    windows = [tokens for tokens in windows if len(tokens) > 1]
    if not windows:
        raise TraceError("corpus", "has no validation document with tokens", "Use more documents")
    return HeldOutText(windows, [0] * len(windows))


def _own(spoken: Sequence[Spoken]) -> HeldOutText:
    if not spoken:
        problem = "has no validation document that the model goes on from"
        raise TraceError("corpus", problem, "Use more documents")
    # The first new token comes from reading the prompt, as in any decoding: no exit is asked.
    return HeldOutText([each.tokens for each in spoken], [len(each.prompt) for each in spoken])
