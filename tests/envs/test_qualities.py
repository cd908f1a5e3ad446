"""Plug-in qualities. Shape suffixes: N tokens, E exits."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest

import offramp.envs.traces.tokens
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.envs import TokenExitCore, TokenTraces, quality_names, register_quality


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = dict(offramp.envs.traces.tokens._REGISTRY)
    monkeypatch.setattr(offramp.envs.traces.tokens, "_REGISTRY", registry)


def test_labels_are_the_documents_own_next_token_for_exits_and_for_full_depth(
    traces: TokenTraces,
) -> None:
    quality_NE1 = traces.quality("label")
    np.testing.assert_array_equal(quality_NE1[:, :-1], traces.right_NE)
    np.testing.assert_array_equal(quality_NE1[:, -1], traces.full_right_N)
    assert 0 < quality_NE1[:, -1].mean() < 1


def test_a_registered_quality_is_what_episodes_earn(traces: TokenTraces, costs: CostTable) -> None:
    register_quality("depth", lambda t: np.tile([0.1, 0.2, 0.3, 0.4], (len(t), 1)))
    assert quality_names()[-1] == "depth"
    core = TokenExitCore(traces, costs, num_envs=1, quality="depth", autoreset=False)
    core.reset(0)
    core.step(np.array([0]))
    assert core.step(np.array([1])).finals.info["quality"] == np.float32(0.2)


def test_the_documented_example_registers_and_works(traces: TokenTraces) -> None:
    for example in doctest.DocTestFinder().find(offramp.envs.traces.tokens):
        assert not doctest.DocTestRunner().run(example, clear_globs=False).failed
    quality_NE1 = traces.quality("sure_agreement")
    assert set(np.unique(quality_NE1)) == {0, 0.5, 1}


def test_a_name_is_not_taken_twice() -> None:
    with pytest.raises(ConfigError, match="'label' is taken"):
        register_quality("label", lambda t: t.agree_NE)
    register_quality("label", offramp.envs.traces.tokens.label)  # the same again is fine


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.zeros((60, 3)), r"gave shape \(60, 3\), not \(60, 4\)"),
        (np.full((60, 4), 1.1), r"leaves \[0, 1\]"),
        (np.full((60, 4), np.nan), "is NaN"),
    ],
)
def test_unusable_values_are_refused(traces: TokenTraces, values: Any, problem: str) -> None:
    register_quality("bad", lambda _: values)
    with pytest.raises(TraceError, match=problem):
        traces.quality("bad")
