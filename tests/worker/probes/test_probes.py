"""What a policy sees live is what the traces recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from offramp.controller.features import (
    CANDIDATES_V1,
    SOFTMAX_V2,
    BoolArray,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.worker import AdaptiveEngine
from offramp.worker.model.stack import LayerStack
from offramp.worker.probes import CandidateProbe, ProbeInputs, Readout
from offramp.worker.probes.candidates.successors import NgramIndex, candidates_of, successor_table
from offramp.worker.recording.recorder import record_document
from support.models import VOCAB, make_model

EXITS = (1, 3, 4)


@dataclass
class Watcher:
    """Never leaves; keeps every feature row it was shown."""

    schema: FeatureSchema
    candidates_VK: IntArray | None
    exits: tuple[int, ...] = EXITS
    seen: list[FloatArray] = field(default_factory=list)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        self.seen.append(features_NF.copy())
        return np.zeros(len(features_NF), np.bool_)


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(make_model("llama"))


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    rng = np.random.default_rng(3)
    # Few distinct tokens, so that n-grams repeat.
    return [int(token) for token in rng.integers(1, 20, size=60)]


@pytest.fixture(scope="module")
def table_VK(tokens: list[int]) -> IntArray:
    return successor_table([tokens], VOCAB, 16)


def _decode(engine: AdaptiveEngine, tokens: list[int], watcher: Watcher) -> None:
    engine.submit(tokens[:1], policy=watcher, forced=tokens[1:])
    while engine.load != (0, 0):
        engine.step()


def test_recorded_features_equal_those_of_live_decoding(
    engine: AdaptiveEngine, tokens: list[int], table_VK: IntArray
) -> None:
    chunk = record_document(engine.stack, "d", tokens, EXITS, table_VK)
    watcher = Watcher(CANDIDATES_V1, table_VK)
    _decode(engine, tokens, watcher)
    # The first token comes from the prompt's pass, where no policy is asked.
    live = np.concatenate(watcher.seen).reshape(-1, len(EXITS), CANDIDATES_V1.width)
    np.testing.assert_allclose(chunk.features_TEF[1 : 1 + len(live)], live, atol=2e-4, rtol=1e-3)
    assert len(live) == len(tokens) - 2


def test_recorded_softmax_equals_the_probe(
    engine: AdaptiveEngine, tokens: list[int], table_VK: IntArray
) -> None:
    chunk = record_document(engine.stack, "d", tokens, EXITS, table_VK)
    watcher = Watcher(SOFTMAX_V2, None)
    _decode(engine, tokens, watcher)
    live = np.concatenate(watcher.seen).reshape(-1, len(EXITS), SOFTMAX_V2.width)
    np.testing.assert_allclose(chunk.softmax_TES[1 : 1 + len(live)], live[:, :, :3], atol=1e-4)
    token_TE = chunk.exit_token_TE[1 : 1 + len(live)]
    agrees_TE = np.diff(token_TE, axis=1, prepend=-1) == 0
    np.testing.assert_array_equal(live[:, :, 3], agrees_TE)


def test_recorded_labels_equal_an_independent_pass(
    engine: AdaptiveEngine, tokens: list[int], table_VK: IntArray
) -> None:
    chunk = record_document(engine.stack, "d", tokens, EXITS, table_VK)
    model = engine.model
    out = model(torch.tensor([tokens[:-1]]), output_hidden_states=True)
    full = out.logits[0].log_softmax(-1)
    assert chunk.full_token_T.tolist() == full.argmax(-1).tolist()
    assert chunk.next_token_T.tolist() == tokens[1:]
    for column, layer in enumerate(EXITS):
        logits = model.lm_head(model.model.norm(out.hidden_states[layer][0]))
        token = logits.argmax(-1)
        assert chunk.exit_token_TE[:, column].tolist() == token.tolist()
        rows = torch.arange(len(token))
        gap = full[rows, token] - full.max(-1).values
        np.testing.assert_allclose(chunk.gap_TE[:, column], gap.numpy(), atol=1e-4)
        chances = logits.double().softmax(-1)
        best = chances.topk(2).values
        entropy = -(chances * chances.log()).sum(-1) / math.log(VOCAB)
        expected = torch.stack((best[:, 0], best[:, 0] - best[:, 1], entropy), -1)
        np.testing.assert_allclose(chunk.softmax_TES[:, column], expected.numpy(), atol=1e-5)
    assert chunk.state_TED is None


def test_recorded_states_are_what_norm_and_head_read(
    engine: AdaptiveEngine, tokens: list[int], table_VK: IntArray
) -> None:
    chunk = record_document(engine.stack, "d", tokens, EXITS, table_VK, states=True)
    out = engine.model(torch.tensor([tokens[:-1]]), output_hidden_states=True)
    assert chunk.state_TED is not None
    assert chunk.state_TED.dtype == np.float16
    # The last entry of Hugging Face's hidden states is normed already, and no exit.
    for column, layer in enumerate(EXITS):
        state_TD = out.hidden_states[layer][0].detach().numpy()
        np.testing.assert_allclose(chunk.state_TED[:, column], state_TD, rtol=2e-3, atol=2e-3)


def probe_of(
    stack: LayerStack, candidates_NK: IntArray, x_ND: torch.Tensor, positions_N: IntArray
) -> CandidateProbe:
    return CandidateProbe.of(ProbeInputs(Readout(stack), x_ND, positions_N, 2, candidates_NK))


def test_candidate_columns_equal_their_definitions(engine: AdaptiveEngine) -> None:
    stack = engine.stack
    torch.manual_seed(0)
    candidates = np.asarray([[4, 9, 2, 7], [1, 3, 5, 8]], np.int32)
    x0, x1, x2 = (torch.randn(2, stack.width) for _ in range(3))
    probe = probe_of(stack, candidates, x0, np.asarray([10, 200], np.int32))
    probe.features(1, x1)
    got = probe.features(3, x2)
    for row in range(2):
        before, now = (
            torch.log_softmax(stack.logits(x[row : row + 1])[0, candidates[row]], -1).exp()
            for x in (x1, x2)
        )
        ordered = now.sort(descending=True).values
        same = int(before.argmax() == now.argmax())
        expected = [
            float(ordered[0]),
            float(ordered[0] - ordered[1]),
            float(-(now * now.log()).sum() / math.log(4)),
            float(stack.logits(x2[row : row + 1])[0, candidates[row]].max()) / 10,
            float(torch.cosine_similarity(x2[row], x1[row], dim=0)),
            float(x2[row].norm().log() - x1[row].norm().log()),
            same,
            same / 2,
            float(now.max() - before.max()),
            3 / stack.layers,
            [10, 200][row] / stack.context,
        ]
        np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-5)


def test_kept_rows_go_on_as_if_alone(engine: AdaptiveEngine) -> None:
    stack = engine.stack
    torch.manual_seed(1)
    candidates = np.asarray([[4, 9, 2], [1, 3, 5], [6, 7, 8]], np.int32)
    positions = np.asarray([1, 2, 3], np.int32)
    x0, x1, x2 = (torch.randn(3, stack.width) for _ in range(3))
    together = probe_of(stack, candidates, x0, positions)
    together.features(1, x1)
    stay = np.asarray([True, False, True])
    together.keep(stay)
    alone = probe_of(stack, candidates[2:], x0[2:], positions[2:])
    alone.features(1, x1[2:])
    kept = together.features(2, x2[torch.from_numpy(stay)])
    np.testing.assert_allclose(kept[1:], alone.features(2, x2[2:]), rtol=1e-4, atol=1e-5)


def test_successors_are_ordered_by_count_and_filled_up() -> None:
    table = successor_table([[1, 2, 1, 2, 1, 3], [1, 2, 4, 4, 4]], 6, 3)
    assert table[1].tolist()[:2] == [2, 3]
    assert table[4].tolist()[0] == 4
    assert all(len(set(row)) == 3 for row in table.tolist())


def test_ngram_candidates_come_first_and_stay_distinct() -> None:
    table = np.tile(np.arange(5, dtype=np.int32), (10, 1))
    index = NgramIndex([7, 8, 9, 7, 8])
    found = candidates_of([index], table, ())[0].tolist()
    assert found[0] == 9  # 7 8 was followed by 9
    assert len(found) == len(set(found)) == 5


@pytest.mark.parametrize("width", [1, VOCAB + 1])
def test_a_table_width_that_does_not_fit_is_refused(width: int) -> None:
    from offramp.controller.errors import ConfigError

    with pytest.raises(ConfigError, match="candidates"):
        successor_table([[1, 2]], VOCAB, width)
