"""Traces in memory. Shape suffixes: N tokens, E exits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs import TokenTraces


def test_labels_match_a_loop_over_tokens_and_exits(
    header: TraceHeader, make_chunk: Callable[..., TraceChunk]
) -> None:
    chunk = make_chunk()
    traces = TokenTraces.from_chunks(header, [chunk])
    for t in range(len(chunk)):
        assert traces.full_right_N[t] == (chunk.full_token_T[t] == chunk.next_token_T[t])
        for e in range(3):
            token = chunk.exit_token_TE[t, e]
            assert traces.agree_NE[t, e] == (token == chunk.full_token_T[t])
            assert traces.right_NE[t, e] == (token == chunk.next_token_T[t])
    assert 0 < traces.agree_NE.mean() < 1, "labels that never vary would prove nothing"


def test_chunks_of_one_document_share_its_index(
    header: TraceHeader, make_chunk: Callable[..., TraceChunk]
) -> None:
    chunks = [make_chunk("a"), make_chunk("b", tokens=5), make_chunk("a", tokens=2)]
    traces = TokenTraces.from_chunks(header, chunks)
    assert traces.documents == ("a", "b")
    assert traces.document_N.tolist() == [0] * 20 + [1] * 5 + [0] * 2
    assert traces.document_N.dtype == np.int32


def test_select_keeps_whole_documents_and_reindexes(traces: TokenTraces) -> None:
    kept = traces.select({"2" * 64, "0" * 64})
    rows = np.isin(traces.document_N, [0, 2])
    assert kept.documents == ("0" * 64, "2" * 64)
    np.testing.assert_array_equal(kept.features_NEF, traces.features_NEF[rows])
    np.testing.assert_array_equal(kept.gap_NE, traces.gap_NE[rows])
    assert np.unique(kept.document_N).tolist() == [0, 1]


@pytest.mark.parametrize("documents", [["unheard-of"], []])
def test_select_refuses_unknown_or_no_documents(traces: TokenTraces, documents: list[str]) -> None:
    with pytest.raises(TraceError):
        traces.select(documents)


def test_agreement_quality_is_the_label_and_full_depth_is_one(traces: TokenTraces) -> None:
    quality_NE1 = traces.quality("agreement")
    np.testing.assert_array_equal(quality_NE1[:, :-1], traces.agree_NE)
    np.testing.assert_array_equal(quality_NE1[:, -1], 1)
    assert quality_NE1.dtype == np.float32


def test_gap_quality_falls_by_a_fifth_per_nat_down_to_zero(traces: TokenTraces) -> None:
    gap_NE = np.zeros_like(traces.gap_NE)
    gap_NE[0] = [-1.0, -2.5, -50.0]
    quality_NE1 = dataclasses.replace(traces, gap_NE=gap_NE).quality("logprob_gap")
    np.testing.assert_allclose(quality_NE1[0], [0.8, 0.5, 0.0, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(quality_NE1[1:], 1)


def test_unknown_quality_names_the_choices(traces: TokenTraces) -> None:
    with pytest.raises(ConfigError, match="agreement or logprob_gap or label"):
        traces.quality("bleu")


def test_shapes_must_fit_the_header(traces: TokenTraces) -> None:
    with pytest.raises(TraceError, match="gap_NE"):
        dataclasses.replace(traces, gap_NE=traces.gap_NE[:, :2])
    with pytest.raises(TraceError, match="features_NEF"):
        dataclasses.replace(traces, features_NEF=traces.features_NEF[1:])


def test_no_tokens_is_an_error(header: TraceHeader) -> None:
    with pytest.raises(TraceError, match="no token"):
        TokenTraces.from_chunks(header, [])


def test_chunks_of_different_exits_do_not_mix(
    header: TraceHeader, make_chunk: Callable[..., TraceChunk]
) -> None:
    with pytest.raises(TraceError, match="differ"):
        TokenTraces.from_chunks(header, [make_chunk(), make_chunk(exits=2)])
