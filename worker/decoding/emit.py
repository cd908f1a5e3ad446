"""From logits to tokens: emitted at once, drafted, or confirmed by full depth."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import cast

from torch import Tensor

from offramp.controller.policies.protocols import LearningPolicy, Verdict
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.decoder import RowResult
from offramp.worker.decoding.sampler import Draft, Draw
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.model.stack import LayerStack


def accepted_greedily(drafts: Rows[Draft], full_tokens: Rows[int]) -> int:
    """How many drafts full depth would have emitted, up to the first that it would not."""
    for count, (draft, token) in enumerate(zip(drafts, full_tokens, strict=False)):
        if draft.token != token:
            return count
    return len(drafts)


class Emitter:
    """Gives each row that came out of a wave its next token, or several.

    Args:
        stack: The model, as a stack of layers.
        guard: Survives policies that fail to learn.
    """

    def __init__(self, stack: LayerStack, guard: PolicyGuard) -> None:
        self.stack = stack
        self._guard = guard

    def conclude(self, results: Iterable[RowResult]) -> None:
        """Emit, draft or confirm, row by row; a row that cannot fails alone."""
        for result in results:
            try:
                self._conclude(result)
            except Exception as error:  # samplers are a caller's code, too
                result.row.error = error

    def _conclude(self, result: RowResult) -> None:
        if result.left and not result.row.drafts:
            self._teach(result)
        if result.row.request.kv_mode != "verify":
            if result.decides:
                logits_V, best = result.logits_MV[-1], result.best_M[-1]
                self.emit(result.row, logits_V, best, result.exit_layer)
        elif result.drafted:
            self._draft(result)
        elif result.row.sampler.is_plain_greedy:
            self._confirm_greedily(result)
        else:
            self._confirm(result)

    def emit(self, row: Sequence, logits_V: Tensor, best: int, exit_layer: int) -> None:
        """Add the token after a row's last one.

        Args:
            row: Row whose prompt was read.
            logits_V: What the token is drawn from.
            best: Most likely token by the logits.
            exit_layer: Layers executed for it.
        """
        if row.request.audited:
            row.proposed.append(best)
        if row.sampler.is_plain_greedy:
            drawn = Draw(best)
        else:
            drawn = row.sampler.draw(logits_V, row.emitted)
        row.emit(drawn, exit_layer, self.stack.eos_tokens)

    def _teach(self, result: RowResult) -> None:
        """Tell row and learning policy what full depth says of tokens that were emitted early."""
        row = result.row
        proposed = row.proposed if row.request.audited else row.emitted
        early = proposed[-len(result.left) :]
        verdicts = []
        for (index, features_F), token, best in zip(
            result.left, early, result.best_M, strict=False
        ):
            agreed = token == best
            verdicts.append(Verdict(index, features_F, agreed))
            row.note_verdict(agreed)
        self._tell(row, verdicts)

    def _judge(self, result: RowResult, drafts: Rows[Draft], accepted: int) -> None:
        """Tell row and learning policy which drafts are kept, up to the first that is not."""
        result.row.note_cycle(drafts, accepted, self.stack.layers)
        judged = result.left[: min(accepted + 1, len(drafts))]
        self._tell(
            result.row, [Verdict(*each, number < accepted) for number, each in enumerate(judged)]
        )

    def _tell(self, row: Sequence, verdicts: list[Verdict]) -> None:
        if row.learns and verdicts:
            self._guard.teach(cast(LearningPolicy, row.policy), verdicts)

    def _draft(self, result: RowResult) -> None:
        row, sampler = result.row, result.row.sampler
        if sampler.is_plain_greedy or not len(result.logits_MV):  # or the probe has drawn it
            token = result.best_M[-1]
        else:
            history = [*row.emitted, *(draft.token for draft in row.drafts)]
            token = sampler.draft(result.logits_MV[-1], history)
        row.drafts.append(Draft(token, result.exit_layer))
        row.drafts_made += 1

    def _confirm_greedily(self, result: RowResult) -> None:
        row, best_M = result.row, result.best_M
        drafts, row.drafts = row.drafts, []
        accepted = accepted_greedily(drafts, best_M)
        self._judge(result, drafts, accepted)
        for _ in range(accepted):
            row.note_verdict(True)
        if accepted < len(drafts):
            row.note_verdict(False)
        for draft in drafts[:accepted]:
            self._add(row, Draw(draft.token), draft.exit_layer)
        if accepted < len(drafts) or result.decides:
            self._add(row, Draw(best_M[accepted]), self.stack.layers)

    def _confirm(self, result: RowResult) -> None:
        """Full depth draws as it would have without drafts; those that are its draws are kept."""
        row, sampler = result.row, result.row.sampler
        drafts, row.drafts = row.drafts, []
        accepted = 0
        for draft, logits_V in zip(drafts, result.logits_MV, strict=False):
            drawn = sampler.draw(logits_V, row.emitted)
            agreed = drawn.token == draft.token
            row.note_verdict(agreed)
            if not agreed:
                self._judge(result, drafts, accepted)
                self._add(row, drawn, self.stack.layers)
                return
            accepted += 1
            self._add(row, drawn, draft.exit_layer)
        self._judge(result, drafts, accepted)
        if result.decides and not row.is_finished:
            last = len(result.best_M) - 1
            self.emit(row, result.logits_MV[last], result.best_M[last], self.stack.layers)

    def _add(self, row: Sequence, drawn: Draw, exit_layer: int) -> None:
        # Drafts beyond the end of the request are of no use.
        if not row.is_finished:
            row.emit(drawn, exit_layer, self.stack.eos_tokens)
