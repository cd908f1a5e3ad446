"""How an engine shares the machine among its rows."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import MAX_PENDING
from offramp.controller.policies.exits import copy_weights
from offramp.controller.policies.protocols import Policy
from offramp.worker.decoding.prompting.prompt_exits import Prefill, PromptExits
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.model.kv import BLOCK_TOKENS
from offramp.worker.model.precision import NATIVE, Precision

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Attributes:
        kv_mode: What becomes of the layers that exited tokens skipped, unless a request says.
        schedule: Lock-step, or cohorts with holds.
        prefill_tokens: Prompt tokens read between two launches at most: a running row never
            waits longer for other rows' prompts. Prompts are cut at its multiples, and nowhere else
            unless they are kept.
        prefill: How prompts are read unless a request says; one that was promised full depth's
            tokens, or a quality, is read in full.
        prompts: The policy for prompts; None: none can be read with exits.
        max_pending: Tokens a row may have pending before its next one runs all layers.
        translators: Folder that ``offramp tune`` wrote for this model; None: exits are read as
            they are.
        precision: How the model's matrices are kept: as loaded, or in fewer bytes.
        draft_precision: Keep a copy of the layers in so many bytes, on which requests in ``verify``
            draft whose policies name exits there (``Exit(12, "int4")``), the last layer included.
        audit_share: Share of the requests under a watched policy, in [0, 1], whose every early
            token full depth is asked about. They run in ``defer``, whose deep passes tell for
            little more than an LM head; in ``verify`` every draft is judged anyway.
        kv_budget_mb: Most memory the cache may grow to, in MiB; None: as the context asks. While
            it grows, the keys or the values exist twice.
        prefix_cache_mib: Most memory, in MiB, for what is kept of prompts that were read: one that
            begins with the same chunks is not read again so far, and its completion stays the same
            bit for bit. Chunks are then cut at 32, 64, 128, … tokens, too. 0 keeps nothing.
        cuda_graphs: Whether layers on a GPU are captured once per size, and replayed by one launch;
            without, each kernel is launched by itself, which is slower and takes less memory.

    Raises:
        ConfigError: an unknown mode, or a number below its bound.
    """

    kv_mode: KVMode = "project"
    schedule: Schedule = LOCKSTEP
    prefill_tokens: int = 256
    prefill: Prefill = "full"
    prompts: PromptExits | None = None
    max_pending: int = MAX_PENDING
    translators: Path | None = None
    precision: Precision = NATIVE
    draft_precision: Precision | None = None
    audit_share: float = 0.05
    kv_budget_mb: float | None = None
    prefix_cache_mib: float = 0.0
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        self._require_kinds()
        for name, kind in (("kv_mode", KVMode), ("prefill", Prefill)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                problem = f"{getattr(self, name)!r} is unknown"
                raise ConfigError(name, problem, f"Use one of {known}")
        self._require_prompts()
        for name in ("prefill_tokens", "max_pending"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise ConfigError(name, f"{value!r} is no integer from 1 on", "Use 1 or more")
            if value < 1:
                raise ConfigError(name, f"{value} is below 1", "Use 1 or more")
        drafts = self.draft_precision
        if drafts is not None and drafts.weights in ("native", self.precision.weights):
            raise ConfigError(
                "draft_weights",
                f"{drafts.weights} drafts no faster than {self.precision.weights} verifies",
                "Use fewer bytes, such as int4, or leave it out",
            )
        if not 0.0 <= self.audit_share <= 1.0:
            raise ConfigError("audit_share", f"{self.audit_share} is not in [0, 1]", "Give a share")
        if not 0 <= self.prefix_cache_mib < math.inf:
            problem = f"{self.prefix_cache_mib} is no amount of memory"
            raise ConfigError("prefix_cache_mib", problem, "Give MiB, or 0 to keep nothing")
        budget = self.kv_budget_mb
        if budget is not None and not 0 < budget < math.inf:
            raise ConfigError("kv_budget_mb", f"{budget} is no amount of memory", "Give MiB")

    def _require_kinds(self) -> None:
        """Take folders named as text, and refuse what is of another type than it has to be."""
        folder: object = self.translators  # callers need not keep to the annotations
        if isinstance(folder, str) and folder:
            object.__setattr__(self, "translators", Path(folder))
        for name, kind in (
            ("translators", Path | None),
            ("prompts", PromptExits | None),
            ("schedule", Schedule),
            ("precision", Precision),
            ("draft_precision", Precision | None),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                wanted = getattr(kind, "__name__", str(kind))
                raise ConfigError(name, f"{value!r:.60} is no {wanted}", "Make one")

    def _require_prompts(self) -> None:
        if self.prefill == "full":
            return
        if self.prompts is None:
            problem, remedy = "exits needs a policy for prompts", "Give prompts, or full"
            raise ConfigError("prefill", problem, remedy)
        if self.kv_mode == "verify":
            problem = "exits changes what follows, and verify promises full depth's tokens"
            raise ConfigError("prefill", problem, "Use project or defer, or full")

    def require_model(self, fingerprint: str, layers: int, adapters: str) -> None:
        """Refuse a policy for prompts that was made for another model, or other adapters.

        Raises:
            ConfigError: see ``PromptExits.require_model``.
        """
        if self.prompts is not None:
            self.prompts.require_model(fingerprint, layers, adapters)

    def prompts_of(
        self, wish: Prefill | None, *, promise: str, adapted: Collection[int]
    ) -> PromptExits | None:
        """Say who may leave a request's prompt; None: every token runs every layer.

        A request that does not say gets the engine's own way only where nothing speaks against it.

        Args:
            wish: How the request wants its prompt read; None leaves it to the engine.
            promise: What the request was promised that exits in the prompt would break, or "".
            adapted: Exits behind which adapter layers run over its tokens.

        Raises:
            RequestError: an unknown way, or exits in the prompt that the request cannot have.
        """
        if wish is not None and wish not in get_args(Prefill):
            known = ", ".join(get_args(Prefill))
            raise RequestError("prefill", f"{wish!r:.40} is unknown", f"Use one of {known}")
        if (wish or self.prefill) == "full":
            return None
        problem = "exits needs a policy for prompts, and the engine has none"
        if self.prompts is not None:
            problem = self.prompts.problem_with(promise, adapted)
        if problem and wish is not None:
            raise RequestError("prefill", problem, "Use full")
        return None if problem else self.prompts

    def require_prices(self, costs: CostTable, slots: int) -> None:
        """Refuse costs without launches of so many rows, or without the copy that drafts run on.

        Raises:
            ConfigError: naming what was not measured.
        """
        costs.at(slots)
        if self.draft_precision is not None:
            costs.on_copy(self.draft_precision.weights, slots)

    def require_drafts(self, policy: Policy, kv_mode: str = "verify") -> None:
        """Refuse exits on a copy that is not there, and drafts that are counted otherwise.

        Policies that draft read the share of ``max_pending`` that is pending (``OUTLOOK_V1``).

        Args:
            policy: What is to be served.
            kv_mode: The mode that it runs in; only ``verify`` drafts.

        Raises:
            RequestError: naming the exits, or ``max_pending``.
        """
        wanted, copy = copy_weights(policy.exits), self.draft_precision
        if wanted is not None and (copy is None or copy.weights != wanted):
            own = "none" if copy is None else copy.name
            raise RequestError(
                "exits",
                f"({', '.join(map(str, policy.exits))}) ask for a copy of the layers in {wanted}, "
                f"and the engine has {own}",
                f"Serve with --draft-weights {wanted} (EngineConfig.draft_precision)",
            )
        most = getattr(policy, "max_pending", self.max_pending)
        if kv_mode == "verify" and most != self.max_pending:
            raise RequestError(
                "max_pending",
                f"the policy was made for {most} pending drafts, and the engine lets "
                f"{self.max_pending} pend",
                f"Serve with --max-pending {most} (EngineConfig.max_pending)",
            )

    def row_tokens(self, context: int, bytes_per_token: int) -> int:
        """Tokens that one request may hold.

        Args:
            context: Most positions that the model has.
            bytes_per_token: Bytes of one position in all slots.

        Raises:
            ConfigError: the budget does not even hold the first block.
        """
        if self.kv_budget_mb is None:
            return context
        blocks = int(self.kv_budget_mb * MIB) // (bytes_per_token * BLOCK_TOKENS)
        if blocks < 1:
            least = bytes_per_token * BLOCK_TOKENS / MIB
            raise ConfigError(
                "kv_budget_mb",
                f"{self.kv_budget_mb} MiB hold less than {BLOCK_TOKENS} tokens in every slot",
                f"Give at least {least:.1f} MiB or use fewer slots",
            )
        return min(context, blocks * BLOCK_TOKENS)
