"""Damage to the registry, a forged head and a wrong clock heal once their cause is gone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from offramp.controller.errors import (
    ConfigError,
    PolicyRefusedError,
    PromoteConflictError,
    RegistryUnavailableError,
)
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import AckState, Head
from offramp.deploy.serve.redis_server import EmbeddedRedis

Site = Any


def damage(site: Site, digest: str) -> None:
    blob = site.registry.get_blob(digest, 10**7)
    site.store_raw(digest, blob[:-1] + bytes([blob[-1] ^ 1]))


@pytest.mark.parametrize("repair", ["promote", "by hand"])
def test_a_damaged_blob_heals(site: Site, make_mlp: Any, repair: str) -> None:
    release = site.serve(make_mlp(1))
    blob = site.registry.get_blob(release.digest, 10**7)
    damage(site, release.digest)
    worker = site.refresher()
    assert worker.poll_once().reason.startswith("digest_mismatch: ")
    if repair == "promote":
        site.publisher.promote(1)
    else:
        site.store_raw(release.digest, blob)
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.ACK, 1)


def test_a_rollback_to_a_damaged_blob_repairs_it(site: Site, make_mlp: Any) -> None:
    old = site.serve(make_mlp(1))
    site.serve(make_mlp(2))
    damage(site, old.digest)
    site.publisher.rollback()
    ack = site.refresher().poll_once()
    assert (ack.state, ack.digest) == (AckState.ACK, old.digest)


@pytest.mark.parametrize("step_s", [10**7, -(10**7)])
def test_a_clock_that_was_wrong_for_a_while_leaves_no_refusal(
    site: Site, make_mlp: Any, step_s: float
) -> None:
    worker = site.refresher()
    site.serve(make_mlp(1))
    worker.poll_once()
    site.serve(make_mlp(2), expires_in_s=3600.0)
    site.now[0] += step_s
    worker.poll_once()
    site.now[0] -= step_s
    ack = worker.poll_once()
    assert (ack.state, ack.generation, ack.reason) == (AckState.ACK, 2, "")


def unsigned(site: Site) -> Head:
    head: Head = site.registry.head()
    return replace(head, generation=1_000_000)


def signed_by_another(site: Site) -> Head:
    foreign = load_or_create_key(site.folder / "foreign.pem")
    head: Head = site.registry.head()
    return replace(head, generation=9, envelope=foreign.sign(b"{}"))


def of_another_epoch(site: Site) -> Head:
    head: Head = site.registry.head()
    return replace(head, epoch=7)


FORGED = [unsigned, signed_by_another, of_another_epoch]


@pytest.mark.parametrize("forge", FORGED)
@pytest.mark.parametrize("then", ["publish", "promote", "rollback"])
def test_a_forged_head_gives_way_loudly(
    site: Site, make_mlp: Any, caplog: pytest.LogCaptureFixture, forge: Any, then: str
) -> None:
    site.serve(make_mlp(1))
    site.serve(make_mlp(2))
    worker = site.refresher()
    assert worker.poll_once().generation == 2
    forged = forge(site)
    site.registry.discard_head()
    site.registry.promote(forged, 0)
    assert worker.poll_once().state is AckState.NACK
    with caplog.at_level(logging.WARNING):
        if then == "publish":
            assert site.release(make_mlp(3)).generation == 3
        elif then == "promote":
            site.publisher.promote(2)
        else:
            site.publisher.rollback()
    assert "Somebody else wrote the head of channel demo" in caplog.text
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.ACK, 3 if then == "rollback" else 2)


@pytest.mark.parametrize("registry", ["redis"], indirect=True)
@pytest.mark.parametrize("fields", [None, {"gen": "one"}, {"gen": 1, "envelope": b"x" * 300_000}])
def test_an_unreadable_head_gives_way(site: Site, make_mlp: Any, fields: Any) -> None:
    site.serve(make_mlp(1))
    key = site.registry._key("head")
    site.registry._client.delete(key)
    if fields is None:
        site.registry._client.set(key, b"of another type")
    else:
        site.registry._client.hset(key, mapping=fields)
    worker = site.refresher()
    assert worker.poll_once().state is AckState.NACK
    site.publisher.promote(1)
    assert worker.poll_once().state is AckState.ACK


def test_a_head_of_a_later_epoch_needs_the_publishers_timestamp(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    worker = site.refresher()
    worker.poll_once()
    manifest, blob = site.draft(make_mlp(2), generation=2)
    site.registry.discard_head()
    site.offer(replace(manifest, epoch=7), blob)
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.STALE, 1)
    assert "epoch 7 would be new, and the publisher is in epoch 1" in ack.reason
    later = Publisher(site.registry, site.publisher._ledger, site.key, "demo", site.clock, epoch=7)
    later.heartbeat()
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.ACK, 2)


def test_an_epoch_that_is_over_stays_over(site: Site, make_mlp: Any) -> None:
    manifest, blob = site.draft(make_mlp(2), generation=2)
    Publisher(
        site.registry, site.publisher._ledger, site.key, "demo", site.clock, epoch=2
    ).heartbeat()
    site.offer(replace(manifest, epoch=2), blob)
    worker = site.refresher()
    assert worker.poll_once().generation == 2
    site.registry.discard_head()
    site.offer(*site.draft(make_mlp(3), generation=9))
    assert worker.poll_once().reason.startswith("rollback: epoch 1 is over")


def test_a_new_worker_of_an_old_pool_is_not_taken_in_by_an_old_dump(
    site: Site, make_mlp: Any
) -> None:
    site.serve(make_mlp(1))
    old, stamp = site.registry.head(), site.registry.fresh()
    site.serve(make_mlp(2))
    site.refresher("experienced").poll_once()
    site.registry.discard_head()
    site.registry.promote(old, 0)
    site.registry.stamp(stamp, 60.0)  # as restored with the head
    ack = site.refresher("new").poll_once()
    assert (ack.state, ack.generation) == (AckState.NACK, 0)
    assert ack.reason.startswith("rollback: ")


def test_a_new_worker_takes_nothing_without_a_living_timestamp(site: Site, make_mlp: Any) -> None:
    site.serve(make_mlp(1))
    site.now[0] += 25 * 3600.0
    worker = site.refresher()
    ack = worker.poll_once()
    assert (ack.state, ack.generation) == (AckState.STALE, 0)
    assert ack.reason.startswith("no release was accepted before, and ")
    site.publisher.promote(1)
    assert worker.poll_once().state is AckState.ACK


def test_thirty_publishers_at_once(site: Site, make_mlp: Any) -> None:
    """Each of its own ledger object, as thirty commands would have."""

    def publish_and_promote(seed: int) -> tuple[int, str]:
        release = site.release(make_mlp(seed))
        try:
            site.publisher.promote(release.generation)
        except (ConfigError, PromoteConflictError) as error:
            return release.generation, str(error)
        return release.generation, ""

    with ThreadPoolExecutor(30) as pool:
        outcomes = sorted(pool.map(publish_and_promote, range(30)))
    assert [generation for generation, _ in outcomes] == list(range(1, 31))
    told = {generation: error for generation, error in outcomes if error}
    assert all("promoted before" in error for error in told.values())
    served = [event.generation for event in site.registry.events(40)]
    assert served == sorted(set(range(1, 31)) - told.keys(), reverse=True)
    assert site.registry.head().generation == served[0] == 30


@contextmanager
def out_of_memory(admin: Any) -> Iterator[None]:
    admin.config_set("maxmemory", 1)
    yield
    admin.config_set("maxmemory", 0)


@contextmanager
def read_only(admin: Any) -> Iterator[None]:
    admin.replicaof("127.0.0.1", 1)
    yield
    admin.replicaof("NO", "ONE")


@contextmanager
def read_only_user(admin: Any) -> Iterator[None]:
    admin.acl_setuser("default", enabled=True, commands=["-@write"])
    yield
    admin.acl_setuser("default", enabled=True, commands=["+@all"])


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server.url, redis.Redis.from_url(server.url)


CANNOT = [
    (out_of_memory, "is out of memory"),
    (read_only, "is a read-only replica"),
    (read_only_user, "does not allow it"),
]


@pytest.mark.parametrize(("state", "said"), CANNOT)
def test_a_worker_that_cannot_report_is_not_stale(
    admin: tuple[str, Any], tmp_path: Path, make_mlp: Any, make_site: Any, state: Any, said: str
) -> None:
    url, client = admin
    site = make_site(RedisRegistry(url, "demo"), tmp_path)
    site.serve(make_mlp(1))
    worker = site.refresher()
    with state(client):
        ack = worker.poll_once()
        assert (ack.state, ack.generation) == (AckState.ACK, 1)
        assert said in worker.unreported
        assert "Start Redis" not in worker.unreported
        with pytest.raises(RegistryUnavailableError, match=said):
            site.release(make_mlp(2))
    assert site.registry.acks() == []
    worker.poll_once()
    assert worker.unreported == ""
    assert [each.generation for each in site.registry.acks()] == [1]


def test_a_promotion_says_that_it_served_although_its_timestamp_failed(
    site: Site, make_mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, stamps = site.release(make_mlp(1)), []

    def stamp(envelope: bytes, ttl_s: float) -> None:
        stamps.append(envelope)
        if len(stamps) == 2:  # the one after the head has moved
            raise RegistryUnavailableError("REDIS_URL", "is out of memory", "Free some")

    monkeypatch.setattr(site.registry, "stamp", stamp)
    with pytest.raises(RegistryUnavailableError, match=r"generation 1 is served.*out of memory"):
        site.publisher.promote(release.generation)
    assert site.registry.head().generation == 1


def test_a_stream_of_another_type_costs_the_wake_up_alone(redis_registry: RedisRegistry) -> None:
    redis_registry._client.set(redis_registry._key("events"), b"x")
    digest = redis_registry.put_blob(b"blob")
    redis_registry.promote(Head(1, 1, b"envelope", digest), 0)
    head = redis_registry.head()
    assert head is not None
    assert head.generation == 1
    with pytest.raises(PolicyRefusedError, match="WRONGTYPE"):
        redis_registry.wait(0.01)
