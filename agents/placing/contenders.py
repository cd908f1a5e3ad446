"""Contenders: policies at operating points, placed by replay, saved and read back.

A family meets a target where the agreement of one of its settings, replayed on validation traces,
is nearest to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.agents.placing.recorded_features import RecordedFeatures
from offramp.agents.placing.replay import replay
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.envs.traces.tokens import TokenTraces

INDEX = "contenders.json"

CHOSEN = "chosen"
"""Folder, beside the contenders, of the bundle that is to be published."""

CANNED_ROWS = 64
"""Recorded inputs that travel with a policy, for workers to reproduce its decisions on."""

GRID = 41
"""Settings tried per family when operating points are placed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One policy at one operating point.

    Attributes:
        family: Name of the rule or agent that the policy belongs to.
        setting: Its threshold, preference or layer; None for full depth.
        offline_agreement: Share of validation tokens on which replay agrees with full depth, or
            of classified texts whose label it finds; None where nothing was replayed.
        policy: The policy, ready to run.
        offline_cost: Mean cost on validation traces, in units of a full-depth token's time; None
            where nothing was replayed.
        symbol: What evaluations write before the setting.
        note: What they write after it.
    """

    family: str
    setting: float | None
    offline_agreement: float | None
    policy: Policy
    offline_cost: float | None = None
    symbol: str = "τ="
    note: str = ""

    @property
    def name(self) -> str:
        """Family and setting, such as ``p̂ τ=0.92``."""
        if self.setting is None:
            return self.family
        # Thresholds crowd below 1, where three digits would not tell them apart.
        digits = 6 if 0.99 < self.setting < 1 else 3
        return f"{self.family} {self.symbol}{self.setting:.{digits}g}{self.note}"


def full_depth() -> Contender:
    """The contender that every comparison begins with."""
    return Contender(family="full depth", setting=None, offline_agreement=None, policy=NeverExit())


def measured(
    family: str, setting: float, policy: Policy, data: TrainingData, symbol: str = "τ="
) -> Contender:
    """Replay a policy on the validation traces, and make it a contender.

    Raises:
        ConfigError: the policy asks at a layer, or reads a schema, that was not recorded.
    """
    found = replay(policy, data.validation, data.costs)
    return Contender(
        family=family,
        setting=setting,
        offline_agreement=found.agreement,
        policy=policy,
        offline_cost=found.cost,
        symbol=symbol,
    )


def placed(
    family: str,
    build: Callable[[float], Policy],
    settings: Iterable[float],
    targets: Sequence[float],
    data: TrainingData,
    symbol: str = "τ=",
) -> list[Contender]:
    """Find for each target the setting whose offline agreement is nearest; each setting once."""
    tried = [measured(family, float(s), build(float(s)), data, symbol) for s in settings]
    return nearest(tried, targets)


def nearest(tried: Sequence[Contender], targets: Sequence[float]) -> list[Contender]:
    """Find for each target the contender whose offline agreement is nearest; each once."""
    chosen: dict[int, Contender] = {}
    for target in targets:
        best = min(tried, key=lambda each: abs((each.offline_agreement or 0.0) - target))
        chosen[id(best)] = best
    return list(chosen.values())


def save_contenders(
    folder: Path, contenders: Sequence[Contender], data: TrainingData, settings: Mapping[str, Any]
) -> None:
    """Write one unsigned bundle per contender, then the index of them all.

    Args:
        folder: Where they are written, as ``00``, ``01``, …
        contenders: Full depth first.
        data: What they were trained on; rows of its validation split travel with each policy.
        settings: How they were trained, for the bundles' manifests.
    """
    training = {"tokens": len(data.train), "documents": len(data.train.documents), **settings}
    save_policies(
        folder,
        contenders,
        training,
        lambda policy: canned_rows(policy, data.validation),
        (data.facts.model, data.facts.tokenizer),
        adapters=data.facts.translators,
    )


def save_policies(
    folder: Path,
    contenders: Sequence[Contender],
    training: Mapping[str, Any],
    canned: Callable[[Policy], FloatArray],
    fingerprints: tuple[str, str],
    *,
    adapters: str = "",
) -> None:
    """Write bundles and index as ``save_contenders`` does, of whatever was trained.

    Args:
        folder: Where they are written.
        contenders: Full depth first.
        training: How they were trained.
        canned: Gives the recorded rows that travel with a policy, [N, F].
        fingerprints: The model's and the tokenizer's.
        adapters: Digest of the adapters that they were recorded through; "" for none.
    """
    index = []
    for number, each in enumerate(contenders):
        bundle = PolicyBundle.draft(
            pack_policy(each.policy, canned(each.policy)),
            model=fingerprints[0],
            tokenizer=fingerprints[1],
            training={**training, "family": each.family, "setting": each.setting},
            metrics={"offline_agreement": each.offline_agreement},
            adapters=adapters,
            created_at=time.time(),
        )
        entry = {
            "folder": f"{number:02d}",
            "family": each.family,
            "setting": each.setting,
            "offline_agreement": each.offline_agreement,
            "symbol": each.symbol,
            "note": each.note,
        }
        bundle.save(folder / f"{number:02d}")
        index.append(entry)
    write_durably(folder / INDEX, json.dumps(index, indent=1).encode())


def load_contenders(folder: str | Path) -> list[Contender]:
    """Read back what was saved; offline costs are not kept.

    Raises:
        ConfigError: the folder holds no index.
        PolicyRefusedError: a bundle is damaged.
    """
    return [contender for contender, _ in load_saved(Path(folder))]


def load_saved(folder: Path) -> list[tuple[Contender, PolicyBundle]]:
    """Read back what was saved, each contender with the bundle of its policy.

    Raises:
        ConfigError, PolicyRefusedError: as ``load_contenders``.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        bundles = [PolicyBundle.load(folder / entry["folder"]) for entry in index]
        return [
            (_contender(entry, bundle), bundle)
            for entry, bundle in zip(index, bundles, strict=True)
        ]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            "policies", f"{folder} holds no readable {INDEX}", "Run `offramp train` first"
        ) from error


def _contender(entry: Mapping[str, Any], bundle: PolicyBundle) -> Contender:
    return Contender(
        family=entry["family"],
        setting=entry["setting"],
        offline_agreement=entry["offline_agreement"],
        policy=bundle.policy(),
        symbol=entry.get("symbol", "τ="),
        note=entry.get("note", ""),
    )


def canned_rows(policy: Policy, traces: TokenTraces) -> FloatArray:
    """Pick evenly spaced rows, of the columns that the policy reads, [N, F]."""
    if policy.schema is None:
        return np.empty((CANNED_ROWS, 0), np.float32)
    tokens = len(traces)
    rows = np.arange(0, tokens, max(1, tokens * len(policy.exits) // CANNED_ROWS))
    seen = RecordedFeatures(policy, traces)
    features = [seen.features(here, rows) for here in range(len(policy.exits))]
    # Columns that were not recorded are NaN there; as canned inputs any number serves.
    return np.nan_to_num(np.concatenate(features)[:CANNED_ROWS])
