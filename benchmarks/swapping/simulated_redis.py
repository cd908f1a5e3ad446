"""A real Redis server that answers in simulated time, as one that many clients ask at once would.

Every command is truly carried out, by one connection, on a real server, which counts commands and
bytes. How long it takes on the simulated clock is modelled: one thread serves commands in the order
in which they come, each for as long as this server's processor was measured to need; replies share
one network card; whoever waits longer for the thread than its socket time-out goes away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis

from swapping.simulated_time import Actor, SimulatedTime

ROUND_TRIP_S = 0.0005
CARD_BYTES_S = 1.25e9
"""Ten gigabits per second."""

HELLO_COMMANDS = 2
"""What redis-py says at each new connection (CLIENT SETINFO, twice), counted as commands."""

NOTHING = b"*-1\r\n"
"""What a blocking read is answered that timed out."""

BIN_S = 0.1
"""Width of the bins in which the load is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCosts:
    """What the server's one thread needs, measured.

    Attributes:
        command_s: Processor seconds of a command with a short answer, its system calls included.
        byte_s: Processor seconds per byte of a long answer.
    """

    command_s: float
    byte_s: float


@dataclass(slots=True)
class ServerLoad:
    """What reached the server.

    Attributes:
        commands: By bin of simulated time.
        sent: Bytes beside those that the real server counted.
        late: Commands whose client went away.
        longest_s: Longest wait for the thread.
        held: Most bytes of answers that were held in its memory at once.
    """

    commands: dict[int, int] = field(default_factory=dict)
    sent: int = 0
    late: int = 0
    longest_s: float = 0.0
    held: int = 0


class SimulatedServer:
    """The server, and the network in front of it.

    Args:
        clock: The simulated clock.
        url: Where the real server is.
        costs: What its thread needs.

    Attributes:
        blob_bytes: Size that blobs are taken to have; the real ones are small.
        is_up: Whether it answers; if not, connections are refused.
        load: What reached it since ``load`` was replaced last.
        told: Simulated time at which each worker first acknowledged each generation.
        states: What each worker said last.
        real: A connection to the real server.
        starts: How often it was started again.
        promotions: How often the head moved.
    """

    def __init__(self, clock: SimulatedTime, url: str, costs: ServerCosts) -> None:
        self.clock = clock
        self.is_up = True
        self.load = ServerLoad()
        self.told: dict[int, dict[str, float]] = {}
        self.states: dict[str, str] = {}
        self.blob_bytes = 0
        self.real = redis.Redis.from_url(url)
        self.starts = 0  # connections of before its last start are lost
        self.promotions = 0
        self._costs = costs
        self._thread_free_s = self._card_free_s = 0.0
        self._answers: deque[tuple[float, int]] = deque()
        self._held = 0
        self._blocked: dict[Actor, None] = {}  # in order

    def stop(self) -> None:
        """Refuse connections from now on, and cut those that are open."""
        self.is_up = False
        self.wake()

    def start(self) -> None:
        """Answer again, with the data of before."""
        self.is_up = True
        self.starts += 1

    def wake(self) -> None:
        """Answer whoever blocks on the stream, as after a promotion."""
        for actor in self._blocked:
            self.clock.wake(actor)
        self._blocked.clear()

    def serve(self, call: Callable[[], Any], timeout_s: float, commands: int, size: int) -> Any:
        """Carry a client's command out, and let it wait for as long as that takes.

        Args:
            call: The command, on the real server.
            timeout_s: How long the client waits for the server's thread.
            commands: How many commands it is.
            size: Bytes of the answer, if it is a long one.

        Raises:
            redis.ConnectionError: the server is down.
            redis.TimeoutError: it has too much to do.
        """
        self._require_up()
        now_s, load = self.clock.now_s, self.load
        place = int(now_s / BIN_S)
        load.commands[place] = load.commands.get(place, 0) + commands
        answer = call()
        work_s = commands * self._costs.command_s + size * self._costs.byte_s
        self._thread_free_s = max(self._thread_free_s, now_s) + work_s
        wait_s = self._thread_free_s - now_s
        load.longest_s = max(load.longest_s, wait_s)
        if wait_s > timeout_s:
            load.late += commands
            self.clock.sleep(timeout_s)
            raise redis.TimeoutError("Timeout reading from socket")
        self.clock.sleep(ROUND_TRIP_S + wait_s + self._send_s(size))
        self._require_up()
        return answer

    def _send_s(self, size: int) -> float:
        """Seconds from the end of the thread's work to the end of a long answer."""
        if not size:
            return 0.0
        while self._answers and self._answers[0][0] <= self.clock.now_s:
            self._held -= self._answers.popleft()[1]
        ready_s = self._thread_free_s
        self._card_free_s = max(self._card_free_s, ready_s) + size / CARD_BYTES_S
        self._answers.append((self._card_free_s, size))
        self._held += size
        self.load.sent += size
        self.load.held = max(self.load.held, self._held)
        return self._card_free_s - ready_s

    def promoted(self) -> None:
        """Tell the simulation that the head moved."""
        self.promotions += 1
        self.wake()

    def block(self, timeout_s: float) -> bool:
        """Wait for the next promotion, as a blocking read of the stream does; False if none came.

        Raises:
            redis.ConnectionError: the server went down meanwhile.
        """
        actor = self.clock.here
        self._blocked[actor] = None
        is_woken = self.clock.wait(timeout_s)
        self._blocked.pop(actor, None)
        self._require_up()
        if is_woken:  # the answers are written one after the other
            self.serve(lambda: None, timeout_s + 1.0, 1, 0)
        return is_woken

    def _require_up(self) -> None:
        if not self.is_up:
            raise redis.ConnectionError("Connection refused")


class SimulatedClient:
    """Stands for ``redis.Redis`` in a worker: what RedisRegistry asks of it, in simulated time."""

    def __init__(self, server: SimulatedServer, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s
        self._start = -1  # of the server that it is connected to
        self._seen = -1

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *told: self._ask(lambda: getattr(self._server.real, name)(*told))

    def getrange(self, key: str, start: int, end: int) -> Any:
        """A value; a blob is as long as the simulation says."""
        size = self._server.blob_bytes if ":blob:" in key else 0
        return self._ask(lambda: self._server.real.getrange(key, start, end), size=size)

    def xread(self, streams: dict[Any, Any], block: int) -> Any:
        """What is new in a stream; waits for it as long as ``block`` says, in milliseconds.

        The real server is asked only if there is something new: a fleet that waits would ask it
        forty thousand times per simulated second. What it would have counted is counted here.
        """
        server = self._server
        if self._seen != server.promotions:
            self._seen = server.promotions
            return self._ask(lambda: server.real.xread(streams))
        words = ("XREAD", "BLOCK", block, "STREAMS", *streams, *streams.values())
        server.load.sent += _packed_bytes(*words) + len(NOTHING)
        self._ask(lambda: None)
        # The head may have moved while the question was on its way.
        if self._seen == server.promotions and not server.block(block / 1e3):
            return []
        self._seen = server.promotions
        return server.real.xread(streams)

    def pipeline(self, transaction: bool) -> SimulatedPipeline:
        """Commands that are sent together."""
        return SimulatedPipeline(self._server, self._ask, transaction)

    def close(self) -> None:
        """Nothing to let go of."""

    def _ask(self, call: Callable[[], Any], commands: int = 1, size: int = 0) -> Any:
        server = self._server
        if self._start != server.starts:
            hello = server.real.ping
            server.serve(lambda: (hello(), hello()), self._timeout_s, HELLO_COMMANDS, 0)
            self._start = server.starts
        try:
            return server.serve(call, self._timeout_s, commands, size)
        except redis.TimeoutError:
            self._start = -1  # redis-py gives the connection up
            raise


class SimulatedPipeline:
    """Stands for the pipeline that writes an acknowledgement."""

    def __init__(self, server: SimulatedServer, ask: Callable[..., Any], transaction: bool) -> None:
        self._server = server
        self._ask = ask
        self._pipe = server.real.pipeline(transaction)
        self._ack: dict[Any, Any] = {}

    def __enter__(self) -> SimulatedPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.reset()

    def hset(self, key: str, mapping: dict[Any, Any]) -> None:
        """Queue an acknowledgement."""
        self._ack = mapping
        self._pipe.hset(key, mapping=mapping)

    def pexpire(self, key: str, milliseconds: int) -> None:
        """Queue its time to live."""
        self._pipe.pexpire(key, milliseconds)

    def execute(self) -> None:
        """Send what was queued, between MULTI and EXEC."""
        self._ask(self._pipe.execute, commands=4)
        worker, generation = self._ack["worker"], self._ack["generation"]
        seen = self._server.told.setdefault(generation, {})
        seen.setdefault(worker, self._server.clock.now_s)
        self._server.states[worker] = self._ack["state"]


def _packed_bytes(*words: object) -> int:
    """Size of a command on the wire: its words as bulk strings, each with its length."""
    texts = [str(word) for word in words]
    return len(f"*{len(texts)}\r\n") + sum(len(f"${len(each)}\r\n{each}\r\n") for each in texts)
