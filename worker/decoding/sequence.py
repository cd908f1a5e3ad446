"""One request's way through the engine, and the groups in which rows are asked at the exits."""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from offramp.controller.features import KEEP
from offramp.controller.policies.exits import is_on_copy
from offramp.controller.policies.protocols import LearningPolicy, Policy, RoutingPolicy, is_headless
from offramp.controller.watching.guardrails import PolicyWatch
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.open_token import UNPROBED, OpenToken
from offramp.worker.decoding.request import FinishReason, Request, TopLogprobs
from offramp.worker.decoding.sampler import Draft, Draw, Sampler
from offramp.worker.probes import Probe
from offramp.worker.probes.candidates.successors import NgramIndex


@dataclass(slots=True, eq=False)
class Sequence:
    """A running request: its row in the cache, what it has emitted, and what is still open.

    ``finish_reason`` is also set from outside, once the text is seen to hold a stop string.

    Attributes:
        prefilled: Prompt tokens in the cache.
        recalled: Those of them that the prefix cache knew; None: it was not asked.
        prompt_calls: Layers executed for the prompt's tokens.
        prompt_failed: Whether the policy for prompts failed on it; it is not asked again.
        prompt_draws: What is told of the prompt's tokens from the second on, if asked for.
        drafts: Tokens after the emitted ones that wait for confirmation (``verify``).
        open: Tokens whose deeper layers have not run, oldest first; their depths never increase.
        undecided: Whether the last open token is still on its way, waiting at its depth.
        group: The rows it is probed with while it is on its way.
        last_group: The last group that it was the first row of, whose probe is used again.
        layer_calls: Layers executed for its tokens, deferred ones included.
        copy_calls: Layers executed for its tokens on the quantised copy.
        drafts_made, drafts_accepted: Drafts in all, and those that full depth confirmed.
        policy_failed: Whether its policy raised or made no sense; it is not asked again.
        debt: Moving average of the share of layers that its tokens skipped.
        acceptance: Moving average of early tokens that full depth, where asked, agreed with.
        judged, agreed: Early tokens that full depth was asked about, and those it agreed with.
        early: Tokens that left early since the last one that ran all layers by itself.
        error: What its request failed with, by itself; it is then finished.
        proposed: Most likely token by the logits that each emitted one was drawn from, if audited.
        policy: The pinned one.
        routes, learns, headless: What kind of policy it is; headless in greedy ``verify`` only.
        drafts_on_copy: Whether some of its exits are on the quantised copy (``verify`` only).
        watch: Is told how it fares under its release; None: nobody watches.
        seated_s: When it got its slot, by ``time.perf_counter``.
    """

    request: Request
    slot: int
    sampler: Sampler
    emitted: list[int] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    ngrams: NgramIndex | None = None
    prefilled: int = 0
    recalled: int | None = None
    prompt_calls: int = 0
    prompt_failed: bool = False
    prompt_draws: list[Draw] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    open: list[OpenToken] = field(default_factory=list)
    undecided: bool = False
    group: RowGroup | None = None
    last_group: RowGroup | None = None
    layer_calls: int = 0
    copy_calls: int = 0
    drafts_accepted: int = 0
    drafts_made: int = 0
    policy_failed: bool = False
    debt: float = 0.0
    acceptance: float = 1.0
    judged: int = 0
    agreed: int = 0
    early: int = 0
    error: Exception | None = None
    proposed: list[int] = field(default_factory=list)
    seated_s: float = field(default_factory=time.perf_counter)
    policy: Policy = field(init=False)
    routes: bool = field(init=False)
    learns: bool = field(init=False)
    headless: bool = field(init=False)
    drafts_on_copy: bool = field(init=False)
    watch: PolicyWatch | None = field(init=False)

    def __post_init__(self) -> None:
        self.policy = self.request.snapshot.policy
        self.watch = self.request.snapshot.watch
        self.routes = isinstance(self.policy, RoutingPolicy)
        self.learns = isinstance(self.policy, LearningPolicy)
        verifies = self.request.kv_mode == "verify"
        greedy = verifies and self.sampler.is_plain_greedy
        self.headless = greedy and is_headless(self.policy)
        self.drafts_on_copy = verifies and any(map(is_on_copy, self.policy.exits))
        if self.policy.candidates_VK is not None:
            self.ngrams = NgramIndex(self.request.prompt)

    @property
    def projects(self) -> bool:
        """Whether the layers its exited tokens skipped are projected."""
        return self.request.kv_mode == "project"

    @property
    def is_past_asking(self) -> bool:
        """Whether its policy was asked on the copy and sent its token to none of our exits."""
        return self.drafts_on_copy and self.group is None

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is in the cache."""
        return self.prefilled == len(self.request.prompt)

    @property
    def position(self) -> int:
        """Position of the next token to feed."""
        return len(self.request.prompt) + len(self.emitted) + len(self.drafts) - 1

    @property
    def next_input(self) -> int:
        """The token to feed next."""
        if self.request.forced:
            return self.request.forced[len(self.emitted) - 1]
        return self.drafts[-1].token if self.drafts else self.emitted[-1]

    @property
    def depth(self) -> int:
        """Where its newest token stands: 0, or the depth it waits at."""
        return self.open[-1].depth if self.undecided else 0

    @property
    def calls(self) -> int:
        """Layers executed for its tokens, those of the quantised copy included."""
        return self.layer_calls + self.copy_calls

    @property
    def is_finished(self) -> bool:
        """Whether the last token was emitted, or none will be."""
        return self.finish_reason is not None or self.error is not None

    @property
    def entries(self) -> int:
        """Positions of the cache that hold something of this row."""
        return max(self.prefilled, self.position + 1)

    def emit(self, drawn: Draw, exit_layer: int, eos_tokens: frozenset[int]) -> None:
        """Record an emitted token and see whether it is the last."""
        token = drawn.token
        self.emitted.append(token)
        self.logprobs.append(drawn.logprob)
        self.top_logprobs.append(drawn.top)
        self.exit_layers.append(exit_layer)
        self.generations.append(self.request.snapshot.generation)
        self.finish_reason = self._reason(token, eos_tokens)
        if self.ngrams is not None and not self.is_finished:
            fed = self.request.forced[len(self.emitted) - 1] if self.request.forced else token
            self.ngrams.push(fed)

    def note_depth(self, executed: int, layers: int) -> None:
        """A token came out after so many of the layers."""
        self.debt += (1 - KEEP) * (1 - executed / layers - self.debt)
        if self.watch is not None:
            self.watch.note_token(executed, layers)

    def note_exit(self, executed: int, layers: int) -> None:
        """Its newest token left the stack early, after so many of the layers."""
        token = self.open[-1]
        token.is_underway = False
        if self.request.audited and token.left_at is None:
            token.left_at = UNPROBED
        self.undecided, self.group = False, None
        self.early += 1
        self.note_depth(executed, layers)

    def note_verdict(self, agreed: bool) -> None:
        """Full depth agreed with an early token, or did not."""
        self.acceptance += (1 - KEEP) * (agreed - self.acceptance)
        self.judged += 1
        self.agreed += agreed
        if self.watch is not None and self.request.audited:
            self.watch.judge(agreed, self.request.snapshot.setting)

    def note_cycle(self, drafts: Rows[Draft], accepted: int, layers: int) -> None:
        """Full depth judged drafts. Those of a copy in fewer bytes cost too little to count."""
        self.drafts_accepted += accepted
        if self.watch is not None and drafts and not self.copy_calls:
            self.watch.note_cycle(sum(draft.exit_layer for draft in drafts) / layers, accepted)

    def fail_policy(self) -> None:
        """Its policy raised or made no sense: it is not asked again."""
        self.policy_failed = True
        if self.watch is not None:
            self.watch.note_failure()

    def cut(self, tokens: int) -> None:
        """Forget what was emitted after the first tokens."""
        lists = (self.emitted, self.exit_layers, self.generations, self.logprobs, self.top_logprobs)
        for items in lists:
            del items[tokens:]

    def must_go_deep(self, max_pending: int, eos_tokens: frozenset[int]) -> bool:
        """Whether its newest token may not leave early: its release tripped, or too much pends."""
        if self.watch is not None and self.watch.tripped:
            return True
        if self.request.kv_mode == "project":
            return False
        if self.request.kv_mode == "defer":
            # Not what is still pending: that depends on whether a neighbour's launch took it along,
            # and a row's tokens must depend on nothing but its request.
            return self.early >= max_pending
        if len(self.open) > max_pending:  # the newest one is open, too
            return True
        drafted = len(self.emitted) + len(self.drafts)
        last = drafted + 1 >= self.request.sampling.max_tokens
        return last or bool(self.drafts and self._ends(self.drafts[-1].token, eos_tokens))

    def _reason(self, token: int, eos_tokens: frozenset[int]) -> FinishReason | None:
        if self._ends(token, eos_tokens):
            return "stop"
        return "length" if len(self.emitted) >= self.request.sampling.max_tokens else None

    def _ends(self, token: int, eos_tokens: frozenset[int]) -> bool:
        sampling = self.request.sampling
        if token in sampling.stop_token_ids:
            return True
        return token in eos_tokens and not (sampling.ignore_eos or self.request.forced)


class Leaving(NamedTuple):
    """Rows that leave at an exit, and what is known of their tokens.

    Attributes:
        rows: The rows that leave.
        logits_NV: Their logits over the whole vocabulary, if a probe computed them anyway.
        tokens: Each row's draft, where it is drafted without the LM head; () if none is.
    """

    rows: list[Sequence]
    logits_NV: Tensor | None = None
    tokens: Rows[int | None] = ()


class RowGroup(Protocol):
    """Rows on their way through the stack that are asked, at some exits, whether they leave."""

    @property
    def rows(self) -> list[Sequence]:
        """Rows that are still asked."""

    @property
    def probe(self) -> Probe:
        """What computes features from the rows' hidden states."""

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits at which a row may yet be asked, as long as the token lasts."""

    def exits_of(self, row: Sequence) -> tuple[int, ...]:
        """Those of one row."""

    def asked_at(self, executed: int) -> list[Sequence]:
        """Rows that are asked after so many layers, of the weights that the exit names."""

    def ask(self, guard: PolicyGuard, executed: int, x_N1D: Tensor) -> Leaving:
        """Find out which rows leave, and forget them; if the policy fails, its row stays on."""

    def forget_all_but(self, rows: Rows[Sequence]) -> None:
        """Forget rows that were cancelled while they waited at a hold."""
