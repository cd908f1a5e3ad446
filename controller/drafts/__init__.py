"""Drafting policies for the lossless mode (``verify``): static, confident, adaptive, learned.

All route: ``start`` says at which exit a token is asked first, or that it runs all layers now and
so verifies the open drafts; ``route`` leaves with a draft, goes deeper, or verifies. None changes
what is emitted: that is full depth's in every case.
"""

from offramp.controller.drafts.confident import ConfidentDraft
from offramp.controller.drafts.del_rule import DelDraft
from offramp.controller.drafts.router import DraftRouter
from offramp.controller.drafts.static import StaticDraft
from offramp.controller.drafts.thompson import ThompsonDraft

__all__ = ["ConfidentDraft", "DelDraft", "DraftRouter", "StaticDraft", "ThompsonDraft"]
