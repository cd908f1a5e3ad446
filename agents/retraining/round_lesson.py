"""One round's lesson: train on its traces, choose a family on validation, certify on the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offramp.agents.calibration.calibrate import Calibration, MeasuredWith, calibrate
from offramp.agents.calibration.calibration_documents import CalibrationDocument
from offramp.agents.calibration.losses import RecordedLosses
from offramp.agents.calibration.setting_families import family_of, load_points
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.placing.contenders import Contender, load_contenders
from offramp.agents.placing.replay import replay
from offramp.agents.recording.training_data import TrainingData, load_training_data
from offramp.agents.retraining.learning_state import CALIBRATION
from offramp.agents.retraining.retrain_config import RetrainConfig
from offramp.agents.training.train import train
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.features import CANDIDATES_V1
from offramp.envs.traces.store import TraceStore

LEARNED = ("p̂", "PPO")
"""Families that are taught: both read candidates, so the next traffic can be recorded."""

WALKED = 16
"""Settings that a walk tries at most."""


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


def certify_round(config: RetrainConfig, traces: Path, policies: Path) -> Calibration:
    """Walk the family that is cheapest within the promise on validation traffic.

    The certificate is by replay: the text of live traffic is not kept, to be decoded again.
    """
    data = load_training_data(traces)
    name = _cheapest(load_contenders(policies), data, 1 - config.promise.delta).family
    held = TraceStore.open(traces).read(CALIBRATION)
    measured = MeasuredWith(
        model=data.facts.model,
        tokenizer=data.facts.tokenizer,
        adapters=data.facts.translators,
        dtype=config.dtype,
    )
    family = family_of(load_points(policies), name, WALKED)
    # No text is kept: the certificate names its data by the requests' random names.
    requests = [CalibrationDocument(each, ()) for each in held.documents]
    return calibrate(config.promise, measured, family, requests, RecordedLosses(held), 0)


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
