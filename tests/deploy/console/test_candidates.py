"""Which released policies are listed as candidates, and with what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from offramp.controller.release.certificate import Walked
from offramp.controller.release.manifest import MODEL_LAYERS
from offramp.deploy.cli.releases.past import PastRelease
from offramp.deploy.console.candidates import frontier_of
from support.releases.certificates import certificate
from support.releases.readers import BUNDLES

DRAFT = next(each.manifest for each in BUNDLES if each.manifest.kind == "threshold")
MEASURED = {MODEL_LAYERS: 12, "agreement": 0.9, "mean_layers": 7.5}


def released(generation: int, served: str = "before", **changes: Any) -> PastRelease:
    changes = {"digest": f"{generation:064x}"} | changes
    return PastRelease(generation, replace(DRAFT, generation=generation, **changes), served, "")


def test_what_was_evaluated_stands_beside_what_was_certified() -> None:
    step = Walked(setting=0.2, risk=0.02, p_value=0.01, passed=True, leaves=(0.5, 0.25))
    proof = certificate(walked=(step,), setting=0.2, risk=0.02, p_value=0.01)
    assert DRAFT.exits == (2, 4)
    found = frontier_of(
        [
            released(3, metrics={MODEL_LAYERS: 12}, certificate=proof),
            released(2, "now", metrics=MEASURED),
            PastRelease(1, None, "–", "not trusted"),
        ]
    )
    certified, evaluated = found.candidates
    assert (certified.loss, certified.layers) == (0.02, 0.5 * 2 + 0.25 * 4 + 0.25 * 12)
    assert evaluated.loss == pytest.approx(0.1)
    assert evaluated.layers == 7.5
    assert [each.is_best for each in found.candidates] == [True, False]
    assert [each.is_served for each in found.candidates] == [False, True]
    assert found.unknown == []


def test_a_policy_that_was_released_again_is_one_candidate() -> None:
    again = [released(each, digest="d" * 64, metrics=MEASURED) for each in (3, 2)]
    found = frontier_of([replace(again[0], served="now"), again[1]])
    assert [(each.generation, each.is_served) for each in found.candidates] == [(2, True)]


@pytest.mark.parametrize(
    "metrics", [{}, MEASURED | {MODEL_LAYERS: "twelve"}, {MODEL_LAYERS: 12, "agreement": None}]
)
def test_what_was_not_measured_is_named(metrics: dict[str, Any]) -> None:
    found = frontier_of([released(4, metrics=metrics)])
    assert (found.candidates, found.unknown) == ([], [4])
    step = Walked(setting=0.2, risk=0.02, p_value=0.01, passed=True)  # not where tokens left
    proof = certificate(walked=(step,), setting=0.2, risk=0.02, p_value=0.01)
    assert frontier_of([released(4, metrics=metrics, certificate=proof)]).unknown == [4]
