"""What only a registry across a network can get wrong."""

from __future__ import annotations

import os
import re
import signal
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

import pytest
import redis

from offramp.controller.errors import (
    ConfigError,
    PolicyRefusedError,
    Refusal,
    RegistryUnavailableError,
)
from offramp.controller.keys.envelopes import MAX_ENVELOPE_BYTES
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack, AckState, Head
from offramp.deploy.serve.redis_server import EmbeddedRedis

HEAD = Head(1, 1, b"envelope", "")


@pytest.fixture
def ready(redis_registry: RedisRegistry) -> tuple[RedisRegistry, Head]:
    digest = redis_registry.put_blob(b"blob")
    return redis_registry, Head(1, 1, b"envelope", digest)


@pytest.mark.parametrize("registry", ["redis"], indirect=True)
def test_the_keys_are_those_of_the_schema(site: Any, redis_url: str, make_mlp: Any) -> None:
    release = site.serve(make_mlp(0))
    site.refresher("w0").poll_once()
    client: Any = redis.Redis.from_url(redis_url)  # its types leave bytes or str open
    prefix = site.registry._prefix
    assert re.fullmatch(r"offramp:\{c\d+\}:", prefix)
    found = {key.decode().removeprefix(prefix): key for key in client.scan_iter(f"{prefix}*")}
    assert found.keys() == {f"blob:{release.digest}", "head", "fresh", "events", "ack:w0"}
    kinds = {name: client.type(key).decode() for name, key in found.items()}
    assert kinds == {
        f"blob:{release.digest}": "string",
        "head": "hash",
        "fresh": "string",
        "events": "stream",
        "ack:w0": "hash",
    }
    fields = {b"gen", b"epoch", b"envelope", b"digest", b"stable"}
    assert set(client.hgetall(found["head"])) == fields
    assert client.pttl(found["fresh"]) > 0
    assert client.pttl(found["ack:w0"]) > 0


def lose_answer(registry: RedisRegistry, execute: bool) -> list[int]:
    """Make every script's answer get lost, before or after it ran."""
    calls: list[int] = []
    run: Callable[..., Any] = registry._client.eval

    def eval_(*arguments: Any) -> Any:
        calls.append(1)
        if execute:
            run(*arguments)
        raise redis.ConnectionError("lost")

    registry._client.eval = eval_  # type: ignore[assignment]  # it takes all that eval takes
    return calls


def test_a_promotion_whose_answer_is_lost_is_looked_up(ready: tuple[RedisRegistry, Head]) -> None:
    registry, head = ready
    calls = lose_answer(registry, execute=True)
    registry.promote(head, 0)
    assert registry.head() == head
    assert calls == [1]


def test_a_promotion_that_never_ran_is_not_repeated(ready: tuple[RedisRegistry, Head]) -> None:
    registry, head = ready
    calls = lose_answer(registry, execute=False)
    with pytest.raises(RegistryUnavailableError):
        registry.promote(head, 0)
    assert registry.head() is None
    assert calls == [1]


class HangingUp(socketserver.StreamRequestHandler):
    """Agrees to everything but a script, at which it hangs up."""

    scripts: ClassVar[list[int]] = []

    def handle(self) -> None:
        while line := self.rfile.readline():
            arguments = []
            for _ in range(int(line[1:])):
                length = int(self.rfile.readline()[1:])
                arguments.append(self.rfile.read(length + 2)[:-2])
            if arguments[0] == b"EVAL":
                self.scripts.append(1)
                return
            self.wfile.write(b"+OK\r\n" if arguments[0] == b"CLIENT" else b":0\r\n")


def test_the_client_library_does_not_repeat_a_promotion_either() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangingUp) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        registry = RedisRegistry(f"redis://127.0.0.1:{server.server_address[1]}/0", "c", 0.2)
        registry.head = lambda: None  # type: ignore[method-assign]
        with pytest.raises(RegistryUnavailableError):
            registry.promote(HEAD, 0)
        server.shutdown()
        registry.close()
    assert HangingUp.scripts == [1]


def test_a_read_is_repeated_once(ready: tuple[RedisRegistry, Head]) -> None:
    registry, head = ready
    registry.promote(head, 0)
    read, calls = registry._client.hmget, []

    def hmget(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise redis.ConnectionError("lost")
        return read(*arguments)

    registry._client.hmget = hmget  # type: ignore[assignment]  # it takes all that hmget takes
    assert registry.head() == head
    assert len(calls) == 2


def test_a_frozen_server_is_given_up_soon(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        registry = RedisRegistry(server.url, "c", timeout_s=0.1)
        assert registry.head() is None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            started = monotonic()
            with pytest.raises(RegistryUnavailableError) as caught:
                registry.head()
            assert monotonic() - started < 2.0
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert caught.value.field == "REDIS_URL"
        assert registry.head() is None
        registry.close()


def test_an_absent_server_names_the_setting_and_hides_the_password() -> None:
    registry = RedisRegistry("redis://user:hush@127.0.0.1:1/0", "c")
    ack = Ack(
        worker="w",
        boot="b",
        generation=0,
        digest="",
        about=0,
        state=AckState.ACK,
        reason="",
        at=0.0,
    )
    calls: list[Callable[[], Any]] = [
        registry.head,
        registry.fresh,
        registry.acks,
        lambda: registry.events(1),
        lambda: registry.wait(0.01),
        lambda: registry.put_blob(b"x"),
        lambda: registry.get_blob("0", 1),
        lambda: registry.stamp(b"x", 1.0),
        lambda: registry.acknowledge(ack, 1.0),
        lambda: registry.promote(HEAD, 0),
    ]
    for call in calls:
        with pytest.raises(RegistryUnavailableError, match="REDIS_URL") as caught:
            call()
        assert "127.0.0.1:1" in str(caught.value)
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://here", "localhost:6379", ""])
def test_an_unusable_address_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="REDIS_URL"):
        RedisRegistry(url, "c")


@pytest.mark.parametrize("url", ["redis://h:1/0", "rediss://h:1/0", "unix:///tmp/none.sock"])
def test_the_three_kinds_of_address_are_understood(url: str) -> None:
    RedisRegistry(url, "c").close()


@pytest.mark.parametrize("channel", ["", "a b", "a}b", "a*", "x" * 65, "a\n"])
def test_an_unusable_channel_is_a_config_error(channel: str) -> None:
    with pytest.raises(ConfigError, match="CHANNEL"):
        RedisRegistry("redis://h:1/0", channel)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gen": "one", "epoch": 1, "envelope": b"", "digest": ""}, Refusal.BAD_FORMAT),
        ({"gen": 1, "epoch": 1, "envelope": b"", "digest": b"\xff"}, Refusal.BAD_FORMAT),
        ({"gen": 1}, Refusal.BAD_FORMAT),
        ({"gen": 1, "envelope": b"x" * (MAX_ENVELOPE_BYTES + 1)}, Refusal.TOO_LARGE),
    ],
)
def test_a_mangled_head_is_refused(
    redis_registry: RedisRegistry, fields: dict[Any, Any], reason: Refusal
) -> None:
    redis_registry._client.hset(redis_registry._key("head"), mapping=fields)
    with pytest.raises(PolicyRefusedError) as caught:
        redis_registry.head()
    assert caught.value.reason is reason


def test_a_key_of_another_type_is_refused_and_no_crash(redis_registry: RedisRegistry) -> None:
    # The server serves: somebody else wrote there, whom to start it again would not undo.
    redis_registry._client.set(redis_registry._key("head"), b"x")
    with pytest.raises(PolicyRefusedError, match="WRONGTYPE"):
        redis_registry.head()
    redis_registry.discard_head()
    assert redis_registry.head() is None


def test_records_that_are_no_acknowledgement_are_passed_over(redis_registry: RedisRegistry) -> None:
    redis_registry._client.hset(redis_registry._key("ack:x"), mapping={"state": "?"})
    redis_registry._client.hset(redis_registry._key("ack:y"), mapping={b"\xff": "?"})
    assert redis_registry.acks() == []


def test_forgetting_a_channel_leaves_the_others(redis_url: str) -> None:
    mine, other = (RedisRegistry(redis_url, name) for name in ("forget-me", "forget-me-not"))
    digests = [registry.put_blob(b"blob") for registry in (mine, other)]
    for registry, digest in zip((mine, other), digests, strict=True):
        registry.promote(Head(1, 1, b"envelope", digest), 0)
    mine.forget()
    assert mine.head() is None
    assert mine.get_blob(digests[0], 10) is None
    head = other.head()
    assert head is not None
    assert head.generation == 1
    other.forget()
    mine.close()
    other.close()
