"""Policies that draft in the lossless mode (``verify``): static, confident, adaptive, learned.

All route: ``start`` says at which exit a token is asked first, or that it runs all layers now and
so verifies the open drafts; ``route`` leaves with a draft, goes deeper, or verifies. None changes
what is emitted: that is full depth's in every case.
"""

from offramp.controller.policies.drafts.confident import ConfidentDraft
from offramp.controller.policies.drafts.del_rule import DelDraft
from offramp.controller.policies.drafts.draft_router import DraftRouter
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.drafts.thompson import ThompsonDraft
from offramp.controller.policies.drafts.trusted_draft import TrustedDraft

__all__ = [
    "ConfidentDraft",
    "DelDraft",
    "DraftRouter",
    "StaticDraft",
    "ThompsonDraft",
    "TrustedDraft",
    "is_drafter",
]


def is_drafter(policy: object) -> bool:
    """Whether a policy is made for ``verify`` alone: elsewhere its drafts would be emitted."""
    return isinstance(
        policy, ConfidentDraft | DelDraft | DraftRouter | StaticDraft | ThompsonDraft | TrustedDraft
    )
