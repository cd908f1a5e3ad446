"""From a family of policies to one with a certificate, or to the finding that none passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast, get_args

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
from offramp.controller.release.manifest import MODEL_LAYERS
from offramp.worker.engine.engine import AdaptiveEngine

EPSILON = 0.05
"""Probability that a promise may fail to hold, unless another is asked for."""


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


def parse_promise(delta: float, epsilon: float | None, method: str, unit: str) -> Promise:
    """Read what is to be guaranteed off what was typed.

    Raises:
        ConfigError: an unknown name, or numbers outside their range.
    """
    for field, value, known in (
        ("method", method, get_args(Method)),
        ("unit", unit, get_args(Unit)),
    ):
        if value not in known:
            raise ConfigError(field, f"{value!r} is unknown", f"Use one of {', '.join(known)}")
    if epsilon is None and method != "conformal":
        epsilon = EPSILON
    return Promise(delta=delta, epsilon=epsilon, method=cast(Method, method), unit=cast(Unit, unit))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredWith:
    """What losses are measured with, as a certificate names it.

    Attributes:
        model, tokenizer: Fingerprints, hex.
        adapters: Digest of what its exits are read through: adapters, or heads that classify.
        dtype, layers: Number format of the weights, such as "float32", and layers of the model.
        max_pending: Pending tokens at most, in mode ``defer``; else None.
        option: The option that names the folder of ``adapters``.
    """

    model: str
    tokenizer: str
    adapters: str
    dtype: str
    layers: int
    max_pending: int | None = None
    option: str = "translators"

    @classmethod
    def of(cls, engine: AdaptiveEngine) -> MeasuredWith:
        """An engine that decodes tokens."""
        config = engine.config
        return cls(
            model=engine.model_fingerprint,
            tokenizer=engine.tokenizer_fingerprint,
            adapters=engine.decoder.translators.digest,
            dtype=str(engine.stack.dtype).removeprefix("torch."),
            layers=engine.stack.layers,
            max_pending=config.max_pending if config.kv_mode == "defer" else None,
        )


def calibrate(
    promise: Promise,
    measured: MeasuredWith,
    family: SettingFamily,
    documents: Sequence[CalibrationDocument],
    losses: LossSource,
    prompt_tokens: int,
    on_step: OnStep = lambda _: None,
) -> Calibration:
    """Walk a family and certify its last setting that passes.

    Args:
        promise: What is to be guaranteed.
        measured: What the losses are measured with.
        family: The settings to walk, safest first.
        documents: Documents that the losses are measured on.
        losses: Measures the losses of a policy.
        prompt_tokens: Tokens of each document left out of the losses.
        on_step: Told each setting as soon as it is judged.

    Raises:
        ConfigError: the family is of another model or tokenizer.
        TraceError: there is no document.
    """
    require_fingerprints(family.bundle, measured)
    outcome = _walk(promise, family, losses, on_step)
    passed, mode = outcome.certified, losses.decode_mode
    if passed is None:
        return Calibration(loss=losses.loss, outcome=outcome, bundle=None)
    bundle = _bundle(family, passed.setting, {MODEL_LAYERS: measured.layers})
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
        max_pending=measured.max_pending if mode == "defer" else None,
        dtype=measured.dtype,
        prompt_tokens=prompt_tokens,
        new_tokens=losses.new_tokens,
        policy=manifest.digest,
        model=manifest.model,
        tokenizer=manifest.tokenizer,
        translators=measured.adapters,
        created_at=manifest.created_at,
    )
    whole = PolicyBundle(replace(manifest, certificate=certificate), bundle.blob)
    return Calibration(loss=losses.loss, outcome=outcome, bundle=whole)


def require_fingerprints(bundle: PolicyBundle, measured: MeasuredWith) -> None:
    """Refuse a policy of another model or tokenizer, or recorded through other adapters.

    Raises:
        ConfigError: it is of another; the field says which.
    """
    manifest = bundle.manifest
    require_read(manifest.adapters, measured.adapters, measured.option)
    pairs = {
        "model": (manifest.model, measured.model),
        "tokenizer": (manifest.tokenizer, measured.tokenizer),
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
    require_read(bundle.manifest.adapters, engine.decoder.translators.digest, "translators")


def require_read(named: str, own: str, option: str) -> None:
    """Refuse what was recorded through others; heads must be named, adapters need not be.

    Args:
        named: Digest that the policy names; "" for none.
        own: Digest of those that are loaded.
        option: "translators" or "heads".

    Raises:
        ConfigError: field ``option``, naming both.
    """
    if named == own or (not named and option == "translators"):
        return
    kind = "adapters" if option == "translators" else "heads"
    raise ConfigError(
        option,
        f"the policies were recorded through {kind} {named[:12] or 'of no name'}, "
        f"{own[:12] or 'none'} are loaded",
        f"Name the folder that they were recorded with (--{option})",
    )


def require_enough(promise: Promise, documents: int, source: str = "corpus") -> None:
    """Refuse documents, of the option ``source``, that certify nothing even if none shows a loss.

    Raises:
        ConfigError: naming how many it takes.
    """
    least = least_units(promise.delta, promise.epsilon)
    if promise.unit == "document" and documents < least:
        raise ConfigError(
            "documents",
            f"{documents} unseen ones can certify no bound of {promise.delta:g}, it takes {least}",
            f"Give more, in a larger --{source}, or relax --delta or --epsilon",
        )


def _walk(
    promise: Promise, family: SettingFamily, losses: LossSource, on_step: OnStep
) -> WalkResult:
    """Walk a family; each step says where tokens left, if its losses' source records that."""
    leaves: dict[float, tuple[float, ...]] = {}

    def losses_of(setting: float) -> Losses:
        # MeasuredWith when it is walked: what lies behind the first failure is never decoded.
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


def _bundle(family: SettingFamily, setting: float, metrics: dict[str, int]) -> PolicyBundle:
    """The family's policy at a setting, on the canned inputs of the bundle it comes from."""
    source = family.bundle
    canned_NF: np.ndarray = load(source.blob)["canned.features"]
    return PolicyBundle.draft(
        pack_policy(family.build(setting), canned_NF),
        model=source.manifest.model,
        tokenizer=source.manifest.tokenizer,
        training={**source.manifest.training, "setting": setting, "parameter": family.parameter},
        metrics=metrics,
        adapters=source.manifest.adapters,
        created_at=time.time(),
    )
