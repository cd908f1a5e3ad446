"""Live traffic on disk: it is bounded, the oldest gives way, and a lost disk is survived."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs import TraceStore
from offramp.envs.traces import traffic_folder
from offramp.envs.traces.candidate_file import load_candidates
from offramp.envs.traces.traffic_folder import MIB, TRAFFIC, TrafficFolder

TABLE_VK = np.arange(12, dtype=np.int32).reshape(4, 3)

MakeChunk = Callable[..., TraceChunk]


def test_chunks_of_one_kind_share_a_store(
    tmp_path: Path, header: TraceHeader, make_chunk: MakeChunk
) -> None:
    folder = TrafficFolder(tmp_path / "w", most_mb=10)
    other = dataclasses.replace(header, translators="ab")
    for name, kind in (("a", header), ("b", other), ("c", header)):
        folder.keep(kind, TABLE_VK, make_chunk(name))
    folder.keep(header, TABLE_VK + 1, make_chunk("d"))
    folder.close()
    again = TrafficFolder(tmp_path / "w", most_mb=10)  # a worker that was started anew
    again.keep(header, TABLE_VK, make_chunk("e"))
    again.close()
    stores = [TraceStore.open(each) for each in (tmp_path / "w").iterdir()]
    held = {tuple(entry.document for entry in store.chunks): store for store in stores}
    assert held.keys() == {("a", "c", "e"), ("b",), ("d",)}
    assert held["b",].header == other
    assert {entry.split for entry in stores[0].chunks} == {TRAFFIC}
    np.testing.assert_array_equal(load_candidates(held["d",].folder), TABLE_VK + 1)
    assert (folder.kept, folder.dropped, folder.lost) == (4, 0, 0)


def test_the_oldest_give_way(tmp_path: Path, header: TraceHeader, make_chunk: MakeChunk) -> None:
    probe = TrafficFolder(tmp_path / "probe", most_mb=10)
    probe.keep(header, TABLE_VK, make_chunk("a"))
    probe.close()
    [chunk] = tmp_path.glob("probe/*/*.parquet")
    size = chunk.stat().st_size
    folder = TrafficFolder(tmp_path / "w", most_mb=4.5 * size / MIB)
    other = dataclasses.replace(header, translators="ab")
    folder.keep(other, TABLE_VK, make_chunk("old"))
    for name in "abcdef":
        folder.keep(header, TABLE_VK, make_chunk(name))
    folder.close()
    [store] = [TraceStore.open(each) for each in (tmp_path / "w").iterdir()]
    assert [entry.document for entry in store.chunks] == ["c", "d", "e", "f"]
    assert sorted(each.name for each in store.folder.glob("*.parquet")) == sorted(
        entry.name for entry in store.chunks
    )
    assert (folder.kept, folder.dropped, folder.lost) == (7, 3, 0)
    # A bound below a single chunk still leaves the newest.
    tight = TrafficFolder(tmp_path / "w", most_mb=0.1 * size / MIB)
    tight.keep(header, TABLE_VK, make_chunk("g"))
    tight.close()
    assert [entry.document for entry in TraceStore.open(store.folder).chunks] == ["g"]


def test_a_lost_disk_is_counted_and_said_once(
    tmp_path: Path, header: TraceHeader, make_chunk: MakeChunk, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "w"
    place.write_text("no folder")
    folder = TrafficFolder(place, most_mb=10)
    for name in "abc":
        folder.keep(header, TABLE_VK, make_chunk(name))
    while folder.lost < 3:
        folder._thread.join(0.01)
    assert caplog.text.count("live traffic is not kept") == 1
    place.unlink()
    folder.keep(header, TABLE_VK, make_chunk("d"))
    folder.close()
    assert (folder.kept, folder.lost) == (1, 3)


def test_a_disk_that_is_too_slow_holds_nobody_up(
    tmp_path: Path, header: TraceHeader, make_chunk: MakeChunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_folder, "MOST_QUEUED", 2)
    folder = TrafficFolder(tmp_path / "w", most_mb=10)
    chunk = make_chunk("a")
    for _ in range(200):
        folder.keep(header, TABLE_VK, chunk)
    folder.close()
    assert folder.kept + folder.lost == 200
    assert folder.lost > 0
