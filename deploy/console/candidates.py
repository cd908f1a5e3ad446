"""Lists the policies that stand to choice, with what each loses and costs, and places them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offramp.controller.release.manifest import MODEL_LAYERS, Manifest
from offramp.controller.strict import is_count, is_number, is_share
from offramp.deploy.cli.releases.past import PastRelease

POLICIES = 6
"""Policies that are shown, those released last."""

WIDTH, HEIGHT, LEFT, RIGHT, BELOW, ABOVE = 520, 220, 64, 40, 44, 20
"""Of the picture and its margins, pixels."""

PICTURE = {
    "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "below": BELOW, "above": ABOVE,
}  # fmt: skip
"""The same by name, for the page."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A released policy, at its own setting or at a safer one that its certificate bounds, too.

    Attributes:
        generation: The first release of the policy.
        name: Its family and setting.
        guarantee: What its certificate bounds, or that there is none.
        loss: Mean loss on the calibration data, or on test documents if it is not certified.
        layers: Mean number of layers after which tokens left there.
        full: Layers of the model.
        is_served: Whether it serves requests now.
        is_best: Whether no other loses as little for as few layers.
    """

    generation: int
    name: str
    guarantee: str
    loss: float
    layers: float
    full: int
    is_served: bool = False
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Frontier:
    """The candidates, and where a picture of them has each.

    Attributes:
        candidates: By generation, newest first, the fastest setting of each first.
        unknown: Generations whose loss or layers nobody measured.
        places: Pixels from left and top of each candidate, in order.
        line: Through the best ones to full depth, as SVG's points.
        most_loss: At the upper end of the picture.
        most_layers: At its right end.
    """

    candidates: list[Candidate]
    unknown: list[int]
    places: list[tuple[float, float]]
    line: str
    most_loss: float
    most_layers: int


def frontier_of(releases: Sequence[PastRelease]) -> Frontier:
    """The policies released last that losses and layers are known of.

    Args:
        releases: The ledger, newest first.
    """
    named: dict[tuple[str, str], Manifest] = {}
    served: set[tuple[str, str]] = set()
    for release in reversed(releases):
        if (manifest := release.manifest) is None:
            continue
        named.setdefault(manifest.served, manifest)
        if release.served == "now":
            served.add(manifest.served)
    found: list[Candidate] = []
    unknown = []
    for manifest in reversed(list(named.values())[-POLICIES:]):
        mine = list(_candidates(manifest, is_served=manifest.served in served))
        found += mine
        if not mine:
            unknown.append(manifest.generation)
    return _placed([replace(each, is_best=not _is_beaten(each, found)) for each in found], unknown)


def _candidates(manifest: Manifest, *, is_served: bool) -> Iterator[Candidate]:
    """The policy at each setting that its certificate bounds, its own first."""
    number, metrics, certificate = manifest.generation, manifest.metrics, manifest.certificate
    # Metrics are free in form: what stands there may be anything.
    full: Any = metrics.get(MODEL_LAYERS)
    if not (is_count(full) and full > 0):
        return
    if certificate is None:
        agreement: Any = metrics.get("agreement")
        layers: Any = metrics.get("mean_layers")
        if is_share(agreement) and is_number(layers):
            name = str(manifest.training.get("family", manifest.kind))
            yield Candidate(
                number, name, manifest.guarantee, 1 - agreement, layers, full, is_served
            )
        return
    bound = f"{certificate.loss} ≤ {certificate.delta:.1%}"
    for step in reversed([each for each in certificate.walked if each.passed]):
        depth = step.depth(manifest.exits, full)
        if depth is not None:
            name = f"{certificate.family} at {step.setting:.3g}"
            yield Candidate(number, name, bound, step.risk, depth, full, is_served)
            is_served = False  # the others are safer than what was published


def _is_beaten(one: Candidate, all_of_them: Sequence[Candidate]) -> bool:
    mine = (one.loss, one.layers)
    return any(
        each.loss <= one.loss and each.layers <= one.layers and (each.loss, each.layers) != mine
        for each in all_of_them
    )


def _placed(candidates: list[Candidate], unknown: list[int]) -> Frontier:
    most_layers = max((each.full for each in candidates), default=1)
    most_loss = max((each.loss for each in candidates), default=0.0) or 0.01

    def place(loss: float, layers: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * layers / most_layers
        up = (HEIGHT - BELOW - ABOVE) * loss / most_loss
        return round(across, 1), round(HEIGHT - BELOW - up, 1)

    best = sorted((each.layers, each.loss) for each in candidates if each.is_best)
    line = [place(loss, layers) for layers, loss in best] + [place(0.0, most_layers)]
    return Frontier(
        candidates=candidates,
        unknown=unknown,
        places=[place(each.loss, each.layers) for each in candidates],
        line=" ".join(f"{x},{y}" for x, y in line),
        most_loss=most_loss,
        most_layers=most_layers,
    )
