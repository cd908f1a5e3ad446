"""Which tokens may leave while a prompt is read, and which requests take part."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offramp.controller.adapters.adapter_folder import HEADS_KIND
from offramp.controller.errors import ConfigError
from offramp.controller.features import PROMPT_V1
from offramp.controller.policies.exits import is_on_copy
from offramp.controller.policies.protocols import ExitPolicy, Policy, RoutingPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.strict import is_count
from offramp.worker.decoding.sampling import SamplingParams

Prefill = Literal["full", "exits"]
"""How prompts are read.

full: every token runs every layer.
exits: tokens leave early where the engine's policy for prompts says so; the keys and values of the
layers that they skip are projected, for good.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptExits:
    """A policy for prompts, and the tokens that it is not asked about.

    Attributes:
        policy: Asked, after each of its exits, about all tokens of a chunk at once that are still
            in the stack. Reads PROMPT_V1, or nothing. One engine's own.
        keep_first: Tokens at the prompt's beginning that run every layer; attention rests on them.
        keep_last: Tokens at its end that do, at least 1: the first new token is drawn from the
            state of the last.
        model: Fingerprint of the model that the policy was made for; "": any.
        adapters: Digest of the adapters that it was learned through; "": any.

    Raises:
        ConfigError: no policy for prompts, or a number below its bound.
    """

    policy: ExitPolicy
    keep_first: int = 4
    keep_last: int = 32
    model: str = ""
    adapters: str = ""

    def __post_init__(self) -> None:
        require_prompt_policy(self.policy)
        for name, least in (("keep_first", 0), ("keep_last", 1)):
            value = getattr(self, name)
            if not is_count(value) or value < least:
                problem = f"{value!r} is no integer from {least} on"
                raise ConfigError(name, problem, f"Keep {least} or more")

    @classmethod
    def load(cls, folder: str | Path, **kept: int) -> PromptExits:
        """Take the policy of a bundle.

        Args:
            folder: Where ``PolicyBundle.save`` wrote it.
            kept: ``keep_first`` and ``keep_last``, as in the class.

        Raises:
            ConfigError: a file is missing, or it is no policy for prompts.
            PolicyRefusedError: a file is unusable.
        """
        bundle = PolicyBundle.load(folder)
        policy, manifest = bundle.policy(), bundle.manifest
        require_prompt_policy(policy)
        assert isinstance(policy, ExitPolicy)
        if manifest.training.get("task") == HEADS_KIND:
            problem = f"in {folder} was learned on a classification"
            raise ConfigError("prompt_policy", problem, "Train one with --for prompts")
        return cls(policy=policy, model=manifest.model, adapters=manifest.adapters, **kept)

    def require_model(self, fingerprint: str, layers: int, adapters: str) -> None:
        """Refuse another model's policy.

        Args:
            fingerprint: The model's.
            layers: Number of its layers.
            adapters: Digest of those that its exits are read, and its skipped layers filled,
                through; "" for none.

        Raises:
            ConfigError: it was made for another, or has an exit that this one does not have.
        """
        if self.adapters and self.adapters != adapters:
            problem = (
                f"was learned through adapters {self.adapters[:12]}, and the engine has "
                f"{adapters[:12] or 'none'}"
            )
            remedy = "Name their folder with --translators (EngineConfig.translators)"
            raise ConfigError("prompt_policy", problem, remedy)
        if self.model and self.model != fingerprint:
            problem = f"was made for model {self.model[:12]}, and this one is {fingerprint[:12]}"
            raise ConfigError("prompt_policy", problem, "Train one for this model")
        if max(self.policy.exits, default=0) > layers:
            problem = f"has exits {tuple(self.policy.exits)}, and the model has {layers} layers"
            raise ConfigError("prompt_policy", problem, "Use layers of this model")

    def problem_with(self, promise: str, adapted: Collection[int]) -> str:
        """What speaks against exits in a request's prompt; "" if nothing.

        Args:
            promise: What it was promised that they would break, or "".
            adapted: Exits behind which adapter layers run over its tokens.
        """
        exits = self.policy.exits
        if promise:
            return f"exits changes what follows, and {promise}"
        if adapted and exits and min(exits) < max(adapted):
            return (
                f"exits leaves the adapter layer after {max(adapted)} without entries of tokens "
                f"that leave after {min(exits)}"
            )
        return ""


def require_prompt_policy(policy: Policy) -> None:
    """Refuse a policy that cannot be asked about the tokens of a prompt.

    Raises:
        ConfigError: naming why.
    """
    given: object = policy  # callers need not keep to the annotation
    problem = ""
    if isinstance(given, RoutingPolicy):
        problem = "sends rows from exit to exit, and tokens of a prompt are asked at each"
    elif not isinstance(given, ExitPolicy):
        problem = f"{given!r:.80} is no exit policy"
    elif given.schema is not None and given.schema.digest != PROMPT_V1.digest:
        problem = f"reads {given.schema.name!r}, which no token of a prompt is probed for"
    elif any(map(is_on_copy, given.exits)):
        problem = "leaves on a copy in fewer bytes, where only drafts do"
    elif list(given.exits) != sorted({*given.exits}) or min(given.exits, default=1) < 1:
        problem = f"has exits {tuple(given.exits)}, which do not ascend from 1 on"
    if problem:
        raise ConfigError("prompt_policy", problem, "Give one that reads PROMPT_V1, or a FixedExit")


def promise_of(kv_mode: str, sampling: SamplingParams, *, is_bound: bool) -> str:
    """Name what a request was promised that exits in its prompt would break; "" for nothing.

    Args:
        kv_mode: What becomes of layers that its new tokens skip.
        sampling: Says whether it is told full depth's log-probabilities of the prompt's tokens.
        is_bound: Whether it asks for a quality or a point that certificates stand behind.
    """
    if kv_mode == "verify":
        return "verify promises full depth's tokens"
    if is_bound:
        return "no certificate bounds what they lose"
    return "prompt_logprobs are full depth's" if sampling.prompt_logprobs is not None else ""
