"""What comes back over HTTP: completions, conversations and their chunks, in OpenAI's shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from offramp.deploy.http.shapes.reply_shapes import Usage
from offramp.deploy.http.shapes.token_texts import (
    EchoedPrompt,
    LegacyLogprobs,
    Namer,
    chat_logprobs,
    joined,
    legacy_logprobs,
    prompt_logprobs,
)
from offramp.worker.decoding.request import CompletionStats, TokenEvent
from offramp.worker.engine.engine import mean_layer

Choice = list[TokenEvent]
"""The events of one choice, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyStyle(ABC):
    """What every body of one reply has in common, and what it reports.

    Attributes:
        id: Identifier of the reply.
        created: Unix time, seconds.
        model: Name of the model.
        prompt_tokens: Tokens of all its prompts.
        stats: Report exit depths, policy generation and, at the end, what it cost.
        name_token: Text of a token id, to report log-probabilities; None reports none.
        counts: Whether a stream counts its tokens in a last chunk; then the others have a null.
    """

    WHOLE: ClassVar[str]
    PART: ClassVar[str]

    id: str
    created: int
    model: str
    prompt_tokens: int
    stats: bool = False
    name_token: Namer | None = None
    counts: bool = False

    @abstractmethod
    def part(self, index: int, event: TokenEvent, *, first: bool) -> dict[str, Any]:
        """What a chunk says of one token of a choice."""

    @abstractmethod
    def whole(self, index: int, events: Choice) -> dict[str, Any]:
        """A finished choice."""

    def shown(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """The choices that the reply shows."""
        return choices

    def shown_tokens(self, choices: Sequence[Choice]) -> int:
        """Count the tokens that were made."""
        return sum(map(len, choices))

    @property
    def has_plain_chunks(self) -> bool:
        """Whether chunks differ in their text only, but for the first and the last of a choice."""
        return self.name_token is None and not self.stats

    def chunk(self, index: int, event: TokenEvent, *, first: bool) -> dict[str, Any]:
        """One streamed token of one choice."""
        body = self._body(self.PART, [self.part(index, event, first=first)])
        if self.counts:
            body["usage"] = None
        if self.stats:
            body["offramp"] = {
                "generation": event.generation,
                "exit_layer": event.exit_layer,
                "token": event.token,
                **_cost(event.stats),
            }
        return body

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last chunk, when usage was asked for."""
        return {**self._body(self.PART, []), "usage": self._usage(choices)}

    def reply(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole answer of a request that does not stream.

        With statistics, a single choice has them beside it, of several each has its own.
        """
        shown = self.shown(choices)
        body = self._body(self.WHOLE, [self.whole(index, each) for index, each in enumerate(shown)])
        body["usage"] = self._usage(choices)
        if self.stats:
            places = [body] if len(shown) == 1 else body["choices"]
            for place, events in zip(places, shown, strict=True):
                place["offramp"] = _stats(events)
        return body

    def firsts(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """The first choice that was made of each prompt."""
        return choices[:1]

    def _usage(self, choices: Sequence[Choice]) -> Usage:
        tokens = self.shown_tokens(choices)
        ends = [events[-1].stats for events in self.firsts(choices) if events]
        known = sum(stats.cached_tokens or 0 for stats in ends if stats is not None)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": known},
        }

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionStyle(ReplyStyle):
    """Replies of /v1/completions.

    Attributes:
        made: Completions made per prompt.
        kept: Completions shown per prompt: the likeliest.
        echoes: The prompts, if they are put before their completions.
        prompt_only: Show nothing of what was made of a prompt.
    """

    WHOLE = PART = "text_completion"

    made: int = 1
    kept: int = 1
    echoes: Sequence[EchoedPrompt] = field(default=())
    prompt_only: bool = False

    def part(self, index: int, event: TokenEvent, *, first: bool) -> dict[str, Any]:
        """What a chunk says of one token of a choice."""
        return self._choice(index, [event], self._echo(index) if first else None)

    def whole(self, index: int, events: Choice) -> dict[str, Any]:
        """A finished choice."""
        return self._choice(index, events, self._echo(index))

    def shown(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """The likeliest of each prompt's choices, best first if some are left out."""
        if self.made == self.kept:
            return choices
        prompts = [choices[at : at + self.made] for at in range(0, len(choices), self.made)]
        return [each for made in prompts for each in sorted(made, key=_doubt)[: self.kept]]

    def shown_tokens(self, choices: Sequence[Choice]) -> int:
        """Count the tokens that were made, also those of choices that are left out."""
        return 0 if self.prompt_only else sum(map(len, choices))

    def firsts(self, choices: Sequence[Choice]) -> Sequence[Choice]:
        """The first choice that was made of each prompt."""
        return choices[:: self.made]

    def _echo(self, index: int) -> EchoedPrompt | None:
        return self.echoes[index // self.kept] if self.echoes else None

    def _choice(self, index: int, events: Choice, echoed: EchoedPrompt | None) -> dict[str, Any]:
        shown = [] if self.prompt_only else events
        text = "".join(event.text for event in shown)
        last = events[-1].finish_reason
        return {
            "index": index,
            "text": text if echoed is None else echoed.text + text,
            "logprobs": self._logprobs(index, events, shown, echoed),
            "finish_reason": "length" if self.prompt_only else last,
        }

    def _logprobs(
        self, index: int, events: Choice, shown: Choice, echoed: EchoedPrompt | None
    ) -> LegacyLogprobs | None:
        name, echo = self.name_token, self._echo(index)
        if name is None:
            return None
        block = legacy_logprobs(shown, name, 0 if echo is None else len(echo.text))
        if echoed is None:
            return block
        return joined(prompt_logprobs(events[0].prompt_draws, name, echoed), block)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatStyle(ReplyStyle):
    """Replies of /v1/chat/completions."""

    WHOLE = "chat.completion"
    PART = "chat.completion.chunk"

    def part(self, index: int, event: TokenEvent, *, first: bool) -> dict[str, Any]:
        """What a chunk says of one token of a choice."""
        role = {"role": "assistant"} if first else {}
        return self._choice(index, [event], "delta", {**role, "content": event.text})

    def whole(self, index: int, events: Choice) -> dict[str, Any]:
        """A finished choice."""
        text = "".join(event.text for event in events)
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._choice(index, events, "message", message)

    def _choice(
        self, index: int, events: Choice, place: str, said: Mapping[str, Any]
    ) -> dict[str, Any]:
        name = self.name_token
        return {
            "index": index,
            place: said,
            "logprobs": None if name is None else chat_logprobs(events, name),
            "finish_reason": events[-1].finish_reason,
        }


def _doubt(events: Choice) -> float:
    """Mean negative log-probability of a choice's tokens."""
    return -fmean(event.logprob or 0.0 for event in events)


def _stats(events: Choice) -> dict[str, Any]:
    layers = [event.exit_layer for event in events]
    return {
        "generation": events[-1].generation,
        "exit_layers": layers,
        "mean_exit_layer": mean_layer(layers),
        **_cost(events[-1].stats),
    }


def _cost(stats: CompletionStats | None) -> dict[str, Any]:
    """What a completion cost; nothing before its last token."""
    if stats is None:
        return {}
    at_setting = {} if stats.setting is None else {"setting": stats.setting}
    return {
        **at_setting,
        "layer_calls": stats.layer_calls,
        "copy_calls": stats.copy_calls,
        "prompt_calls": stats.prompt_calls,
        "exact_share": stats.exact_share,
        "drafts": stats.drafts,
        "drafts_accepted": stats.drafts_accepted,
        "energy": stats.energy and stats.energy._asdict(),
    }
