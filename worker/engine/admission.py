"""What a request must be before it may wait in line."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any, get_args

from offramp.controller.errors import RequestError
from offramp.controller.features import CANDIDATES_V1, PROMPT_V1, TABLE_SCHEMAS
from offramp.controller.policies.exits import ascend, is_on_copy
from offramp.controller.policies.protocols import Policy, is_headless
from offramp.worker.decoding.request import KVMode, PolicySnapshot
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.model.stack import LayerStack
from offramp.worker.probes.factory import probe_of


class AuditPicker:
    """Picks the requests whose every early token full depth is asked about.

    Args:
        share: Share of the requests that may be audited, spread evenly, once a release's first
            ones were (``FIRST_AUDITED``); 0 audits none.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._owed = 1.0 - share

    def picks(
        self, snapshot: PolicySnapshot, kv_mode: KVMode = "project", forced: Sequence[int] = ()
    ) -> bool:
        """Whether a new request is audited: one under a watched policy whose exits count."""
        if snapshot.watch is None or kv_mode == "verify" or forced:
            return False
        if snapshot.rollout.is_shadow:
            return True  # which is all that it is run for
        if self._share > 0 and snapshot.watch.is_first():
            return True
        self._owed += self._share
        is_due = self._share > 0 and self._owed >= 1.0 - 1e-9
        self._owed -= is_due
        return is_due


def sampling_of(sampling: SamplingParams | None, forced: Sequence[int]) -> SamplingParams:
    """How a request draws tokens: as many as are forced, or as it says; greedy, 64, by default.

    Raises:
        RequestError: it is no ``SamplingParams``.
    """
    given: object = SamplingParams() if sampling is None else sampling
    if not isinstance(given, SamplingParams):
        raise RequestError("sampling", f"{given!r} is no SamplingParams", "Make one")
    return SamplingParams(max_tokens=len(forced), ignore_eos=True) if forced else given


def require_request(
    prompt: Sequence[int],
    forced: Sequence[int],
    sampling: SamplingParams,
    stack: LayerStack,
    tokenizer: Any,
    row_tokens: int,
) -> None:
    """Refuse what the model, its cache, or an engine without a tokenizer, cannot serve.

    Raises:
        RequestError: naming what.
    """
    require_tokens("prompt", prompt, stack.vocab)
    require_tokens("forced", forced, stack.vocab)
    require_context(len(prompt), sampling.max_tokens, stack.context)
    require_sampling(sampling, stack.vocab, stack.eos_tokens, tokenizer)
    require_memory(len(prompt), sampling.max_tokens, row_tokens)


def require_sampling(
    sampling: SamplingParams, vocab: int, eos_tokens: frozenset[int], tokenizer: Any
) -> None:
    """Refuse what cannot be drawn or cannot be stopped at.

    Raises:
        RequestError: several completions, token ids outside the vocabulary, stop strings without
            a tokenizer, or ``min_tokens`` where every token is one that it holds off.
    """
    if sampling.n != 1:
        raise RequestError(
            "n", f"{sampling.n} completions of one request", "Submit each of sampling.each()"
        )
    if sampling.stop and tokenizer is None:
        raise RequestError(
            "stop", "needs a tokenizer, and the engine has none", "Use stop_token_ids"
        )
    require_tokens("stop_token_ids", sampling.stop_token_ids, vocab)
    require_tokens("logit_bias", list(sampling.logit_bias), vocab)
    if sampling.min_tokens and len({*eos_tokens, *sampling.stop_token_ids}) >= vocab:
        raise RequestError(
            "stop_token_ids", "are all tokens there are, and min_tokens forbids them", "Name fewer"
        )


def require_tokens(field: str, tokens: Sequence[int], vocab: int) -> None:
    """Refuse token ids outside the vocabulary.

    Raises:
        RequestError: naming the first such token, or what is none.
    """
    kinds: set[type] = set(map(type, tokens))
    for kind in kinds:
        if kind is bool or not issubclass(kind, Integral):
            raise RequestError(field, f"holds a {kind.__name__}, no token id", "Use integers")
    if len(tokens) == 0 or 0 <= min(tokens) <= max(tokens) < vocab:
        return
    for place, token in enumerate(tokens):
        if not 0 <= token < vocab:
            raise RequestError(
                field, f"token {token} at index {place} is not in [0, {vocab})", "Use other ids"
            )


def require_context(prompt_tokens: int, max_tokens: int, context: int) -> None:
    """Refuse what the model's context cannot hold.

    Raises:
        RequestError: naming the prompt if it alone is too long, else the three numbers.
    """
    if prompt_tokens >= context:
        raise RequestError(
            "prompt",
            f"has {prompt_tokens} tokens, and the context is {context}",
            f"Shorten it to at most {context - 1}",
        )
    if prompt_tokens + max_tokens > context:
        raise RequestError(
            "max_tokens",
            f"{prompt_tokens} prompt tokens and {max_tokens} new ones exceed the context "
            f"of {context}",
            f"Ask for at most {context - prompt_tokens} or shorten the prompt",
        )


def require_memory(prompt_tokens: int, max_tokens: int, row_tokens: int) -> None:
    """Refuse what the cache's memory budget cannot hold.

    Raises:
        RequestError: naming the numbers.
    """
    if prompt_tokens + max_tokens > row_tokens:
        raise RequestError(
            "max_tokens",
            f"{prompt_tokens} prompt tokens and {max_tokens} new ones exceed the {row_tokens} "
            "that the cache's memory budget leaves to a request",
            "Ask for fewer, or start the engine with a larger kv_budget_mb or fewer slots",
        )


def require_mode(
    kv_mode: str, forced: Sequence[int], policy: Policy, adapters: Collection[int]
) -> None:
    """Refuse an unknown cache mode, or one that the policy or teacher forcing does not go with.

    Raises:
        RequestError: naming the mode.
    """
    if kv_mode not in get_args(KVMode):
        known = ", ".join(get_args(KVMode))
        raise RequestError("kv_mode", f"{kv_mode!r} is unknown", f"Use one of {known}")
    if kv_mode == "verify" and forced:
        raise RequestError(
            "kv_mode",
            "verify confirms drafts against their successors, and forced tokens are no drafts",
            "Use project or defer with forced tokens",
        )
    used = set(adapters).intersection(policy.exits)
    if kv_mode == "project" and used and min(policy.exits) < max(used):
        raise RequestError(
            "kv_mode",
            f"project leaves the adapter layer after {max(used)} without entries of tokens that "
            f"leave after {min(policy.exits)}",
            "Use defer or verify, or a policy without earlier exits",
        )
    if kv_mode != "verify" and any(map(is_on_copy, policy.exits)):
        raise RequestError(
            "kv_mode",
            f"{kv_mode} emits what exits say, and the policy leaves on a copy in fewer bytes",
            "Use verify, or a policy with exits of the model's own layers",
        )


def require_policy(policy: Policy, layers: int, width: int) -> None:
    """Refuse what is no policy, or one whose exits or features the engine does not have.

    Raises:
        RequestError: naming what was given.
    """
    given: object = policy  # callers need not keep to the annotation
    if isinstance(given, type) or not isinstance(given, Policy):
        problem = f"{policy!r} is no exit policy"
        raise RequestError("policy", problem, "Give an ExitPolicy or a RoutingPolicy")
    schema = policy.schema
    if is_headless(policy) and (schema is None or schema.digest != CANDIDATES_V1.digest):
        problem = "drafts the best candidate and does not read candidates"
        raise RequestError("schema", problem, "Read CANDIDATES_V1, or draft with the head")
    if schema is not None and schema.digest == PROMPT_V1.digest:
        problem = "is of a prompt's tokens, and a request's policy decides about new ones"
        raise RequestError("schema", problem, "Give the policy as EngineConfig.prompts")
    if schema is not None and probe_of(schema) is None:
        problem = f"no probe computes {schema.name!r} version {schema.version}"
        raise RequestError("schema", problem, "Add one to offramp.worker.probes.factory")
    if schema is not None and schema.name == "hidden" and schema.width != width:
        problem = f"reads states of {schema.width} columns, the model's have {width}"
        raise RequestError("schema", problem, "Train the policy on traces of this model")
    exits: tuple[Any, ...] = tuple(policy.exits)
    inside = all(isinstance(layer, Integral) and 1 <= int(layer) <= layers for layer in exits)
    if not inside or not ascend(exits):
        raise RequestError(
            "exits",
            f"{exits} do not ascend within [1, {layers}]",
            "Use layers of this model, those on a copy first",
        )


def require_fit(policy: Policy, stack: LayerStack) -> None:
    """Refuse a policy made for another model.

    Raises:
        RequestError: exits out of order or range, or a candidate table that does not fit.
    """
    require_policy(policy, stack.layers, stack.width)
    vocab = stack.vocab
    if policy.schema is None or policy.schema.digest not in TABLE_SCHEMAS:
        return
    table = policy.candidates_VK
    if table is None or table.shape[0] != vocab or table.min() < 0 or table.max() >= vocab:
        raise RequestError(
            "candidates",
            f"the policy's candidate table does not fit a vocabulary of {vocab}",
            "Train the policy on traces of this model",
        )
