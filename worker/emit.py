"""From logits to tokens: emitted at once, drafted, or confirmed by full depth."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from offramp.worker.decode import Outcome
from offramp.worker.sampling import distribution, pick
from offramp.worker.sequence import Draft, Sequence
from offramp.worker.stack import LayerStack
from offramp.worker.verify import accepted_greedily, is_accepted, residual


class Emitter:
    """Gives each row that came out of a wave its next token, or several.

    Args:
        stack: The model.
    """

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack

    def emit(self, row: Sequence, token: int, exit_layer: int) -> None:
        """Add a token to a row's output."""
        row.emit(token, exit_layer, self.stack.eos_tokens)

    def conclude(self, outcomes: Iterable[Outcome]) -> None:
        """Emit, draft or confirm, row by row."""
        for outcome in outcomes:
            if outcome.row.request.kv_mode == "verify":
                self._verify(outcome)
            else:
                token = self.choose(outcome.row, outcome.logits_MV[-1], outcome.best_M[-1])
                self.emit(outcome.row, token, outcome.exit_layer)

    def choose(self, row: Sequence, logits_V: Tensor, best: int) -> int:
        """The token after a row's last one, drawn as its request asks."""
        if row.generator is None:
            return best
        return pick(distribution(logits_V, row.request.sampling), row.generator)

    def _verify(self, outcome: Outcome) -> None:
        if outcome.exit_layer < self.stack.layers:
            self._draft(outcome)
        elif outcome.row.generator is None:
            self._confirm_greedily(outcome)
        else:
            self._confirm_sampled(outcome)

    def _draft(self, outcome: Outcome) -> None:
        row = outcome.row
        if row.generator is None:
            draft = Draft(outcome.best_M[-1], outcome.exit_layer, None)
        else:
            chances_V = distribution(outcome.logits_MV[-1], row.request.sampling)
            draft = Draft(pick(chances_V, row.generator), outcome.exit_layer, chances_V)
        row.drafts.append(draft)
        row.drafts_made += 1

    def _confirm_greedily(self, outcome: Outcome) -> None:
        row, best_M = outcome.row, outcome.best_M
        drafts, row.drafts = row.drafts, []
        accepted = accepted_greedily(drafts, best_M)
        for draft in drafts[:accepted]:
            self._confirm(row, draft)
        if accepted < len(drafts) or outcome.decides:
            self._add(row, best_M[accepted])

    def _confirm_sampled(self, outcome: Outcome) -> None:
        row, sampling, generator = outcome.row, outcome.row.request.sampling, outcome.row.generator
        assert generator is not None
        drafts, row.drafts = row.drafts, []
        for draft, logits_V in zip(drafts, outcome.logits_MV, strict=False):
            chances_V = distribution(logits_V, sampling)
            if not is_accepted(draft, chances_V, generator):
                self._add(row, pick(residual(draft, chances_V), generator))
                return
            self._confirm(row, draft)
        if outcome.decides:
            self._add(row, pick(distribution(outcome.logits_MV[-1], sampling), generator))

    def _confirm(self, row: Sequence, draft: Draft) -> None:
        row.drafts_accepted += 1
        if not row.is_finished:
            self.emit(row, draft.token, draft.exit_layer)

    def _add(self, row: Sequence, token: int) -> None:
        if not row.is_finished:
            self.emit(row, token, self.stack.layers)
