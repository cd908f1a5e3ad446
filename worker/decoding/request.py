"""What a caller asks of the engine, and what it is told of each token."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch

from offramp.controller.costs.readings import EnergyShare
from offramp.controller.errors import RequestError
from offramp.controller.policies.drafts import is_drafter
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.certified_points import Target
from offramp.controller.release.manifest import Guarantee, Rollout
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.worker.decoding.prompting.prompt_exits import PromptExits
from offramp.worker.decoding.sampler import Draw, Sampler
from offramp.worker.decoding.sampling import SamplingParams


class ExitReaders(Protocol):
    """What exits are read through: adapters in front of the model's head, or heads of classes."""

    digest: str


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """One policy, and which release it came from.

    Attributes:
        generation: Generation of the release; 0 for one that was never published.
        digest: SHA-256 of the release's weights; "" if never published.
        policy: The policy itself.
        certificate: What was guaranteed of it; None if nothing was.
        watch: Is told how its requests fare; None: nobody watches.
        rollout: Says which requests it may serve, if it is a canary.
        canary: A release that serves some of the requests in its place; None if there is none.
        adapters: What its exits are read through: ``ExitAdapters``, or of a worker that classifies
            ``ClassHeads``; None: whatever the worker was made with.
        setting: The certified setting that the policy is at; None if its release has none.
    """

    generation: int
    digest: str
    policy: Policy
    certificate: Certificate | None = None
    watch: PolicyWatch | None = field(default=None, compare=False)
    rollout: Rollout = field(default_factory=Rollout)
    canary: PolicySnapshot | None = None
    adapters: ExitReaders | None = field(default=None, compare=False)
    setting: float | None = None

    def track(self, request_id: str) -> PolicySnapshot:
        """Which of the two a request runs under, to its end."""
        if self.canary is not None and self.canary.rollout.picks(request_id):
            return self.canary
        return self

    @property
    def guarantee(self) -> Guarantee:
        """What stands behind it."""
        if isinstance(self.policy, NeverExit):
            return "full depth"
        return "uncertified" if self.certificate is None else "certified"

    def mode(
        self, wish: KVMode | float | None, own: KVMode, dtype: torch.dtype, adapters: str
    ) -> KVMode:
        """What becomes of the layers that a request under it skips.

        A drafter that was released verifies unless the request says otherwise: what is served
        loses nothing where a channel has one.

        Args:
            wish: The request's mode, or the quality it wants guaranteed; None leaves it to ``own``.
            own: The engine's mode.
            dtype: Number format of the weights.
            adapters: Digest of what its exits are read through.

        Raises:
            RequestError: a quality outside [0, 1].
        """
        if wish is None and self.digest and is_drafter(self.policy):
            return "verify"
        if wish is None or isinstance(wish, str):
            return wish or own
        if not 0 <= wish <= 1:
            raise RequestError("quality", f"{wish} is not in [0, 1]", "Ask for 1 to lose nothing")
        if isinstance(self.policy, NeverExit) or self.certificate is None:
            return own if self.guarantee == "full depth" else "verify"
        name = str(dtype).removeprefix("torch.")
        gap = self.certificate.gap(kv_mode=own, dtype=name, translators=adapters)
        keeps = not gap and self.certificate.delta + wish <= 1 + 1e-9
        return own if keeps else "verify"


FULL_DEPTH = PolicySnapshot(0, "", NeverExit())
"""The built-in fallback."""


FinishReason = Literal["stop", "length"]

TopLogprobs = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, best first."""

KVMode = Literal["project", "defer", "verify"]
"""What becomes of the layers that an exited token skipped.

project: their keys and values are projected from the exit state, at once and for good.
defer: they run later, together with the row's next deep token; no projected entry is ever read.
verify: as defer, but the tokens are drafts until full depth confirms them: the output is full
depth's.
"""

KVWish = KVMode | float | Target
"""A mode; or the quality to be guaranteed, from 0 to 1: the engine's own mode if the policy's
certificate bounds the loss at 1 minus so much, else verify, which loses nothing; or what the point
of the certified frontier is to cost, in the engine's own mode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a caller submits.

    Attributes:
        id: Name of the request, unique within the engine.
        prompt: Token ids, at least one.
        sampling: How to draw tokens, and how many.
        snapshot: The policy, pinned until the request ends.
        kv_mode: What becomes of skipped layers.
        forced: Tokens to feed instead of the emitted ones (teacher forcing); () feeds the emitted.
        sampler: Draws the tokens of this request alone; None: one made from ``sampling``.
        audited: Whether full depth is asked about every token that leaves early.
        cache_salt: Beginnings of its prompt are shared with requests that have the same one.
        prompts: Says which tokens of its prompt leave early; None: every one runs every layer.
        arrived_s: When it was made, by ``time.perf_counter``.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    snapshot: PolicySnapshot
    kv_mode: KVMode = "project"
    forced: tuple[int, ...] = ()
    sampler: Sampler | None = None
    audited: bool = False
    cache_salt: str = ""
    prompts: PromptExits | None = None
    arrived_s: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def is_shadow(self) -> bool:
        """Whether it repeats another request under a release that serves nobody."""
        return self.snapshot.rollout.is_shadow


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionStats:
    """What one completion cost.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        generation: Policy generation it ran under (0: built-in full depth).
        mean_exit_layer: Mean layers before each token was emitted or drafted (all for the first).
        layer_calls: Layers executed after the prompt, those of rejected drafts included.
        copy_calls: Beside these, layers of the quantised copy that drafted.
        exact_share: Share of its cache positions whose every layer was executed.
        drafts, drafts_accepted: Tokens that left early in ``verify``, and those confirmed.
        queued_s: Seconds that it waited for a slot.
        cached_tokens: Tokens of the prompt that the prefix cache knew; None: it was not asked.
        prompt_calls: Layers executed for the prompt's other tokens.
        setting: The certified setting that it ran at; None if its release has none.
        energy: What its tokens after the first took; None: nobody read any energy meanwhile.
    """

    prompt_tokens: int
    generation: int
    mean_exit_layer: float
    layer_calls: int = 0
    copy_calls: int = 0
    exact_share: float = 1.0
    drafts: int = 0
    drafts_accepted: int = 0
    queued_s: float = field(default=0.0, compare=False)
    cached_tokens: int | None = field(default=None, compare=False)
    prompt_calls: int = field(default=0, compare=False)
    setting: float | None = None
    energy: EnergyShare | None = field(default=None, compare=False)


class TokenEvent(NamedTuple):
    """One emitted token, as its caller is told of it.

    Attributes:
        request_id: Request that the token belongs to.
        token: Id of the token.
        text: The text that became readable with it ("" inside a multi-byte character, or while
            it could begin a stop string).
        exit_layer: Layers executed before it was emitted (or drafted).
        generation: Generation of the policy that decided it (0: built-in full depth).
        finish_reason: Set on the last token only.
        logprob: Its log-probability (natural) at the layer it left from (``verify``: at full
            depth), under the logits as the model gave them; None if not asked for.
        top_logprobs: The most likely tokens there and their log-probabilities, best first.
        text_offset: Characters of the completion's text before the token's own.
        stats: What the completion cost; set on the last token only.
        prompt_draws: What was asked of the prompt's tokens, from the second on; with the first
            token only.
    """

    request_id: str
    token: int
    text: str
    exit_layer: int
    generation: int
    finish_reason: FinishReason | None
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    text_offset: int = 0
    stats: CompletionStats | None = None
    prompt_draws: tuple[Draw, ...] = ()
