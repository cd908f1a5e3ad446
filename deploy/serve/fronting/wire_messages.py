"""What the front and its workers send each other: requests, and all that becomes of them.

A message is its length, 4 bytes with the highest first, and JSON: nothing is unpickled. A worker's
first names it and shows the pool's secret; nothing else is read before. The front sends
``[number, kind, fields]`` to ask, and ``[number]`` to give a request up. A worker sends after each
step all that it made, as one list of ``[number, place, *fields]``; an empty one says that it lives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import from_json, to_json

from offramp.controller.costs.readings import EnergyMethod, EnergyShare
from offramp.controller.errors import DecodeFailedError, OfframpError, OverloadedError, RequestError
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import CompletionStats, KVWish, TokenEvent
from offramp.worker.decoding.sampler import Draw
from offramp.worker.decoding.sampling import SamplingParams

LENGTH_BYTES = 4
MOST_BYTES = 2**28
"""No message is longer."""

ACCEPTED, FAILED, LEAVING = -1, -2, -3
"""Places of what is no part of an answer: a request was accepted, or it ends with an error, or, of
no request, the worker takes no more."""


@dataclass(frozen=True, slots=True)
class WireAddress:
    """Where a front listens for its workers.

    Attributes:
        host, port: Where it can be reached.
        secret: Shows that a worker belongs to its pool.
        local: Name of a socket where it can be reached on its own machine, at half the cost of a
            connection over the network; "" where there is none.
    """

    host: str
    port: int
    secret: str
    local: str = ""


@dataclass(frozen=True, slots=True)
class TokensAsked:
    """A request for tokens.

    Attributes:
        prompts, sampling, kv_mode, prefill, request_id, cache_salt: See ``Backend.submit_all``.
    """

    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    kv_mode: KVWish | None
    prefill: Prefill | None
    request_id: str
    cache_salt: str

    @property
    def completions(self) -> int:
        """Completions that it asks for."""
        return len(self.prompts) * self.sampling.n

    @property
    def tokens(self) -> int:
        """Tokens that it may come to: those of its prompts, and all that it may make."""
        most = sum(len(each) + self.sampling.max_tokens for each in self.prompts)
        return self.sampling.n * most


@dataclass(frozen=True, slots=True)
class ClassesAsked:
    """A request to classify texts, or to find the best of them.

    Attributes:
        sequences, quality, request_id, best: See ``ClassBackend.classify``.
    """

    sequences: Sequence[Sequence[int]]
    quality: float | None
    request_id: str
    best: int | None

    @property
    def completions(self) -> int:
        """Texts that it asks about."""
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens of its texts."""
        return sum(map(len, self.sequences))


Asked = TokensAsked | ClassesAsked

_KINDS: dict[str, TypeAdapter[Any]] = {
    kind.__name__: TypeAdapter(kind) for kind in (TokensAsked, ClassesAsked)
}


class Inflow:
    """Cuts what comes over a connection into messages.

    Attributes:
        most_bytes: No message may be longer.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._data = bytearray()

    def messages(self, data: bytes) -> Iterator[Any]:
        """Yield what is complete with this data.

        Raises:
            ValueError: a message that is too long, or no JSON.
        """
        self._data += data
        while len(self._data) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._data[:LENGTH_BYTES])
            if end > LENGTH_BYTES + self.most_bytes:
                raise ValueError(f"a message has {end} bytes")
            if len(self._data) < end:
                return
            body = bytes(self._data[LENGTH_BYTES:end])
            del self._data[:end]
            yield _read(body)


def framed(message: Sequence[Any]) -> bytes:
    """A message as it goes over a connection."""
    body = _written(message)
    return len(body).to_bytes(LENGTH_BYTES) + body


# pydantic's JSON takes a fifth of the time of json's, which is much where a token takes a few
# milliseconds; but it knows no half of a surrogate pair, which a text may hold.


def _written(message: Sequence[Any]) -> bytes:
    try:
        return to_json(message)
    except ValueError:
        return json.dumps(message).encode()


def _read(body: bytes) -> Any:
    try:
        return from_json(body)
    except ValueError:
        pass
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("a message is nested too deeply") from error


def asking(number: int, asked: Asked) -> list[Any]:
    """The message that asks a worker."""
    kind = type(asked).__name__
    return [number, kind, _KINDS[kind].dump_python(asked, warnings=False)]


def asked_of(kind: str, fields: dict[str, Any]) -> Asked:
    """The request that a message asks.

    Raises:
        ValueError: it is none.
    """
    if kind not in _KINDS:
        raise ValueError(f"nobody can be asked for {kind!r}")
    asked: Asked = _KINDS[kind].validate_python(fields)
    return asked


_TOLD = {kind.__name__: kind for kind in (RequestError, OverloadedError, DecodeFailedError)}


def failed(number: int, error: BaseException) -> list[Any]:
    """The entry that ends a request with an error; of one that is not offramp's without details."""
    if type(error).__name__ not in _TOLD:
        is_ours = isinstance(error, OfframpError)
        error = DecodeFailedError(str(error) if is_ours else "the request failed in its worker")
    return [number, FAILED, type(error).__name__, error.args, vars(error)]


def error_of(kind: str, args: Sequence[Any], fields: dict[str, Any]) -> OfframpError:
    """The error that an entry tells."""
    error = _TOLD[kind].__new__(_TOLD[kind], *args)
    vars(error).update(fields)
    return error


def packed(number: int, place: int, event: TokenEvent) -> list[Any]:
    """A token as it goes over the wire: in few words if it is one like most."""
    fields = [
        number,
        place,
        event.token,
        event.text,
        event.exit_layer,
        event.generation,
        event.finish_reason,
        event.text_offset,
    ]
    if event.logprob is not None or event.top_logprobs or event.stats or event.prompt_draws:
        fields += [
            event.logprob,
            event.top_logprobs,
            event.stats and astuple(event.stats),
            [(draw.token, draw.logprob, draw.top) for draw in event.prompt_draws],
        ]
    return fields


def unpacked(name: str, fields: Sequence[Any]) -> TokenEvent:
    """The token of a request, from what comes after its choice's index."""
    token, text, exit_layer, generation, reason, offset, *rare = fields
    if not rare:
        return TokenEvent(name, token, text, exit_layer, generation, reason, text_offset=offset)
    logprob, top, stats, draws = rare
    return TokenEvent(
        name,
        token,
        text,
        exit_layer,
        generation,
        reason,
        logprob,
        _pairs(top),
        offset,
        stats and _stats(stats),
        tuple(Draw(each, chance, _pairs(best)) for each, chance, best in draws),
    )


def _pairs(top: Sequence[Sequence[Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((token, logprob) for token, logprob in top)


_STATS = tuple(CompletionStats.__dataclass_fields__)


def _stats(values: Sequence[Any]) -> CompletionStats:
    fields = dict(zip(_STATS, values, strict=True))
    fields["energy"] = _energy(fields["energy"])
    return CompletionStats(**fields)


def _energy(values: Sequence[Any] | None) -> EnergyShare | None:
    if values is None:
        return None
    joules, method, *rest = values
    return EnergyShare(joules, EnergyMethod(method), *rest)


def packed_text(number: int, place: int, text: ClassifiedText) -> list[Any]:
    """What became of a text, as it goes over the wire."""
    return [number, place, *astuple(text)]


def unpacked_text(fields: Sequence[Any]) -> ClassifiedText:
    """What became of a text, from what comes after its index."""
    label, name, probs, layers, generation, energy, is_best = fields
    return ClassifiedText(label, name, tuple(probs), layers, generation, _energy(energy), is_best)
