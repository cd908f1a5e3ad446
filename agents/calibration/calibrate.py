"""From a family of policies to one with a certificate, or to the finding that none passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from safetensors.numpy import load

from offramp.agents.calibration.calibration_documents import CalibrationDocument, data_digest
from offramp.agents.calibration.fixed_sequence import (
    OnStep,
    WalkResult,
    conformal_risk_control,
    learn_then_test,
    require_share,
)
from offramp.agents.calibration.losses import LossSource
from offramp.agents.calibration.pvalues import Losses, least_units
from offramp.agents.calibration.setting_families import SettingFamily
from offramp.controller.errors import ConfigError
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certificate import Certificate, Method, Unit
from offramp.worker.engine.engine import AdaptiveEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What is to be guaranteed, and how it is tested.

    Attributes:
        delta: Bound on the mean loss, in (0, 1).
        epsilon: Probability that it may fail to hold, in (0, 1); None with "conformal" alone.
        method: The test that decides.
        unit: What counts as one independent draw.

    Raises:
        ConfigError: numbers outside their range, or a test that does not fit the unit.
    """

    delta: float = 0.05
    epsilon: float | None = 0.05
    method: Method = "hoeffding-bentkus"
    unit: Unit = "document"

    def __post_init__(self) -> None:
        require_share("delta", self.delta)
        if (self.epsilon is None) != (self.method == "conformal"):
            raise ConfigError(
                "epsilon",
                f"{self.epsilon} does not go with {self.method}",
                "Conformal risk control bounds the expected loss and has none; the others need one",
            )
        if self.epsilon is not None:
            require_share("epsilon", self.epsilon)
        if self.method == "binomial" and self.unit == "document":
            raise ConfigError(
                "method",
                "binomial is for losses of 0 or 1, and a document's is a mean",
                "Use hoeffding-bentkus or betting, or tokens as units",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibration came to.

    Attributes:
        loss: The loss that was bounded.
        outcome: Every setting that was walked.
        bundle: The certified policy with its certificate; None: nothing was certified, and full
            depth, whose loss is none, is what remains.
    """

    loss: str
    outcome: WalkResult
    bundle: PolicyBundle | None


def calibrate(
    promise: Promise,
    engine: AdaptiveEngine,
    family: SettingFamily,
    documents: Sequence[CalibrationDocument],
    losses: LossSource,
    prompt_tokens: int,
    on_step: OnStep = lambda _: None,
) -> Calibration:
    """Walk a family and certify its last setting that passes.

    Args:
        promise: What is to be guaranteed.
        engine: The engine that the losses are measured with.
        family: The settings to walk, safest first.
        documents: Documents that the losses are measured on.
        losses: Measures the losses of a policy.
        prompt_tokens: Tokens of each document left out of the losses.
        on_step: Told each setting as soon as it is judged.

    Raises:
        ConfigError: the family is of another model or tokenizer than the engine's.
        TraceError: there is no document.
    """
    require_fingerprints(family.bundle, engine)

    outcome = _walk(promise, family, losses, on_step)
    passed, mode = outcome.certified, losses.decode_mode
    if passed is None:
        return Calibration(loss=losses.loss, outcome=outcome, bundle=None)
    bundle = _bundle(family, passed.setting)
    manifest = bundle.manifest
    certificate = Certificate(
        **asdict(promise),
        loss=losses.loss,
        risk=passed.risk,
        n=outcome.n,
        p_value=passed.p_value,
        family=family.name,
        parameter=family.parameter,
        setting=passed.setting,
        walked=outcome.walked,
        data=data_digest(documents),
        decode_mode=mode,
        max_pending=engine.config.max_pending if mode == "defer" else None,
        dtype=str(engine.stack.dtype).removeprefix("torch."),
        prompt_tokens=prompt_tokens,
        new_tokens=losses.new_tokens,
        policy=manifest.digest,
        model=manifest.model,
        tokenizer=manifest.tokenizer,
        translators=engine.decoder.translators.digest,
        created_at=manifest.created_at,
    )
    whole = PolicyBundle(replace(manifest, certificate=certificate), bundle.blob)
    return Calibration(loss=losses.loss, outcome=outcome, bundle=whole)


def require_fingerprints(bundle: PolicyBundle, engine: AdaptiveEngine) -> None:
    """Refuse a policy of another model or tokenizer, or recorded through other adapters.

    Raises:
        ConfigError: it is of another; the field says which.
    """
    require_adapters(bundle, engine)
    manifest = bundle.manifest
    pairs = {
        "model": (manifest.model, engine.model_fingerprint),
        "tokenizer": (manifest.tokenizer, engine.tokenizer_fingerprint),
    }
    for field, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ConfigError(
                field,
                f"the policies were made for {theirs[:12]}, {ours[:12]} is loaded",
                "Name the model that was recorded, with the weights (native, int8, int4) it had",
            )


def require_adapters(bundle: PolicyBundle, engine: AdaptiveEngine) -> None:
    """Refuse a policy that names other adapters than the engine's exits are read through.

    Raises:
        ConfigError: naming both.
    """
    named, own = bundle.manifest.adapters, engine.decoder.translators.digest
    if named not in ("", own):
        raise ConfigError(
            "translators",
            f"the policies were recorded through adapters {named[:12]}, "
            f"{own[:12] or 'none'} are loaded",
            "Name the folder that they were recorded with (--translators)",
        )


def require_enough(promise: Promise, documents: int) -> None:
    """Refuse documents that could certify nothing, even if they showed no loss at all.

    Raises:
        ConfigError: naming how many it takes.
    """
    least = least_units(promise.delta, promise.epsilon)
    if promise.unit == "document" and documents < least:
        raise ConfigError(
            "documents",
            f"{documents} unseen ones can certify no bound of {promise.delta:g}, it takes {least}",
            "Give more, in a larger --corpus, or relax --delta or --epsilon",
        )


def _walk(
    promise: Promise, family: SettingFamily, losses: LossSource, on_step: OnStep
) -> WalkResult:
    """Walk a family; each step says where tokens left, if its losses' source records that."""
    leaves: dict[float, tuple[float, ...]] = {}

    def losses_of(setting: float) -> Losses:
        # Measured when it is walked: what lies behind the first failure is never decoded.
        policy = family.build(setting)
        found = losses.losses(policy, promise.unit)
        leaves[setting] = losses.leaves(policy.exits)
        return found

    delta, epsilon, settings = promise.delta, promise.epsilon, family.settings
    if epsilon is None:
        found = conformal_risk_control(settings, losses_of, delta=delta, on_step=on_step)
    else:
        method = promise.method
        found = learn_then_test(
            settings, losses_of, delta=delta, epsilon=epsilon, method=method, on_step=on_step
        )
    walked = tuple(replace(step, leaves=leaves[step.setting]) for step in found.walked)
    return replace(found, walked=walked)


def _bundle(family: SettingFamily, setting: float) -> PolicyBundle:
    """The family's policy at a setting, on the canned inputs of the bundle it comes from."""
    source = family.bundle
    canned_NF: np.ndarray = load(source.blob)["canned.features"]
    return PolicyBundle.draft(
        pack_policy(family.build(setting), canned_NF),
        model=source.manifest.model,
        tokenizer=source.manifest.tokenizer,
        training={**source.manifest.training, "setting": setting, "parameter": family.parameter},
        metrics={},
        adapters=source.manifest.adapters,
        created_at=time.time(),
    )
