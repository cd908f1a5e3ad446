"""Threads that work through one compiled task together: each its share of every product.

Nothing of this holds Python's lock: a helper sleeps at a semaphore until the thread that leads
wakes it, and where results of all are needed they wait for each other (``meet``).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from offramp.controller.policies.net_kernel import compiled, kept_on_disk
from offramp.worker.model.kernels.vectors import I8, I32, I64

RANK, SIZE, FLAGS = range(3)
"""What a member of a team knows: its number, how many there are, and where they look at each other;
one alone is (0, 1, 0)."""

LINE = 64
"""Bytes that cores hand to each other at once."""

ARRIVED, ROUND, CODE, JOB, BELLS = range(0, 5 * LINE, LINE)
"""What stands there, in bytes from FLAGS on, each in a line of its own; a bell wakes a helper."""

PATIENCE = 2048
"""How often a member looks for the others before it lets other threads have the core for once."""


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def _look(_: Any, place: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(values[0], I64.as_pointer()), "acquire", 8)

    return types.int64(place), emit


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def _show(_: Any, place: Any, value: Any) -> Any:  # noqa: ARG001  # numba counts them
    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        target = builder.inttoptr(values[0], I64.as_pointer())
        builder.store_atomic(values[1], target, "release", 8)
        return context.get_dummy_value()

    return types.void(place, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def _count_up(_: Any, place: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        target = builder.inttoptr(values[0], I64.as_pointer())
        return builder.atomic_rmw("add", target, ir.Constant(I64, 1), "acq_rel")

    return types.int64(place), emit


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def _pause(_: Any) -> Any:
    def emit(context: Any, builder: Any, _signature: Any, _values: Any) -> Any:
        if platform.machine() == "x86_64":
            signature = ir.FunctionType(ir.VoidType(), ())
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, signature, name), ())
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def _give_way(_: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, _values: Any) -> Any:
        signature = ir.FunctionType(I32, ())
        code = cgutils.get_or_insert_function(builder.module, signature, "sched_yield")
        return builder.call(code, ())

    return types.int32(), emit


def _on_semaphore(name: str) -> Any:
    """A function of POSIX that takes a semaphore's address."""

    @intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
    def call(_: Any, place: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            signature = ir.FunctionType(I32, (I8.as_pointer(),))
            code = cgutils.get_or_insert_function(builder.module, signature, name)
            return builder.call(code, (builder.inttoptr(values[0], I8.as_pointer()),))

        return types.int32(place), emit

    return call


_sleep, _wake = _on_semaphore("sem_wait"), _on_semaphore("sem_post")


@intrinsic  # type: ignore[untyped-decorator]  # numba is untyped
def call_code(_: Any, code: Any, arguments: Any) -> Any:
    """Call code by its address, with a tuple of whole numbers.

    By address, since what calls it would else be compiled together with it, for half a minute.
    """

    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        signature = ir.FunctionType(ir.VoidType(), (I64,) * len(arguments))
        called = builder.inttoptr(values[0], signature.as_pointer())
        builder.call(called, cgutils.unpack_tuple(builder, values[1]))
        return context.get_dummy_value()

    return types.void(code, arguments), emit


@compiled
def meet(team: Any) -> None:
    """Wait until every member is here; what each wrote before, all may read after."""
    if team[SIZE] == 1:
        return
    arrived, current = team[FLAGS] + ARRIVED, team[FLAGS] + ROUND
    now = _look(current)
    if _count_up(arrived) == team[SIZE] - 1:
        _show(arrived, 0)
        _show(current, now + 1)
        return
    looks = 0
    while _look(current) == now:
        looks += 1
        if looks % PATIENCE == 0:
            _give_way()
        else:
            _pause()


@compiled
def share(count: int, unit: int, team: Any) -> tuple[int, int]:
    """First and last of the things that a member takes, in whole units but for what is left."""
    units = max(1, count // unit)
    first = team[RANK] * units // team[SIZE] * unit
    last = (team[RANK] + 1) * units // team[SIZE] * unit
    return first, count if team[RANK] == team[SIZE] - 1 else last


class TeamTask:
    """Code of whole numbers that threads run, compiled when it is first needed.

    Args:
        function: Compiled; takes int64.
        takes: How many: of what a team is given, the address of a job, rank, size and flags.
    """

    def __init__(self, function: Callable[..., None], takes: int = 4) -> None:
        self._function = function
        self._takes = takes

    @cached_property
    def code(self) -> Any:
        """What ctypes calls, without Python's lock."""
        signature = types.void(*[types.int64] * self._takes)
        self._compiled = kept_on_disk(partial(cfunc, signature), self._function)
        return self._compiled.ctypes

    @cached_property
    def address(self) -> int:
        """Where the code is."""
        assert self.code is not None  # compiled by now
        return int(self._compiled.address)


def _help(flags: int, rank: int, size: int, bell: int) -> None:
    """Do what a team's leader says, for as long as the process lives."""
    while True:
        while _sleep(bell) != 0:  # a signal came
            pass
        call_code(_look(flags + CODE), (_look(flags + JOB), rank, size, flags))


def _lead(flags: int, size: int, code: int, job: int) -> None:
    """Have a team do a task, as its first member."""
    _show(flags + CODE, code)
    _show(flags + JOB, job)
    for rank in range(1, size):
        _wake(flags + BELLS + rank * LINE)
    call_code(code, (job, 0, size, flags))


HELP, LEAD = TeamTask(_help), TeamTask(_lead)


class Team:
    """Runs compiled tasks on several threads, which are started when first needed.

    Every task ends with ``meet``. What another thread gives it meanwhile runs there alone.

    Args:
        size: Number of threads, the caller's included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._busy = threading.Lock()
        self._process = 0

    def run(self, task: TeamTask, job_J: Any) -> None:
        """Do a task.

        Args:
            task: What is done.
            job_J: What it works on, int64; and what that points to lives on until it is done.
        """
        job = job_J.ctypes.data
        if self.size == 1 or not self._busy.acquire(blocking=False):
            task.code(job, 0, 1, 0)
            return
        try:
            if self._process != os.getpid():  # a fork takes no threads along
                self._start()
            LEAD.code(self._flags, self.size, task.address, job)
        finally:
            self._busy.release()

    def _start(self) -> None:
        # Helpers read it until the process ends, so it is never freed.
        self._memory = ctypes.create_string_buffer(BELLS + (self.size + 1) * LINE)
        self._flags = -(-ctypes.addressof(self._memory) // LINE) * LINE
        for rank in range(1, self.size):
            bell = self._flags + BELLS + rank * LINE
            ctypes.CDLL(None).sem_init(ctypes.c_void_p(bell), 0, 0)
            arguments = (self._flags, rank, self.size, bell)
            threading.Thread(target=HELP.code, args=arguments, daemon=True).start()
        self._process = os.getpid()


@cache
def team_of(size: int) -> Team:
    """The process's team of so many threads; of one where semaphores are not Linux's."""
    return Team(size if sys.platform == "linux" else 1)
