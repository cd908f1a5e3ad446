"""What exited tokens skipped, made and put into the cache by compiled code.

A few tokens take torch two dozen calls for it, which cost several times what the products do.

Shape suffixes: N tokens, D width, L layers filled, G key heads, H head_dim, K = G·H,
R = 2·K outputs of one layer; C positions, M tokens of N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray
from numpy.typing import NDArray
from torch import Tensor

from offramp.controller.policies.net_kernel import compiled
from offramp.worker.model.kernels.floats import address_of, pointer, read, write
from offramp.worker.model.kernels.layer import normed, rotate
from offramp.worker.model.kernels.matrix import (
    ALONE_BELOW,
    BIAS,
    OUTPUTS,
    KernelMatrix,
    linear_into,
    weighted,
)
from offramp.worker.model.kernels.team import TeamTask, meet, share, team_of
from offramp.worker.model.kv import SlotKV

(
    TOKENS, HEADS, WIDTH, IS_BITS, NORM, COS, SIN, TURNED, TABLED, ROTATES, HELD, KEYS, VALUES,
    LAYER_BYTES, CAPACITY, EPSILONS, SHARE, MADE, STATES, STATE_WIDTH, UNIT, ONE, REST, REFUSED,
    PLACES,
) = range(25)  # fmt: skip
"""What a job says: sizes and addresses, and whether a place is not in the cache, which is written.
From the last on lie the tokens' slots and positions. Layers are counted from the first filled;
tables hold so many positions (0: angles are by token)."""

OF_KEYS, OF_STATES = range(2)
"""Which epsilon is which norm's."""


class FillTarget(NamedTuple):
    """Where entries go, and what becomes of keys on the way.

    Attributes:
        kv, first_layer: The cache, on the CPU, and the index of the first layer filled.
        angles: Cosines and sines [N, turned part of H]; or () if keys are not turned.
        by_position: Whether they are those of all positions, [C, turned part of H].
        norms_LH: Weights of the key norms, from the first layer on; None: there are none.
        key_eps: Epsilon of these.
        rotates_L: Which of these layers rotate their keys; None: all.
    """

    kv: SlotKV
    first_layer: int
    angles: tuple[Tensor, ...]
    by_position: bool
    norms_LH: Tensor | None
    key_eps: float
    rotates_L: Tensor | None


class FillJob:
    """Makes keys and values of exited tokens, and writes them to the cache, in one call.

    What does not differ between calls is looked up once: that took as long as the work.

    Args:
        norm: Weight [D] and epsilon of the norm that states pass; no weight: they have passed it.
        one: Keys and values of the first layer, if ``rest`` reads, behind what the norm gives, the
            values that it keeps of the tokens before; None: ``rest`` makes those of all layers.
        rest: Keys and values of the other layers, one layer after the other; and what it is to
            find those values multiplied by.
        rows, target: How many tokens at most, and where to.
    """

    def __init__(
        self,
        norm: tuple[Tensor | None, float],
        one: KernelMatrix | None,
        rest: tuple[KernelMatrix, float],
        rows: int,
        target: FillTarget,
    ) -> None:
        self._kept = norm, one, rest, target  # addresses do not keep alive
        self._rows, self._dtype = rows, target.kv.keys_LSGCH.dtype
        self._cache = _where(target.kv)
        products = [rest[0]] if one is None else [one, rest[0]]
        outputs = sum(int(each.described[OUTPUTS]) for each in products)
        self._made = np.empty(rows * outputs, np.float32)
        self._job_J = _job(target, norm[1], rest[1])
        self._job_J[[MADE, UNIT]] = self._made.ctypes.data, address_of(norm[0])
        for place, matrix in zip((REST, ONE), reversed(products), strict=False):
            self._job_J[place] = matrix.description(self._dtype is torch.bfloat16).ctypes.data
        self._is_small = sum(each.nbytes for each in products) < ALONE_BELOW

    def writes_to(self, kv: SlotKV) -> bool:
        """Whether this is the cache, as it was when the job was made: it may have grown."""
        return _where(kv) == self._cache

    def run(self, x_ND: Tensor, places_2N: NDArray[np.int64]) -> None:
        """Fill some tokens.

        Args:
            x_ND: Their states, or what the norm makes of them.
            places_2N: Their slots and positions.

        Raises:
            ValueError: too many, of another dtype than the cache's, or not within it.
        """
        x_ND = x_ND.contiguous()
        _require_alike(x_ND, places_2N, self._dtype, self._rows)
        job_J = np.concatenate((self._job_J, places_2N.reshape(-1)))
        job_J[TOKENS], job_J[STATE_WIDTH] = x_ND.shape
        job_J[STATES] = x_ND.data_ptr()
        team_of(1 if self._is_small else torch.get_num_threads()).run(FILL, job_J)
        if job_J[REFUSED]:
            require_places(x_ND, places_2N, self._kept[-1].kv, job_J[TABLED] or job_J[CAPACITY])


def keep_rows(made_NR: Tensor, places_2N: NDArray[np.int64], target: FillTarget) -> None:
    """Norm and rotate keys that were made, and write them and the values to the cache.

    Args:
        made_NR: What the layers' products gave, of the cache's dtype.
        places_2N, target: The tokens' slots and positions, all of them in the cache, and where to.
    """
    made_NR = made_NR.contiguous()
    job_J = np.concatenate((_job(target), places_2N.reshape(-1)))
    job_J[[TOKENS, STATE_WIDTH, STATES]] = *made_NR.shape, made_NR.data_ptr()
    team_of(1).run(KEEP, job_J)


def require_places(x_N: Tensor, places_2N: NDArray[np.int64], kv: SlotKV, positions: int) -> None:
    """Refuse states that a cache cannot hold, or slots and positions that it does not have.

    Raises:
        ValueError: another dtype than the cache's; places outside it, or from ``positions`` on.
    """
    _require_alike(x_N, places_2N, kv.keys_LSGCH.dtype, len(x_N))
    held, most = kv.keys_LSGCH.shape[1], min(positions, kv.keys_LSGCH.shape[3])
    if (places_2N < 0).any() or (places_2N >= [[held], [most]]).any():
        raise ValueError(f"slots and positions {places_2N.tolist()}: {held} slots of {most}")


def _where(kv: SlotKV) -> tuple[int, int, torch.Size]:
    return kv.keys_LSGCH.data_ptr(), kv.values_LSGCH.data_ptr(), kv.keys_LSGCH.shape


def _require_alike(x: Tensor, places_2N: NDArray[np.int64], dtype: torch.dtype, most: int) -> None:
    if x.dtype is not dtype or places_2N.shape != (2, len(x)) or len(x) > most:
        raise ValueError(f"{x.dtype} {tuple(x.shape)} at places {places_2N.shape}")


def _job(target: FillTarget, eps: float = 0.0, share: float = 1.0) -> NDArray[np.int64]:
    """A job of no tokens yet."""
    kv = target.kv
    _, held, heads, capacity, width = kv.keys_LSGCH.shape
    layer_bytes = kv.keys_LSGCH[0].nbytes
    before = target.first_layer * layer_bytes
    keys, values = (part.data_ptr() + before for part in (kv.keys_LSGCH, kv.values_LSGCH))
    cos, sin = target.angles or (None, None)
    tabled = min(capacity, len(target.angles[0])) if target.angles and target.by_position else 0
    floats = np.array([target.key_eps, eps, share, 0], np.float32).view(np.int64)
    job_J = np.zeros(PLACES, np.int64)
    job_J[HEADS : MADE] = (
        heads, width, kv.keys_LSGCH.dtype is torch.bfloat16, address_of(target.norms_LH),
        address_of(cos), address_of(sin), 0 if cos is None else cos.shape[-1], tabled,
        address_of(target.rotates_L), held, keys, values, layer_bytes, capacity,
        *floats.tolist(),
    )  # fmt: skip
    return job_J


@compiled
def _is_within(job: int) -> bool:
    """Whether all places are in the cache."""
    job_J = carray(pointer(job), PLACES, np.int64)
    places_2N = carray(pointer(job + 8 * PLACES), (2, job_J[TOKENS]), np.int64)
    for n in range(job_J[TOKENS]):
        slot, position = places_2N[0, n], places_2N[1, n]
        last = job_J[TABLED] if job_J[TABLED] != 0 else job_J[CAPACITY]
        if slot < 0 or slot >= job_J[HELD] or position < 0 or position >= last:
            job_J[REFUSED] = 1
    return bool(job_J[REFUSED] == 0)


def _fill(job: int, rank: int, size: int, flags: int) -> None:
    team = (rank, size, flags)
    job_J = carray(pointer(job), PLACES, np.int64)
    if not _is_within(job):
        meet(team)
        return
    tokens, width, is_bits = job_J[TOKENS], job_J[STATE_WIDTH], job_J[IS_BITS] != 0
    unit_ND = np.empty((tokens, width), np.float32)
    read(job_J[STATES], is_bits, unit_ND.reshape(-1))
    if job_J[UNIT] != 0:
        eps = carray(pointer(job + 8 * EPSILONS), 2, np.float32)[OF_STATES]
        normed(unit_ND, job_J[UNIT], eps, is_bits, unit_ND)
    made, filled, read_NI = job_J[MADE], 0, unit_ND
    if job_J[ONE] != 0:
        matrix = carray(pointer(job_J[ONE]), BIAS + 1, np.int64)
        made_NR = carray(pointer(made), (tokens, matrix[OUTPUTS]), np.float32)
        _multiply(matrix, unit_ND, is_bits, made_NR, team)
        _keep(job, made_NR, 0, 0, team)
        meet(team)
        made, filled = made + made_NR.size * 4, 1
        read_NI = _with_values_before(job, unit_ND)
    matrix = carray(pointer(job_J[REST]), BIAS + 1, np.int64)
    made_NR = carray(pointer(made), (tokens, matrix[OUTPUTS]), np.float32)
    _multiply(matrix, read_NI, is_bits, made_NR, team)
    _keep(job, made_NR, 0, filled, team)
    meet(team)


FILL = TeamTask(_fill)


def _keep_made(job: int, rank: int, size: int, flags: int) -> None:
    job_J = carray(pointer(job), PLACES, np.int64)
    is_bits, outputs = job_J[IS_BITS] != 0, job_J[STATE_WIDTH]
    made_1R = np.empty((1, outputs), np.float32)
    for n in range(job_J[TOKENS]):
        read(job_J[STATES] + n * outputs * (2 if is_bits else 4), is_bits, made_1R[0])
        _keep(job, made_1R, n, 0, (rank, size, flags))


KEEP = TeamTask(_keep_made)


@compiled
def _multiply(matrix: Any, x_NI: Any, is_bits: bool, made_NR: Any, team: Any) -> None:
    """Multiply rows with a matrix; each member reads what all have made."""
    taken_NI, sums = weighted(matrix, x_NI)
    linear_into(matrix, taken_NI, sums, is_bits, made_NR, team)
    meet(team)


@compiled
def _with_values_before(job: int, unit_ND: Any) -> Any:
    """States, and behind each what the first layer keeps of the token before as values."""
    job_J = carray(pointer(job), PLACES, np.int64)
    (tokens, width), heads, size = unit_ND.shape, job_J[HEADS], job_J[WIDTH]
    is_bits = job_J[IS_BITS] != 0
    places_2N = carray(pointer(job + 8 * PLACES), (2, tokens), np.int64)
    by = carray(pointer(job + 8 * SHARE), 1, np.float32)[0]
    read_NI = np.zeros((tokens, width + heads * size), np.float32)
    for n in range(tokens):
        read_NI[n, :width] = unit_ND[n]
        slot, position = places_2N[0, n], places_2N[1, n]
        if position == 0:
            continue
        for g in range(heads):
            row = (slot * heads + g) * job_J[CAPACITY] + position - 1
            first = width + g * size
            at = job_J[VALUES] + row * size * (2 if is_bits else 4)
            read(at, is_bits, read_NI[n, first : first + size])
        read_NI[n, width:] *= by
    return read_NI


@compiled
def _keep(job: int, made_MR: Any, begun: int, filled: int, team: Any) -> None:
    """Write a member's layers of what was made of tokens from one on; some layers are filled."""
    job_J = carray(pointer(job), PLACES, np.int64)
    eps = carray(pointer(job + 8 * EPSILONS), 2, np.float32)[OF_KEYS]
    is_bits, heads, width, turned = job_J[IS_BITS] != 0, job_J[HEADS], job_J[WIDTH], job_J[TURNED]
    tokens, capacity, size = job_J[TOKENS], job_J[CAPACITY], 2 if job_J[IS_BITS] != 0 else 4
    places_2N = carray(pointer(job + 8 * PLACES), (2, tokens), np.int64)
    key_1H = np.empty((1, width), np.float32)
    cos_H, sin_H, scratch_H = np.empty((3, turned), np.float32)
    first, last = share(made_MR.shape[1] // (2 * heads * width), 1, team)
    for m in range(len(made_MR)):
        n = begun + m
        slot, position = places_2N[0, n], places_2N[1, n]
        if turned != 0:
            angle = position if job_J[TABLED] != 0 else n
            read(job_J[COS] + angle * turned * size, is_bits, cos_H)
            read(job_J[SIN] + angle * turned * size, is_bits, sin_H)
        for layer in range(first, last):
            place = filled + layer
            rotates = turned != 0
            if rotates and job_J[ROTATES] != 0:
                rotates = carray(pointer(job_J[ROTATES]), place + 1, np.uint8)[place] != 0
            for g in range(heads):
                column = (2 * layer * heads + g) * width
                key_1H[0] = made_MR[m, column : column + width]
                if job_J[NORM] != 0:
                    normed(key_1H, job_J[NORM] + place * width * size, eps, is_bits, key_1H)
                if rotates:
                    rotate(key_1H[0, :turned], cos_H, sin_H, is_bits, scratch_H)
                row = (slot * heads + g) * capacity + position
                at = place * job_J[LAYER_BYTES] + row * width * size
                write(key_1H[0], is_bits, job_J[KEYS] + at)
                column += heads * width
                write(made_MR[m, column : column + width], is_bits, job_J[VALUES] + at)
