"""Releases that bring adapters: whole or not at all, by digest, and on disk for the next start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS
from offramp.controller.adapters.adapter_index import PART_BYTES, AdapterSource
from offramp.controller.errors import ConfigError, PolicyRefusedError, RegistryUnavailableError
from offramp.controller.release import records
from offramp.controller.release.registry import AckState
from offramp.worker.following.fetching import ReleaseFetcher
from offramp.worker.following.refresh import PolicyRefresher
from offramp.worker.model.adapter_layers import ExitAdapters
from offramp.worker.model.translators import ExitTranslators


def tuned(folder: Path, fill: bytes, model: str = "aa11") -> AdapterSource:
    """A folder as ``offramp tune`` writes it, larger than one part."""
    folder.mkdir()
    weights = fill * (PART_BYTES + 9)
    facts = {"format": 1, "model": model, "exits": [2], "kind": "layer"}
    (folder / WEIGHTS).write_bytes(weights)
    facts["digest"] = hashlib.sha256(weights).hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(facts))
    return AdapterSource.open(folder)


class PretendedEngine:
    """Takes in whatever folder it is given, and remembers which; a real one reads the tensors."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.fails = ""

    def take_in(self, folder: Path) -> ExitAdapters:
        if self.fails:
            raise ConfigError("translators", self.fails)
        self.seen.append(hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
        return ExitTranslators(digest=json.loads((folder / DESCRIPTION).read_text())["digest"])


@pytest.fixture
def engine() -> PretendedEngine:
    return PretendedEngine()


def worker(site: Any, engine: PretendedEngine | None, **options: Any) -> PolicyRefresher:
    state = site.folder / "state" / "w0"
    take_in = None if engine is None else engine.take_in
    fetcher = ReleaseFetcher(site.registry, state, take_in=take_in, **options)
    return PolicyRefresher(site.registry, site.verifier(), state, "w0", fetcher=fetcher)


def test_a_release_brings_its_adapters_and_a_start_without_redis_has_them(
    site: Any, make_mlp: Any, engine: PretendedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tuned(site.folder / "old", b"o"), tuned(site.folder / "new", b"n")
    follower = worker(site, engine)
    for source in (old, new):
        site.serve(make_mlp(len(engine.seen)), adapters=source)
        assert follower.poll_once().state is AckState.ACK
        assert follower.current.adapters is not None
        assert follower.current.adapters.digest == source.index.digest == engine.seen[-1]
    kept = site.folder / "state" / "w0" / "adapters"
    assert [each.name for each in kept.iterdir()] == [new.index.digest]

    def down(*_: Any) -> None:
        raise RegistryUnavailableError("REDIS_URL", "is down", "Start it")

    monkeypatch.setattr(site.registry, "get_blob", down)
    again = worker(site, engine).current.adapters
    assert again is not None
    assert again.digest == new.index.digest


@pytest.mark.parametrize("damage", ["missing", "corrupt", "no index"])
def test_a_swap_that_lacks_a_part_is_refused_by_name_until_it_is_put_again(
    site: Any, make_mlp: Any, engine: PretendedEngine, damage: str
) -> None:
    site.serve(make_mlp(0))
    follower = worker(site, engine)
    follower.poll_once()
    source = tuned(site.folder / "new", b"n")
    head = site.serve(make_mlp(1), adapters=source)
    lost = source.index.name if damage == "no index" else source.index.parts[1]
    site.store_raw(lost, b"half" if damage == "corrupt" else None)
    ack = follower.poll_once()
    assert ack.state is AckState.NACK
    what = "index" if damage == "no index" else "part 2 of 2"
    assert f"{what} of adapters {source.index.digest}" in ack.reason
    assert ack.reason.startswith("digest_mismatch" if damage == "corrupt" else "missing_blob")
    assert follower.current.generation == 1
    assert not [*(site.folder / "state" / "w0" / "adapters").glob("*")]
    site.publisher.promote(head.generation)
    assert follower.poll_once().state is AckState.ACK
    assert engine.seen == [source.index.digest]


def test_a_publisher_that_was_killed_half_way_leaves_nothing_in_force(
    site: Any, make_mlp: Any, engine: PretendedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tuned(site.folder / "new", b"n")
    put, count = site.registry.put_blob, iter(range(9))

    def dies(blob: bytes) -> str:
        if next(count) == 2:
            raise KeyboardInterrupt
        return str(put(blob))

    monkeypatch.setattr(site.registry, "put_blob", dies)
    with pytest.raises(KeyboardInterrupt):
        site.release(make_mlp(1), adapters=source)
    assert site.registry.get_blob(source.index.name, PART_BYTES) is None
    monkeypatch.setattr(site.registry, "put_blob", put)
    site.publisher.promote(1)  # it is recorded
    follower = worker(site, engine)
    assert follower.poll_once().state is AckState.ACK
    assert engine.seen == [source.index.digest]


def test_a_worker_refuses_by_name_what_it_cannot_run(
    site: Any, make_mlp: Any, engine: PretendedEngine
) -> None:
    source = tuned(site.folder / "new", b"n")
    site.serve(make_mlp(1), adapters=source)
    named = source.index.digest
    alone = worker(site, None).poll_once()
    assert alone.reason == (
        f"unsupported: it names adapters {named}, and this worker runs with none"
    )
    small = worker(site, engine, limit_mb=1).poll_once()
    assert small.reason.startswith(f"too_large: adapters {named} have 4.0 MiB, over 1")
    assert "OFFRAMP_MAX_ADAPTER_MB" in small.reason
    engine.fails = "exit 2 is misshapen"
    assert worker(site, engine).poll_once().reason == (
        f"unsupported: adapters {named} cannot be used: exit 2 is misshapen"
    )
    assert worker(site, None, own=named).poll_once().state is AckState.ACK


def test_adapters_of_another_model_are_never_signed(site: Any, make_mlp: Any) -> None:
    with pytest.raises(PolicyRefusedError, match="were fitted to model cc, not to aa11"):
        site.release(make_mlp(1), adapters=tuned(site.folder / "new", b"n", "cc"))
    assert site.publisher._ledger.last() == 0


def test_old_blobs_leave_the_registry_and_adapters_that_are_named_stay(
    site: Any, make_mlp: Any, engine: PretendedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "KEPT", 2)
    old, new = tuned(site.folder / "old", b"o"), tuned(site.folder / "new", b"n")
    first = site.serve(make_mlp(1), adapters=old)
    site.serve(make_mlp(2), adapters=new)
    waiting = site.release(make_mlp(3))
    site.publisher.promote(site.serve(make_mlp(4), adapters=new).generation)

    def is_there(digest: str) -> bool:
        return site.registry.get_blob(digest, PART_BYTES) is not None

    assert not any(map(is_there, (first.digest, old.index.name, old.index.parts[0])))
    assert all(map(is_there, (new.index.name, *new.index.parts)))
    assert not is_there(waiting.digest)  # overtaken: nobody will run it
    site.publisher.rollback(to=first.generation)
    assert worker(site, engine).poll_once().state is AckState.ACK
    assert engine.seen == [old.index.digest]


def test_one_policy_through_other_adapters_is_another_release(
    site: Any, make_mlp: Any, engine: PretendedEngine
) -> None:
    old, new = tuned(site.folder / "old", b"o"), tuned(site.folder / "new", b"n")
    site.serve(make_mlp(1), adapters=old)
    follower = worker(site, engine)
    follower.poll_once()
    site.release(make_mlp(1), adapters=new)
    site.publisher.roll_out(50)
    assert follower.poll_once().state is AckState.ACK
    canary = follower.current.canary
    assert canary is not None
    assert canary.adapters is not None
    assert canary.adapters.digest == new.index.digest
    site.publisher.roll_out(100)
    site.publisher.rollback()
    assert follower.poll_once().state is AckState.ACK
    assert follower.current.adapters is not None
    assert follower.current.adapters.digest == old.index.digest


def test_a_rollback_brings_the_adapters_that_its_policy_names(
    site: Any, make_mlp: Any, engine: PretendedEngine
) -> None:
    source = tuned(site.folder / "new", b"n")
    site.serve(make_mlp(1), adapters=source)
    site.serve(make_mlp(2))
    follower = worker(site, engine)
    follower.poll_once()
    assert follower.current.adapters is None
    site.publisher.rollback()
    assert follower.poll_once().state is AckState.ACK
    assert engine.seen == [source.index.digest]
