"""Redis started again with and without its data, from an old dump, with a password.

Real servers and processes: whatever Redis comes back with, requests under way and new ones end as
an offline replay says, and the worker says what it knows.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import redis

from offramp.controller.release.registry import AckState
from offramp.deploy.serve import redis_server
from support.releases.scene import Scene


def keeping_a_log(folder: Path) -> Path:
    """A server that writes each change to its append-only file before it answers."""
    binary = folder / "redis-with-log"
    bundled = redis_server._bundled_binary()
    binary.write_text(f'#!/bin/sh\nexec {bundled} "$@" --appendonly yes --appendfsync always\n')
    binary.chmod(0o755)
    return binary


def test_it_comes_back_empty_and_a_promotion_fills_it(scene: Scene) -> None:
    scene.kill()
    (scene.data / "dump.rdb").unlink(missing_ok=True)
    scene.start()
    assert scene.says() == (AckState.STALE, 1)
    scene.bench.publisher.promote(1)
    assert scene.says() == (AckState.ACK, 1)


def test_what_was_promoted_survives_in_its_append_only_file(
    make_scene: Callable[..., Scene], tmp_path: Path
) -> None:
    scene = make_scene(keeping_a_log(tmp_path))
    promoted = scene.bench.serve(3)  # which the worker does not hear of before the end
    scene.kill()
    scene.start()
    assert scene.registry.head() == promoted
    assert scene.says() == (AckState.ACK, 2)
    assert scene.worker.report.reason == scene.worker.unreported == ""
    assert [event.generation for event in scene.registry.events(9)] == [2, 1]
    # A worker without any memory takes it, too: the timestamp came back with the head.
    scene.bench.state_dir = tmp_path / "another"
    assert scene.bench.worker().poll_once().generation == 2
    scene.bench.serve(4)
    assert scene.says() == (AckState.ACK, 3)


def test_it_comes_back_with_an_old_dump(scene: Scene, tmp_path: Path) -> None:
    scene.client.save()
    shutil.copy(scene.data / "dump.rdb", tmp_path / "old.rdb")
    scene.bench.serve(3)
    assert scene.says() == (AckState.ACK, 2)
    os.kill(scene.server.pid, signal.SIGKILL)
    scene.server.__exit__(None, None, None)
    shutil.copy(tmp_path / "old.rdb", scene.data / "dump.rdb")
    scene.start()
    assert scene.says() == (AckState.NACK, 2)
    assert scene.worker.report.reason.startswith("rollback")
    scene.bench.publisher.promote(2)
    assert scene.says() == (AckState.ACK, 2)


def test_a_password_that_changed(scene: Scene) -> None:
    scene.client.config_set("requirepass", "another")
    scene.registry._client.connection_pool.disconnect()
    assert scene.says() == (AckState.STALE, 1)
    assert "Correct user and password" in scene.worker.report.reason
    redis.Redis.from_url(scene.server.url, password="another").config_set("requirepass", "")
    assert scene.says() == (AckState.ACK, 1)
