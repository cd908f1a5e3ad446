"""Features of jumps against the real probe, asked at those exits only.

The envs never import the worker; this test does. Shape suffixes: N tokens, E exits, F features.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from offramp.controller.features import CANDIDATES_V1, FloatArray
from offramp.controller.traces import TraceHeader
from offramp.envs import TokenTraces
from offramp.envs.traces.pairs import PairFeatures
from offramp.worker import AdaptiveEngine
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.recording.recorder import record_document
from support.models import VOCAB, make_model

EXITS = (1, 2, 3, 4)
PAIRS = list(itertools.combinations(range(4), 2))
COLUMNS = ("cosine", "norm_change", "agrees", "top1_change")


class Recorder:
    """One random model and document, recorded with any exits."""

    def __init__(self) -> None:
        self.stack = AdaptiveEngine.from_pretrained(make_model("llama")).stack
        rng = np.random.default_rng(3)
        self.tokens = [int(token) for token in rng.integers(1, 30, size=120)]
        self.table_VK = successor_table([self.tokens], VOCAB, 16)

    def traces(self, exits: tuple[int, ...], states: bool = False) -> TokenTraces:
        chunk = record_document(self.stack, "d", self.tokens, exits, self.table_VK, states=states)
        width = self.stack.width if states else 0
        header = TraceHeader(
            model="m", schema=CANDIDATES_V1.digest, exits=exits, layers=5, width=width
        )
        return TokenTraces.from_chunks(header, [chunk])


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def pairs(recorder: Recorder) -> PairFeatures:
    return PairFeatures(recorder.traces(EXITS))


def probed(recorder: Recorder, *exits: int) -> dict[str, FloatArray]:
    """Columns [N] at the last of these exits, all of them probed by the real probe."""
    features_NF = recorder.traces(tuple(EXITS[e] for e in exits)).features_NEF[:, -1]
    return {name: features_NF[:, CANDIDATES_V1.index(name)] for name in CANDIDATES_V1.columns}


def computed(pairs: PairFeatures, before: int, here: int) -> dict[str, FloatArray]:
    values_NQ = pairs.values_NPEQ[:, before + 1, here]
    return {name: values_NQ[:, q] for q, name in enumerate(COLUMNS)}


@pytest.mark.parametrize(("before", "here"), PAIRS)
def test_changes_of_norm_and_top1_are_those_of_the_real_probe(
    recorder: Recorder, pairs: PairFeatures, before: int, here: int
) -> None:
    found, real = computed(pairs, before, here), probed(recorder, before, here)
    for name in ("norm_change", "top1_change"):
        np.testing.assert_allclose(found[name], real[name], atol=3e-6)


@pytest.mark.parametrize(("before", "here"), PAIRS)
def test_agreement_is_the_real_probes_unless_the_best_changed_more_than_once(
    recorder: Recorder, pairs: PairFeatures, before: int, here: int
) -> None:
    found, real = computed(pairs, before, here), probed(recorder, before, here)
    agrees_NE = recorder.traces(EXITS).features_NEF[:, :, CANDIDATES_V1.index("agrees")]
    changes_N = (agrees_NE[:, before + 1 : here + 1] == 0).sum(1)
    sure_N = changes_N < 2
    np.testing.assert_array_equal(found["agrees"][sure_N], real["agrees"][sure_N])
    assert sure_N.mean() > 0.3


@pytest.mark.parametrize("here", range(1, 4))
def test_a_first_probe_deeper_down_is_compared_to_the_embeddings(
    recorder: Recorder, pairs: PairFeatures, here: int
) -> None:
    found, real = computed(pairs, -1, here), probed(recorder, here)
    for name in ("norm_change", "agrees", "top1_change"):
        np.testing.assert_allclose(found[name], real[name], atol=3e-6)


@pytest.mark.parametrize(("before", "here"), PAIRS)
def test_recorded_states_make_the_cosine_exact(
    recorder: Recorder, pairs: PairFeatures, before: int, here: int
) -> None:
    real_N = probed(recorder, before, here)["cosine"]
    stated = PairFeatures(recorder.traces(EXITS, states=True))
    error_N = np.abs(computed(stated, before, here)["cosine"] - real_N)
    assert error_N.max() < 2e-3  # float16
    if here - before > 1:
        estimated_N = computed(pairs, before, here)["cosine"]
        assert np.abs(estimated_N - real_N).mean() > 10 * error_N.mean()


def test_neighbours_are_as_recorded_bit_for_bit(recorder: Recorder, pairs: PairFeatures) -> None:
    features_NEF = recorder.traces(EXITS).features_NEF
    for here in range(4):
        for name, values_N in computed(pairs, here - 1, here).items():
            np.testing.assert_array_equal(
                values_N, features_NEF[:, here, CANDIDATES_V1.index(name)]
            )
