"""From logits to tokens: emitted at once, drafted, or confirmed by full depth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor

from offramp.controller.policies.protocols import LearningPolicy, Verdict
from offramp.worker.decoding.decoder import Outcome
from offramp.worker.decoding.guard import PolicyGuard
from offramp.worker.decoding.sampler import Draw
from offramp.worker.decoding.sequence import Draft, Sequence
from offramp.worker.decoding.verify import accepted_greedily, is_accepted, residual
from offramp.worker.model.stack import LayerStack


class Emitter:
    """Gives each row that came out of a wave its next token, or several.

    Args:
        stack: The model.
        guard: Survives policies that fail to learn.
    """

    def __init__(self, stack: LayerStack, guard: PolicyGuard) -> None:
        self.stack = stack
        self._guard = guard

    def conclude(self, outcomes: Iterable[Outcome]) -> None:
        """Emit, draft or confirm, row by row."""
        for outcome in outcomes:
            if outcome.left:
                self._teach(outcome)
            if outcome.row.request.kv_mode != "verify":
                if not outcome.decides:
                    continue
                logits_V, best = outcome.logits_MV[-1], outcome.best_M[-1]
                self.emit(outcome.row, logits_V, best, outcome.exit_layer)
            elif outcome.exit_layer < self.stack.layers:
                self._draft(outcome)
            elif outcome.row.sampler.is_plain_greedy:
                self._confirm_greedily(outcome)
            else:
                self._confirm(outcome)

    def emit(self, row: Sequence, logits_V: Tensor, best: int, exit_layer: int) -> None:
        """Add the token after a row's last one.

        Args:
            row: The row.
            logits_V: What the token is drawn from.
            best: Their argmax.
            exit_layer: Layers executed for it.
        """
        if row.sampler.is_plain_greedy:
            drawn = Draw(best)
        else:
            drawn = row.sampler.draw(logits_V, row.emitted)
        row.emit(drawn, exit_layer, self.stack.eos_tokens)

    def _teach(self, outcome: Outcome) -> None:
        """Tell a learning policy what full depth says, up to the first draft that falls."""
        row = outcome.row
        early = [draft.token for draft in row.drafts] or row.emitted[-len(outcome.left) :]
        verdicts = []
        for (index, features_F), token, best in zip(
            outcome.left, early, outcome.best_M, strict=False
        ):
            agreed = token == best
            verdicts.append(Verdict(index, features_F, agreed))
            if row.drafts and not agreed:
                break
            if not row.drafts:
                row.note_verdict(agreed)
        self._guard.teach(cast(LearningPolicy, row.policy), verdicts)

    def _draft(self, outcome: Outcome) -> None:
        row, sampler = outcome.row, outcome.row.sampler
        if sampler.is_plain_greedy:
            draft = Draft(outcome.best_M[-1], outcome.exit_layer, None)
        else:
            history = [*row.emitted, *(draft.token for draft in row.drafts)]
            chances_V = sampler.distribution(outcome.logits_MV[-1], history)
            draft = Draft(sampler.pick(chances_V), outcome.exit_layer, chances_V)
        row.drafts.append(draft)
        row.drafts_made += 1

    def _confirm_greedily(self, outcome: Outcome) -> None:
        row, best_M = outcome.row, outcome.best_M
        drafts, row.drafts = row.drafts, []
        accepted = accepted_greedily(drafts, best_M)
        row.drafts_accepted += accepted
        for _ in range(accepted):
            row.note_verdict(True)
        if accepted < len(drafts):
            row.note_verdict(False)
        for draft in drafts[:accepted]:
            self._add(row, Draw(draft.token), draft.exit_layer)
        if accepted < len(drafts) or outcome.decides:
            self._add(row, Draw(best_M[accepted]), self.stack.layers)

    def _confirm(self, outcome: Outcome) -> None:
        """Speculative sampling; of greedy decoding all chances are on one token."""
        row, sampler = outcome.row, outcome.row.sampler
        drafts, row.drafts = row.drafts, []
        for draft, logits_V in zip(drafts, outcome.logits_MV, strict=False):
            chances_V = sampler.distribution(logits_V, row.emitted)
            accepted = is_accepted(draft, chances_V, sampler.chance())
            row.note_verdict(accepted)
            if not accepted:
                token = sampler.pick(residual(draft, chances_V))
                self._add(row, sampler.report(token, logits_V), self.stack.layers)
                return
            row.drafts_accepted += 1
            self._add(row, sampler.report(draft.token, logits_V), draft.exit_layer)
        if outcome.decides and not row.is_finished:
            last = len(outcome.best_M) - 1
            self.emit(row, outcome.logits_MV[last], outcome.best_M[last], self.stack.layers)

    def _add(self, row: Sequence, drawn: Draw, exit_layer: int) -> None:
        # Drafts beyond the end of the request are of no use.
        if not row.is_finished:
            row.emit(drawn, exit_layer, self.stack.eos_tokens)
