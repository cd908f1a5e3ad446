"""One round's lesson: train on its traces, choose a family on validation, certify on the rest.

Shape suffixes: N tokens, D requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from offramp.agents.calibration.calibrate import Calibration, MeasuredWith, calibrate
from offramp.agents.calibration.calibration_documents import CalibrationDocument
from offramp.agents.calibration.losses import RecordedLosses
from offramp.agents.calibration.setting_families import family_of, load_points
from offramp.agents.evaluation.statistics import Estimate, bootstrap_ratio
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.placing.contenders import Contender, load_contenders
from offramp.agents.placing.replay import replay, walk
from offramp.agents.recording.training_data import TrainingData, load_training_data
from offramp.agents.retraining.learning_state import CALIBRATION
from offramp.agents.retraining.retrain_config import RetrainConfig
from offramp.agents.training.train import train
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.envs.charges.token_costs import TokenCosts
from offramp.envs.traces.store import TraceStore
from offramp.envs.traces.tokens import TokenTraces

LEARNED = ("p̂", "PPO")
"""Families that are taught: both read candidates, so the next traffic can be recorded."""

WALKED = 16
"""Settings that a walk tries at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLesson:
    """What a round came to.

    Attributes:
        calibration: The walk, and the certified policy if one passed.
        saved: Share of full depth's cost that it saves on the requests that it was certified on,
            by replay, with an interval over requests; None: nothing was certified.
    """

    calibration: Calibration
    saved: Estimate | None

    @property
    def bundle(self) -> PolicyBundle | None:
        """The policy that is worth a canary; None: there is none."""
        return self.calibration.bundle if self.saved is not None and self.saved.low > 0 else None

    @property
    def story(self) -> str:
        """What it came to, in a sentence."""
        bundle = self.calibration.bundle
        if bundle is None or self.saved is None:
            risk = self.calibration.outcome.walked[-1].risk
            return f"nothing is certified (a loss of {risk:.3f}): what is served stays"
        certificate = bundle.manifest.certificate
        assert certificate is not None
        saved = self.saved
        found = (
            f"{certificate.family} is certified: {certificate.statement}; it saves "
            f"{saved.value:.1%} of full depth's cost [{saved.low:.1%}, {saved.high:.1%}]"
        )
        if saved.low > 0:
            return found
        return f"{found}, which is not above zero: it is not published, what is served stays"


def teach_round(config: RetrainConfig, traces: Path, policies: Path, seed: int) -> str:
    """Train on a round's traces; says what was learned from."""
    training = TrainConfig(
        traces=str(traces),
        families=LEARNED,
        seed=seed,
        threads=config.threads,
        targets=_targets(config.promise.delta),
        gate=PPOConfig(steps=config.steps),
    )
    contenders = train(training, policies)
    data = load_training_data(traces)
    return (
        f"{len(contenders) - 1} policies were trained on {len(data.train):,} tokens of "
        f"{len(data.train.documents)} documents"
    )


def _targets(delta: float) -> tuple[float, ...]:
    """Agreements at which families are placed: about what the promise allows."""
    return tuple(1 - share * delta for share in (0.25, 0.5, 0.75, 1.0, 1.25))


def certify_round(config: RetrainConfig, traces: Path, policies: Path) -> RoundLesson:
    """Walk the family that is cheapest within the promise on validation traffic.

    A walk begins where almost no token leaves, and passes there whatever the traffic: so what the
    certified policy saves is measured, too. The certificate is by replay: the text of live traffic
    is not kept, to be decoded again.
    """
    data = load_training_data(traces)
    name = _cheapest(load_contenders(policies), data, 1 - config.promise.delta).family
    held = TraceStore.open(traces).read(CALIBRATION)
    measured = MeasuredWith(
        model=data.facts.model,
        tokenizer=data.facts.tokenizer,
        adapters=data.facts.translators,
        dtype=config.dtype,
        layers=data.facts.layers,
    )
    family = family_of(load_points(policies), name, WALKED)
    # No text is kept: the certificate names its data by the requests' random names.
    requests = [CalibrationDocument(each, ()) for each in held.documents]
    losses = RecordedLosses(held)
    found = calibrate(config.promise, measured, family, requests, losses, 0)
    certified = found.outcome.certified
    if certified is None:
        return RoundLesson(calibration=found, saved=None)
    return RoundLesson(
        calibration=found, saved=_saved(family.build(certified.setting), held, data.costs)
    )


def _saved(policy: Policy, traces: TokenTraces, costs: CostTable) -> Estimate:
    """Share of full depth's cost that a policy saves, probes and decisions included."""
    adapters = [layer for layer in traces.header.adapters if layer in policy.exits]
    under = TokenCosts.under(policy.schema, costs, traces.header.exits, adapters)
    cost_N = walk(policy, traces).cost_N(under)
    # Costs are in units of a full-depth token's, so full depth's is the number of tokens.
    cost_D = np.bincount(traces.document_N, weights=cost_N).astype(np.float64)
    tokens_D = np.bincount(traces.document_N).astype(np.float64)
    spent = bootstrap_ratio(cost_D, tokens_D)
    return Estimate(1 - spent.value, 1 - spent.high, 1 - spent.low)


def _cheapest(contenders: list[Contender], data: TrainingData, least: float) -> Contender:
    """The cheapest contender that agrees so much on validation; if none does, the safest."""
    found = []
    for each in contenders:
        if each.policy.schema == CANDIDATES_V1:
            result = replay(each.policy, data.validation, data.costs)
            found.append(
                replace(each, offline_agreement=result.agreement, offline_cost=result.cost)
            )
    safe = [each for each in found if (each.offline_agreement or 0.0) >= least]
    if safe:
        return min(safe, key=lambda each: each.offline_cost or 1.0)
    return max(found, key=lambda each: each.offline_agreement or 0.0)
