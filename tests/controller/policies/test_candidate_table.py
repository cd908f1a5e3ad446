"""Candidate tables as releases carry them. Shape suffixes: V vocabulary, K candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.features import CANDIDATES_V1, FloatArray, IntArray
from offramp.controller.policies import candidate_table
from offramp.controller.policies.candidate_table import CondensedTable, condense
from offramp.controller.policies.kinds import MAX_BLOB_BYTES, PackedPolicy, pack_policy
from offramp.controller.policies.protocols import ThresholdPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.probes.candidates.successors import successor_table


def filled_up(common: list[int], own: list[list[int]]) -> IntArray:
    """The independent rule: own successors, then common tokens that are not among them."""
    width = len(common)
    rows = [[*row, *(token for token in common if token not in row)][:width] for row in own]
    return np.asarray(rows, np.int32)


@settings(deadline=None)  # the first example compiles
@given(st.data())
def test_any_table_comes_back(data: Any) -> None:
    vocab = data.draw(st.integers(2, 12))
    width = data.draw(st.integers(1, vocab))
    token = st.integers(0, vocab - 1)
    table_VK = np.asarray(
        data.draw(
            st.lists(
                st.lists(token, min_size=width, max_size=width), min_size=vocab, max_size=vocab
            )
        ),
        np.int32,
    )
    condensed = condense(table_VK)
    np.testing.assert_array_equal(condensed.spread(), table_VK)


@settings(deadline=None)  # the first example compiles
@given(st.data())
def test_spread_fills_rows_up_with_common_tokens(data: Any) -> None:
    vocab = data.draw(st.integers(2, 12))
    common = data.draw(st.permutations(range(vocab)))[: data.draw(st.integers(1, vocab))]
    row = st.lists(st.integers(0, vocab - 1), max_size=len(common), unique=True)
    own = data.draw(st.lists(row, min_size=vocab, max_size=vocab))
    lengths = [len(each) for each in own]
    flat = [token for each in own for token in each]
    parts = (np.asarray(part, np.int32) for part in (common, lengths, flat))
    table = CondensedTable(*parts)
    assert table.fault() == ""
    np.testing.assert_array_equal(table.spread(), filled_up(common, own))


def test_a_table_of_a_large_vocabulary_fits_a_release(canned_NF: FloatArray) -> None:
    vocab, width = 262_144, 64
    tokens = np.random.default_rng(0).zipf(1.3, 100_000).clip(max=vocab) - 1
    table_VK = successor_table([tokens.tolist()], vocab, width)
    assert table_VK.nbytes >= 8 * MAX_BLOB_BYTES
    policy = ThresholdPolicy((2,), CANDIDATES_V1, "top1", 0.5, table_VK)
    packed = pack_policy(policy, canned_NF)
    assert len(packed.blob) < MAX_BLOB_BYTES // 4
    np.testing.assert_array_equal(_bundle(packed).policy().candidates_VK, table_VK)


def test_the_rarest_successors_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from offramp.worker.probes.candidates import successors

    monkeypatch.setattr(successors, "MOST_OWN", 2)
    # 1 is followed by 2 twice, 3 by 5 twice, and all else follows once.
    table_VK = successor_table([[1, 2, 1, 2, 4, 3, 5, 3, 5]], 7, 3)
    assert (table_VK[1, 0], table_VK[3, 0]) == (2, 5)
    np.testing.assert_array_equal(table_VK[4], table_VK[0])  # as if never followed


def test_a_table_that_no_release_carries_is_refused_with_a_remedy() -> None:
    rng = np.random.default_rng(0)
    vocab = candidate_table.MOST_OWN // 32
    table_VK = rng.integers(vocab, size=(vocab, 64)).astype(np.int32)
    with pytest.raises(ConfigError, match="offramp record"):
        candidate_table.require_condensable(table_VK)


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        (([0, 1], [1, 0, 0], [3]), "outside"),
        (([0, 1], [1, 0, 0], [-1]), "outside"),
        (([0, 1], [1, 3, 0], [1, 1, 1, 1]), "lengths"),
        (([0, 1], [-1, 1, 0], []), "lengths"),
        (([0, 1], [1, 1, 0], [1]), "sum"),
        (([], [0, 0, 0], []), "0 candidates"),
        (([0, 1, 2, 3], [0, 0, 0], []), "3 tokens by 4"),
    ],
)
def test_a_part_that_does_not_fit_is_named(parts: Any, fault: str) -> None:
    table = CondensedTable(*(np.asarray(part, np.int32) for part in parts))
    assert fault in table.fault()


def test_a_condensed_table_larger_than_memory_is_refused() -> None:
    vocab = 2**21
    parts = np.arange(2**7, dtype=np.int32), np.zeros(vocab, np.int32), np.empty(0, np.int32)
    assert "2097152 tokens" in CondensedTable(*parts).fault()


def test_half_a_condensed_table_is_refused(canned_NF: FloatArray) -> None:
    from safetensors.numpy import load, save

    policy = ThresholdPolicy((2,), CANDIDATES_V1, "top1", 0.5, np.zeros((5, 2), np.int32))
    packed = pack_policy(policy, canned_NF)
    tensors = load(packed.blob)
    del tensors["candidates.own"]
    spoilt = PackedPolicy(
        kind=packed.kind,
        exits=packed.exits,
        params=packed.params,
        schema_digest=packed.schema_digest,
        blob=save(tensors),
    )
    with pytest.raises(PolicyRefusedError) as caught:
        _bundle(spoilt).policy()
    assert caught.value.reason is Refusal.BAD_SHAPE


def _bundle(packed: PackedPolicy) -> PolicyBundle:
    return PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )
