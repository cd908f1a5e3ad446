from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared.peer_rows import (
    PeerCell,
    PeerRow,
    PeerRuns,
    keep,
    leading_equal,
    peers_summary,
    read_peer_rows,
    rows_of_cell,
    show_peers,
)
from shared.streaming import bytes_read, last_level_bytes, share_of_bandwidth
from shared.timing import Report
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.worker import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.precision import Precision
from offramp.worker.model.quantised import QuantisedLinear

CELL = PeerCell("tiny", "random", "bfloat16", 2, 1, 4, "a machine", "2026-11-28")


def runs(engine: str, weights: str, size: int, steps: list[float], last: int = 4) -> PeerRuns:
    """Two rows of four tokens, of which three are timed; ``steps`` are seconds by round."""
    emitted = [[1, 2, 3, last], [5, 6, 7, 8]]
    reports = [Report(seconds=3 * step, tokens=6, emitted=emitted) for step in steps]
    return PeerRuns(engine, weights, size, reports)


@pytest.fixture
def rows() -> list[PeerRow]:
    contenders = [
        runs("hf", "bfloat16", 1000, [0.4, 0.2, 0.4]),
        runs("offramp", "bfloat16", 1000, [0.2, 0.2, 0.1]),
        runs("offramp", "int4", 250, [0.1, 0.1, 0.1], last=9),
        runs("llama.cpp", "Q4_0", 250, [0.05, 0.05, 0.05]),
        runs("llama.cpp", "Q4_1", 300, [0.2, 0.2, 0.2]),
    ]
    return rows_of_cell(CELL, contenders, [20_000.0, 10_000.0, 20_000.0])


def test_the_share_is_the_time_of_one_reading_over_the_steps() -> None:
    assert share_of_bandwidth(269e6, 0.05, 10e9) == pytest.approx(0.538)


def test_rounds_are_compared_with_their_neighbours(rows: list[PeerRow]) -> None:
    hf, ours = rows[:2]
    assert [hf.ratio_hf, hf.ratio_hf_low, hf.ratio_hf_high] == [1, 1, 1]
    assert [ours.ratio_hf_low, ours.ratio_hf, ours.ratio_hf_high] == pytest.approx([1, 2, 4])
    speeds = [ours.tokens_per_s_low, ours.tokens_per_s, ours.tokens_per_s_high]
    assert speeds == pytest.approx([10, 10, 20])
    # 1000 bytes take 0.05, 0.1 and 0.05 seconds of these steps.
    assert ours.share_of_bandwidth == pytest.approx(0.5)
    assert ours.bandwidth == 20_000


def test_llama_cpp_is_the_fastest_with_as_many_bits(rows: list[PeerRow]) -> None:
    assert [row.ratio_llama for row in rows] == [None, None, *map(pytest.approx, (0.5, 1, 0.25))]


def test_equal_tokens_are_counted_from_the_first_on(rows: list[PeerRow]) -> None:
    assert [row.same_tokens for row in rows] == [4, 4, 3, 4, 4]
    assert leading_equal([1, 2, 3], [1, 0, 3]) == 1


def test_a_file_keeps_rows_of_other_tables(tmp_path: Path, rows: list[PeerRow]) -> None:
    path = tmp_path / "peers.json"
    assert read_peer_rows(path) == []
    keep(path, rows)
    other = [replace(row, batch=8) for row in rows[:1]]
    keep(path, other)
    newer = [replace(row, tokens_per_s=1.0) for row in rows[:2]]
    keep(path, newer)
    assert read_peer_rows(path) == other + newer


def test_rows_are_shown(rows: list[PeerRow], capsys: pytest.CaptureFixture[str]) -> None:
    show_peers(rows)
    assert "plain read 0.0 GB/s" in capsys.readouterr().out
    assert "| 10.0 [10.0, 20.0] | 2.00 [1.00, 4.00] |  | 50% |" in peers_summary(rows)


@pytest.mark.parametrize("is_tied", [True, False])
def test_what_a_step_reads(is_tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=is_tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    layer = 4 * 32 * 32 + 3 * 64 * 32 + 2 * 32
    assert bytes_read(model) == 2 * (layer + 64 * 32 + 32)


@pytest.mark.parametrize("precision", [
    Precision(weights="int8"), Precision(weights="int4"), Precision(weights="int4", head="int4"),
])  # fmt: skip
def test_scales_are_read_too(precision: Precision) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    engine = AdaptiveEngine(model, slots=1, config=EngineConfig(precision=precision))
    kept = 0
    for root in (*engine.stack.blocks, engine.stack.head):
        for module in root.modules():
            if isinstance(module, QuantisedLinear):
                assert module.matrix is not None  # on a CPU
                kept += module.matrix.nbytes
    norms = sum(each.nbytes for each in model.parameters() if each.dim() == 1)
    assert bytes_read(model, precision) == kept + norms


def test_the_largest_cache_counts(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "30720K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_level_bytes(tmp_path) == 30 * 2**20
    assert last_level_bytes(tmp_path / "none") == 0


def test_the_page_holds_the_measured_rows() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    rows = read_peer_rows(docs / "peers.json")
    assert rows
    assert peers_summary(rows) in (docs / "decoding.md").read_text(encoding="utf-8")
