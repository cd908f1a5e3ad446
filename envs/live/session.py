"""What a live environment needs of whoever decodes: a session, asked step by step.

The envs know no engine. ``offramp.research.live_engine`` has the session that drives one through
new tokens, ``offramp.agents.prompting.prompt_session`` the one that drives it through prompts;
anything else that decodes under exits can be one, too.

Shape suffixes: F feature columns, C columns of outlook.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from offramp.controller.features import FeatureSchema, FloatArray

KVMode = Literal["project", "defer"]


@dataclass(frozen=True, slots=True)
class Question:
    """A decision that the session waits for.

    Attributes:
        here: Index of the exit where the token stands; −1 before the first layer.
        features_F: What was probed there; zeros before the first layer.
        outlook_C: OUTLOOK_V1 of the row; empty of a prompt's token.
    """

    here: int
    features_F: FloatArray
    outlook_C: FloatArray


@dataclass(frozen=True, slots=True)
class LiveToken:
    """One token that came out.

    Attributes:
        column: Index of the exit it left at, E for full depth.
        emitted: What the row would emit, with the cache its exits have left.
        full: What full depth says after the same tokens with an exact cache.
        following: What really follows in the document; it is what the row is fed next.
    """

    column: int
    emitted: int
    full: int
    following: int


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """What came of a prompt that was read with exits.

    Attributes:
        prompt: Which of the session's prompts it was.
        calls: Layers run for its tokens, adapter layers included, as the engine counted them.
        full_calls: The same of reading it in full.
        left: Tokens that left early.
        loss: Nats per token of what really follows it, decoded at full depth.
        full_loss: The same behind the prompt read in full.
    """

    prompt: int
    calls: int
    full_calls: int
    left: int
    loss: float
    full_loss: float


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a session has come to.

    Attributes:
        tokens: What came out since the last answer: the token answered for, if it ended, and those
            after it that nobody was asked about. None while a prompt is read.
        question: What it waits for; None after the sequence's last token.
        read: What came of a prompt, once all of its questions are answered; None of new tokens.
    """

    tokens: tuple[LiveToken, ...]
    question: Question | None
    read: ReadPrompt | None = None


class Session(Protocol):
    """Works on one sequence after the other, and asks before it goes on.

    Attributes:
        model: Fingerprint of the model that decodes.
        exits: Layers after which it can ask, ascending.
        layers: Number of layers.
        schema: The features it asks with.
    """

    @property
    def model(self) -> str: ...  # noqa: D102

    @property
    def exits(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def layers(self) -> int: ...  # noqa: D102

    @property
    def schema(self) -> FeatureSchema: ...  # noqa: D102

    def begin(self, rng: np.random.Generator) -> Moment:
        """Give up what is running, and start a sequence drawn by ``rng``.

        Whatever goes wrong in the decoder is raised here, or by ``answer``.
        """
        ...

    def answer(self, target: int) -> Moment:
        """The present question's: ``here`` leaves, a higher exit is asked next, E is full depth."""
        ...

    def close(self) -> None:
        """Give up what is running; may be called more than once."""
        ...


class LiveSession(Session, Protocol):
    """Decodes new tokens: each moment has those that came out.

    Attributes:
        kv_mode: What becomes of skipped layers.
        max_pending: Tokens that may be pending in ``defer``.
        asks_first: Whether it also asks before the first layer.
        adapters: Exits behind which an adapter layer runs, at the price of a layer.
    """

    @property
    def kv_mode(self) -> KVMode: ...  # noqa: D102

    @property
    def max_pending(self) -> int: ...  # noqa: D102

    @property
    def asks_first(self) -> bool: ...  # noqa: D102

    @property
    def adapters(self) -> tuple[int, ...]: ...  # noqa: D102


class PromptSession(Session, Protocol):
    """Reads prompts: no moment has tokens, and the last has what came of the prompt.

    Attributes:
        prompt_tokens: Tokens of each prompt.
    """

    @property
    def prompt_tokens(self) -> int: ...  # noqa: D102
