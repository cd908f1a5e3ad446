"""A simulated clock for real code: one thread runs at a time, and waiting costs nothing.

What sleeps or waits gives way to whoever is next on the simulated clock. So code that is written
for ``time`` and ``threading`` runs as it is, ten thousand threads of it, once the two names in its
module are replaced by ``SimulatedTime.time`` and ``SimulatedTime.threading``.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

STACK_BYTES = 512 * 1024
"""Stack of a simulated thread: thousands of the default size would not fit."""

EPOCH_S = 1_800_000_000.0
"""Unix seconds at which every simulation begins."""


class Ended(BaseException):
    """Raised in whoever still waits when the simulation ends."""


class Actor:
    """One simulated thread: a real one, which runs only while it is its turn."""

    def __init__(self) -> None:
        self.turn = _closed_lock()
        self.waits = 0  # counts its waits, so that a time-out of an earlier one is known as such
        self.is_done = False
        self.is_woken = False


def _closed_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


class SimulatedTime:
    """The clock, and who waits for when.

    Attributes:
        now_s: Seconds since the simulation began.
        time: Stands for the module ``time``.
        threading: Stands for the module ``threading``.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Actor, int]] = []
        self._order = itertools.count()
        self._here = threading.local()
        self._given_back = _closed_lock()
        self._actors: set[Actor] = set()
        self._is_ending = False
        self._until_s = 0.0
        self.time = SimpleNamespace(
            monotonic=lambda: self.now_s, time=lambda: EPOCH_S + self.now_s, sleep=self.sleep
        )
        self.threading = SimpleNamespace(
            Event=lambda: SimulatedEvent(self),
            Thread=lambda **told: SimulatedThread(self, **told),
            Lock=threading.Lock,  # held by code that never waits, so nobody meets it closed
            local=threading.local,
        )

    def begin(self, run: Callable[[], object], after_s: float = 0.0) -> Actor:
        """Have a new simulated thread run something, some seconds from now."""
        actor = Actor()
        self._actors.add(actor)
        before = threading.stack_size(STACK_BYTES)
        threading.Thread(target=self._live, args=(actor, run), daemon=True).start()
        threading.stack_size(before)
        self._plan(actor, after_s)
        return actor

    def _live(self, actor: Actor, run: Callable[[], object]) -> None:
        self._here.actor = actor
        actor.turn.acquire()
        try:
            if not self._is_ending:
                run()
        except Ended:
            pass
        finally:
            actor.is_done = True
            self._actors.discard(actor)
            self._pass_on()

    def _plan(self, actor: Actor, after_s: float) -> None:
        entry = (self.now_s + after_s, next(self._order), actor, actor.waits)
        heapq.heappush(self._due, entry)

    def sleep(self, seconds: float) -> None:
        """Let that much time pass for the calling thread."""
        self.wait(seconds)

    @property
    def here(self) -> Actor:
        """The simulated thread that calls."""
        actor: Actor = self._here.actor
        return actor

    def wait(self, seconds: float | None = None) -> bool:
        """Wait to be woken; False if ``seconds`` passed first (None: for ever)."""
        if self._is_ending:
            raise Ended
        actor = self.here
        actor.is_woken = False
        actor.waits += 1
        if seconds is not None:
            self._plan(actor, seconds)
        self._pass_on()
        actor.turn.acquire()
        if self._is_ending:
            raise Ended
        return actor.is_woken

    def wake(self, actor: Actor) -> None:
        """End an actor's wait now."""
        actor.is_woken = True
        self._plan(actor, 0.0)

    def run(self, until_s: float) -> None:
        """Let the simulated threads live until a moment."""
        self._until_s = until_s
        self._pass_on()
        self._given_back.acquire()
        self.now_s = until_s

    def _pass_on(self) -> None:
        """Give the turn to whoever is due next, which may be who calls."""
        while not self._is_ending and self._due and self._due[0][0] <= self._until_s:
            at_s, _, actor, wait = heapq.heappop(self._due)
            if not actor.is_done and wait == actor.waits:  # else it was woken before
                self.now_s = at_s
                actor.waits += 1
                actor.turn.release()
                return
        self._given_back.release()

    def end(self) -> None:
        """End whoever still waits."""
        self._is_ending = True
        for actor in list(self._actors):
            actor.turn.release()
            self._given_back.acquire()


class SimulatedEvent:
    """Stands for ``threading.Event``."""

    def __init__(self, clock: SimulatedTime) -> None:
        self._clock = clock
        self._is_set = False
        self._waiting: dict[Actor, None] = {}  # in order

    def is_set(self) -> bool:
        """Whether it happened."""
        return self._is_set

    def set(self) -> None:
        """Let it happen."""
        self._is_set = True
        for actor in self._waiting:
            self._clock.wake(actor)
        self._waiting.clear()

    def clear(self) -> None:
        """Let it not have happened."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it happens; False on time-out."""
        if not self._is_set:
            actor = self._clock.here
            self._waiting[actor] = None
            self._clock.wait(timeout)
            self._waiting.pop(actor, None)
        return self._is_set


class SimulatedThread:
    """Stands for ``threading.Thread``."""

    def __init__(self, clock: SimulatedTime, target: Callable[[], object], **_: Any) -> None:
        self._clock = clock
        self._target = target
        self._ended = SimulatedEvent(clock)

    def start(self) -> None:
        """Begin, once the calling thread waits for something."""
        self._clock.begin(self._run)

    def _run(self) -> None:
        self._target()
        self._ended.set()

    def join(self) -> None:
        """Wait for its end."""
        self._ended.wait()
