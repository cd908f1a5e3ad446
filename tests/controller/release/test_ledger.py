from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.policies.kinds import digest_of
from offramp.controller.release.ledger import FolderLedger


def test_releases_are_kept_in_order(tmp_path: Path) -> None:
    ledger = FolderLedger(tmp_path)
    assert ledger.last() == 0
    ledger.append(1, b"one", b"blob")
    ledger.append(2, b"two", b"blob")
    again = FolderLedger(tmp_path)
    assert again.last() == 2
    assert again.generations() == [1, 2]
    assert (again.get(1), again.get(2)) == (b"one", b"two")
    assert again.blob(digest_of(b"blob")) == b"blob"
    assert (tmp_path / "00000001.release").read_bytes() == b"one"


@pytest.mark.parametrize("generation", [0, 1, 2, 4])
def test_rewrites_and_gaps_are_refused(tmp_path: Path, generation: int) -> None:
    ledger = FolderLedger(tmp_path)
    ledger.append(1, b"one", b"a")
    ledger.append(2, b"two", b"b")
    with pytest.raises(ConfigError, match="ledger"):
        ledger.append(generation, b"forged", b"c")
    assert ledger.generations() == [1, 2]
    assert ledger.get(1) == b"one"
    ledger.append(3, b"three", b"c")  # control


def test_an_empty_ledger_may_begin_later(tmp_path: Path) -> None:
    ledger = FolderLedger(tmp_path)
    ledger.append(8, b"eight", b"a")
    assert ledger.generations() == [8]


def test_a_missing_release_is_noticed(tmp_path: Path) -> None:
    ledger = FolderLedger(tmp_path)
    for generation in (1, 2, 3):
        ledger.append(generation, b"x", b"a")
    (tmp_path / "00000002.release").unlink()
    with pytest.raises(ConfigError, match="generation 2 is missing"):
        FolderLedger(tmp_path)


def test_of_concurrent_appends_exactly_one_is_kept(tmp_path: Path) -> None:
    def append(name: int) -> bool:
        try:
            FolderLedger(tmp_path).append(1, b"%d" % name, b"blob")
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(append, range(8)))
    assert kept.count(True) == 1
    assert FolderLedger(tmp_path).get(1) == b"%d" % kept.index(True)


def test_a_damaged_blob_is_noticed(tmp_path: Path) -> None:
    ledger = FolderLedger(tmp_path)
    ledger.append(1, b"one", b"blob")
    (tmp_path / "blobs" / digest_of(b"blob")).write_bytes(b"bleb")
    with pytest.raises(ConfigError, match="damaged"):
        ledger.blob(digest_of(b"blob"))
    with pytest.raises(ConfigError, match="not recorded"):
        ledger.blob("0" * 64)
    with pytest.raises(ConfigError, match="not recorded"):
        ledger.get(2)


def test_promotions_are_remembered(tmp_path: Path) -> None:
    ledger = FolderLedger(tmp_path)
    assert (ledger.promoted(), ledger.promotions()) == (0, [])
    ledger.record_promotion(1)
    ledger.record_promotion(3)
    assert FolderLedger(tmp_path).promotions() == [1, 3]
    assert ledger.promoted() == 3
    (tmp_path / "promoted").write_text("three\n")
    with pytest.raises(ConfigError, match="promoted"):
        ledger.promoted()
