"""What each step learns from: the frozen model's states, computed once and then read from disk.

The first pass over the texts computes them, as it must, and writes them down; every later pass
reads the same windows in another order, mapped into memory, and the model does not run again.

Shape suffixes: W windows, P places (exits, then the last layer), T tokens, D width, N = B·T rows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.agents.tuning.distil import states_at
from offramp.agents.tuning.stream import WindowStream
from offramp.agents.tuning.tune_config import TuneConfig
from offramp.controller.errors import ConfigError
from offramp.worker.model.stack import LayerStack

STATES = "states.bin"
"""File beside a run's checkpoint; it is removed when the run ends."""

GB = 10**9

States = tuple[dict[int, Tensor], Tensor]
"""States [N, D] after each exit, and after the last layer."""


class StateFile:
    """States of windows, in one file of known size that is mapped into memory.

    Args:
        path: The file; one of that size is taken as it is.
        shape_WPTD: What it holds.
        dtype: Dtype that its values have.

    Attributes:
        was_there: Whether it was.

    Raises:
        ConfigError: there is no room for it.
    """

    def __init__(
        self, path: Path, shape_WPTD: tuple[int, int, int, int], dtype: torch.dtype
    ) -> None:
        count = math.prod(shape_WPTD)
        size = count * dtype.itemsize
        self.was_there = path.exists() and path.stat().st_size == size
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(self._file, size)
            # Room that turned out missing when the map is written to would end the process.
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise ConfigError(
                "states_gb",
                f"{path} cannot have its {size / GB:.1f} GB ({error.strerror or error})",
                "Make room, or give --states-gb 0, which computes states anew in each step",
            ) from error
        self._map_WPTD = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        self._map_WPTD = self._map_WPTD.view(shape_WPTD)

    def write(self, first: int, states: Sequence[Tensor]) -> None:
        """Put the states [N, D] of each place, of windows one after the other from a first on."""
        _, _, length, width = self._map_WPTD.shape
        for place, x_ND in enumerate(states):
            x_WTD = x_ND.detach().to("cpu").view(-1, length, width)
            self._map_WPTD[first : first + len(x_WTD), place] = x_WTD

    def read(self, windows_B: Sequence[int]) -> list[Tensor]:
        """The states of some windows, [N, D] of each place."""
        found_BPTD = self._map_WPTD[torch.as_tensor(windows_B)]
        return [found_BPTD[:, place].flatten(0, 1) for place in range(found_BPTD.shape[1])]

    def settle(self) -> None:
        """Bring to disk what was written."""
        os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file; the map stays until nothing refers to it."""
        os.close(self._file)


class StateFeed:
    """Gives the states of step after step.

    Args:
        config: How many steps there are and how many tokens each has; how much disk may be taken.
        stack: The frozen model.
        exits: Layers whose states are wanted.
        streams: Makes a stream of windows, at its beginning.
        tokens: How many tokens one pass of it has.
        folder: Where the file of states is to lie.

    Attributes:
        batches: Steps of one pass.
    """

    def __init__(
        self,
        config: TuneConfig,
        stack: LayerStack,
        exits: Sequence[int],
        streams: Callable[[], WindowStream],
        tokens: int,
        folder: Path,
    ) -> None:
        self._config, self._stack, self._exits = config, stack, tuple(exits)
        self._streams, self._stream = streams, streams()
        self._path = folder / STATES
        self._file: StateFile | None = None
        self.batches = max(1, tokens // config.batch_tokens)

    @property
    def size(self) -> int:
        """Bytes of the states of a pass."""
        places, width = len(self._exits) + 1, self._stack.width
        tokens = self.batches * self._config.batch_tokens
        return tokens * places * width * self._stack.dtype.itemsize

    @property
    def fits(self) -> bool:
        """Whether the states of a pass may be kept."""
        return self.size <= self._config.states_gb * GB

    @property
    def keeps(self) -> bool:
        """Whether states are kept: some will be read again, and they may."""
        return self._config.steps > self.batches and self.fits

    @property
    def plan(self) -> str:
        """What is done about states, in a few words."""
        if self.keeps:
            return f"states of {self.batches} steps are kept, {self.size / GB:.2f} GB"
        if self._config.steps <= self.batches:
            return "each text is read once"
        return f"states are computed anew: {self.size / GB:.1f} GB exceed --states-gb"

    @property
    def position(self) -> dict[str, Any]:
        """Where the stream of windows is."""
        return self._stream.position

    def steps_within(self, seconds: float, learn: Callable[[States], object]) -> int:
        """How many steps fit into the time, 1 or more, by trial; later passes have shorter ones.

        Args:
            seconds: The time.
            learn: Does what a step does with its states.
        """
        tokens_BT = self._stream.next().to(self._stack.device)
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            found = states_at(self._stack, tokens_BT, self._exits)
            computed = time.perf_counter()
            learn(found)
            learned = time.perf_counter()
        steps = int(seconds / (learned - start))
        if steps > self.batches and self.fits:
            left_s = seconds - self.batches * (learned - start)
            steps = self.batches + int(left_s / (learned - computed))
        return max(1, steps)

    def seek(self, position: dict[str, Any], step: int) -> None:
        """Go on after so many steps of another feed of the same arguments.

        States that it kept are read from its file, or computed again if that is gone.

        Raises:
            ConfigError: the checkpoint's stream had another number of rows, or there is no room.
        """
        if self.keeps and not self._states().was_there:
            again = self._streams()
            for number in range(min(step, self.batches)):
                self._keep(number, self._computed(again))
        self._stream.seek(position)

    def next(self, step: int) -> States:
        """The states that a step learns from, counted from 0; each step is asked for in turn.

        Raises:
            ConfigError: there is no room for the states that are to be kept.
        """
        if not self.keeps:
            return self._computed(self._stream)
        kept = self._states()
        if step < self.batches:
            found = self._computed(self._stream)
            self._keep(step, found)
            return found
        *states, last_ND = (each.to(self._stack.device) for each in kept.read(self._windows(step)))
        return dict(zip(self._exits, states, strict=True)), last_ND

    def settle(self) -> None:
        """Bring to disk what later steps read, before a checkpoint says that it is there."""
        if self._file is not None:
            self._file.settle()

    def remove(self) -> None:
        """Remove what was kept: the run is at its end."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)

    def _computed(self, stream: WindowStream) -> States:
        return states_at(self._stack, stream.next().to(self._stack.device), self._exits)

    def _keep(self, step: int, found: States) -> None:
        states, last_ND = found
        self._states().write(step * self._rows, [*(states[e] for e in self._exits), last_ND])

    def _states(self) -> StateFile:
        if self._file is None:
            shape = (
                self.batches * self._rows,
                len(self._exits) + 1,
                self._config.length,
                self._stack.width,
            )
            self._file = StateFile(self._path, shape, self._stack.dtype)
        return self._file

    @property
    def _rows(self) -> int:
        return self._config.batch_tokens // self._config.length

    def _windows(self, step: int) -> list[int]:
        """The windows of a step after the first pass: each pass has an order of its own."""
        number, place = divmod(step, self.batches)
        seed = [self._config.seed, number]
        order_W = np.random.default_rng(seed).permutation(self.batches * self._rows)
        found: list[int] = order_W[place * self._rows : (place + 1) * self._rows].tolist()
        return found
