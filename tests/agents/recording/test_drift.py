"""Drift of features: what changed is found, and what did not is seldom called so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offramp.agents.recording.corpus import load_corpus, tokenize, window
from offramp.agents.recording.documents import Document
from offramp.agents.recording.drift import GRID, PLACES, find_drift
from offramp.controller.errors import TraceError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.traces import TraceHeader
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.recording.recording_actor import TraceRecorder
from offramp.worker.spec import WorkerSpec
from support.models import REFERENCE
from support.training_sets import make_traces

TOKENS_EACH = 40
PAGES = Path(__file__).resolve().parents[3] / "docs"


def clustered(documents: int, seed: int, shift: float = 0.0) -> TokenTraces:
    """Tokens of one document are alike: a document has a level of its own for each feature."""
    rng = np.random.default_rng(seed)
    plain = make_traces(TOKENS_EACH * documents, seed)
    level_DEF = rng.normal(size=(documents, *plain.features_NEF.shape[1:]))
    document_N = np.repeat(np.arange(documents, dtype=np.int32), TOKENS_EACH)
    features_NEF = (plain.features_NEF + level_DEF[document_N]).astype(np.float32)
    features_NEF[:, 1, CANDIDATES_V1.index("entropy")] += shift
    return replace(
        plain,
        features_NEF=features_NEF,
        document_N=document_N,
        documents=tuple(f"{seed}-{n}" for n in range(documents)),
    )


def test_what_did_not_change_is_seldom_called_so() -> None:
    found = [
        find_drift(clustered(15, 2 * n), clustered(10, 2 * n + 1), permutations=99, seed=n).p_value
        for n in range(40)
    ]
    # 5 % of 40 are 2. Were tokens exchanged in place of documents, it would be nearly all.
    assert sum(p_value <= 0.05 for p_value in found) <= 6
    assert np.mean(found) > 0.3


def test_a_feature_that_moved_is_named() -> None:
    found = find_drift(clustered(30, 0), clustered(20, 1, shift=3.0))
    assert found.p_value == 0.001  # the least that 999 permutations can give
    middle = make_traces(8, 0).header.exits[1]
    assert found.column == f"exit {middle}: entropy"
    assert found.document_counts == (30, 20)


def test_the_distance_is_that_of_kolmogorov_and_smirnov() -> None:
    before, after = clustered(12, 0), clustered(9, 1, shift=1.0)
    kept = [i for i, name in enumerate(CANDIDATES_V1.columns) if name not in PLACES]
    exact = 0.0
    for exit_ in range(len(before.header.exits)):
        for column in kept:
            one, two = (each.features_NEF[:, exit_, column] for each in (before, after))
            for at in np.concatenate([one, two]):
                exact = max(exact, abs(float((one <= at).mean() - (two <= at).mean())))
    # Documents are equally long, so their weights are the tokens'. The grid is coarser.
    assert exact - 2 / GRID < find_drift(before, after).distance <= exact + 1e-9


def test_where_a_token_is_does_not_count() -> None:
    before, after = clustered(12, 0), clustered(12, 0)
    after.features_NEF[:, :, CANDIDATES_V1.index("position")] += 9.0
    found = find_drift(before, after)
    assert found.p_value == 1.0
    assert found.distance < 1e-9


def test_recordings_that_cannot_be_compared_are_refused() -> None:
    traces = clustered(10, 0)
    other = replace(traces, header=replace(traces.header, model="another"))
    with pytest.raises(TraceError, match="have model another"):
        find_drift(traces, other)
    with pytest.raises(TraceError, match="hold 4 documents"):
        find_drift(traces, traces.select(traces.documents[:4]))


def test_prose_is_told_from_code() -> None:
    """The reference model learned code; twelve documents of each suffice."""
    recorder = TraceRecorder(WorkerSpec(model=str(REFERENCE), slots=2))
    pages = [path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))]
    prose = [Document.of(text, "page") for text in pages if len(text) > 2000][:12]
    code = tokenize(str(REFERENCE), load_corpus(None, limit=18))
    recorder.prepare((3, 6, 9), successor_table([ids for _, ids in code[:6]], 4096, 16))
    header = TraceHeader(
        model=recorder.describe().model, schema=CANDIDATES_V1.digest, exits=(3, 6, 9), layers=12
    )
    before, after = (
        TokenTraces.from_chunks(
            header, [recorder.record(each.digest, window(each, ids, 48)) for each, ids in documents]
        )
        for documents in (code[6:], tokenize(str(REFERENCE), prose))
    )
    assert find_drift(before, after).p_value <= 0.01
