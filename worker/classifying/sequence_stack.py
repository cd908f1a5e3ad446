"""A model as a stack of layers over whole sequences, which a batch of them leaves row by row.

Sequences are padded on the right. Shape suffixes: B sequences, T tokens of the longest, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import BoolArray
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.engine.admission import require_tokens
from offramp.worker.engine.encoding import require_length
from offramp.worker.model.stack import Rotary

Pool = Literal["mean", "first", "last"]
"""What of a sequence a head reads: the mean over its tokens, its first token, or its last."""


def parse_pool(pool: str) -> Pool:
    """Read the name of a pool.

    Raises:
        ConfigError: there is no such pool.
    """
    for known in get_args(Pool):
        if pool == known:
            return known  # type: ignore[no-any-return]  # get_args gives Any
    raise ConfigError("pool", f"{pool!r} is unknown", f"Use {', '.join(get_args(Pool))}")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What layers read beside the states of a batch.

    Attributes:
        mask: Tokens that may be attended to, bool [B, 1, 1, T]; None where padding is hidden
            anyway, or there is none.
        rotary: Cosines and sines of the positions, the same for all rows; empty without.
    """

    mask: Tensor | None = None
    rotary: Rotary = ()


class SequenceStack(Protocol):
    """What classification needs of a model. Layers are counted from 1 in exits, 0 in indices.

    Attributes:
        layers: Number of layers.
        width: Size of a hidden state.
        context: Most tokens of a sequence.
        vocab: Number of token ids.
        device: Device of the weights.
        best_pool: The pool that suits the family.
    """

    layers: int
    width: int
    context: int
    vocab: int
    device: torch.device
    best_pool: ClassVar[Pool]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What enters the first layer, [B, T, D]."""
        ...

    def surroundings(self, x_BTD: Tensor, lengths: Sequence[int]) -> Surroundings:
        """What layers read beside these states, of sequences of so many tokens."""
        ...

    def run_layer(self, index: int, x_BTD: Tensor, around: Surroundings) -> Tensor:
        """One layer, [B, T, D]."""
        ...

    def read(self, x_BTD: Tensor) -> Tensor:
        """What heads read of states of any shape: through the final norm, where there is one."""
        ...


def require_sequences(sequences: Sequence[Sequence[int]], stack: SequenceStack) -> None:
    """Refuse what a stack cannot run.

    Raises:
        RequestError: there is no sequence, or one is empty, over the context, or no token ids; its
            place is the field.
    """
    _require_list("input", sequences)
    if len(sequences) == 0:
        raise RequestError("input", "is empty", "Send one text or more")
    for place, tokens in enumerate(sequences):
        field = f"input[{place}]"
        _require_list(field, tokens)
        require_length(field, len(tokens), stack.context)
        require_tokens(field, tokens, stack.vocab)


def _require_list(field: str, given: object) -> None:
    if isinstance(given, bytes) or not isinstance(given, Sequence | np.ndarray):
        raise RequestError(field, f"{given!r:.60} is no list", "Give lists of token ids")


class SequenceBatch:
    """A batch of sequences on its way through a stack; rows that leave are gone.

    Args:
        stack: Runs the layers.
        sequences: Token ids of each sequence, at least one.

    Attributes:
        rows: Places that the remaining rows had at the beginning.
        launches: Layers run so far, whatever the number of rows in them.
        row_layers: Layers run so far, counted for each row in them.
    """

    def __init__(self, stack: SequenceStack, sequences: Sequence[Sequence[int]]) -> None:
        self.rows: IndexArray = np.arange(len(sequences))
        self.launches = 0
        self.row_layers = 0
        self._stack = stack
        self._lengths = [len(tokens) for tokens in sequences]
        longest = max(self._lengths)
        padded = [[*tokens, *([0] * (longest - len(tokens)))] for tokens in sequences]
        self._x_BTD = stack.embed(torch.tensor(padded, device=stack.device))
        self._around = stack.surroundings(self._x_BTD, self._lengths)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the states."""
        return self._x_BTD.dtype

    def run_layer(self, index: int) -> None:
        """Run one layer over the rows that are left."""
        self.launches += 1
        self.row_layers += len(self.rows)
        self._x_BTD = self._stack.run_layer(index, self._x_BTD, self._around)

    def pooled(self, pool: Pool, places: IndexArray | None = None) -> Tensor:
        """What heads read of the rows that are left, or of some of them, float32 [N, D]."""
        x_BTD, lengths = self._x_BTD, self._lengths
        if places is not None and len(places) < len(lengths):
            x_BTD, lengths = x_BTD[torch.from_numpy(places)], [lengths[p] for p in places.tolist()]
        if pool == "first":
            return self._stack.read(x_BTD[:, 0]).float()
        if pool == "last":
            last_B = torch.tensor(lengths, device=x_BTD.device) - 1
            return self._stack.read(x_BTD[torch.arange(len(lengths)), last_B]).float()
        read_BTD = self._stack.read(x_BTD).float()
        if min(lengths) == read_BTD.shape[1]:
            return read_BTD.mean(1)
        lengths_B1 = torch.tensor(lengths, device=x_BTD.device)[:, None]
        is_token_BT = torch.arange(read_BTD.shape[1], device=x_BTD.device) < lengths_B1
        return (read_BTD * is_token_BT[:, :, None]).sum(1) / lengths_B1

    def alone(self, place: int) -> SequenceBatch:
        """One of the rows that are left, as a batch of its own whose layers are counted anew."""
        found = copy.copy(self)
        found.launches = found.row_layers = 0
        found.keep(np.arange(len(self.rows)) == place)
        return found

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left, and the padding that only they needed."""
        places = np.flatnonzero(stay_N)
        self.rows = self.rows[places]
        self._lengths = [self._lengths[place] for place in places.tolist()]
        if not self._lengths:
            return
        self._x_BTD = self._x_BTD[torch.from_numpy(places), : max(self._lengths)]
        self._around = self._stack.surroundings(self._x_BTD, self._lengths)


def padding_mask(x_BTD: Tensor, lengths: Sequence[int]) -> Tensor | None:
    """The tokens that are no padding, bool [B, 1, 1, T]; None if none is."""
    if min(lengths) == x_BTD.shape[1]:
        return None
    lengths_B1 = torch.tensor(lengths, device=x_BTD.device)[:, None]
    return (torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B1)[:, None, None]
