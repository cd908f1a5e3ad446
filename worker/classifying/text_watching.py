"""Tells whoever watches a release what it does with texts, and asks full depth about some."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from offramp.controller.watching.guardrails import PolicyWatch
from offramp.controller.watching.steps import SHADOW_PROMPT, SHADOW_SHARE
from offramp.worker.classifying.classifier import Classified, Classifier
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.engine.admission import AuditPicker

log = logging.getLogger(__name__)

Answered = tuple[Sequence[int], int, int]
"""A text that was answered: its token ids, the index of its class, and the layers that it ran."""


@dataclass(slots=True, eq=False)
class AskedTexts:
    """The texts of one request: their release is told of it once all are answered.

    What a text took is the time from the request on, as whoever asked waits for it, over the number
    of its texts: two releases in the same worker wait in the same line, but not for equal batches.

    Attributes:
        watch: The release's; None: nobody watches.
        count: How many there are.
        layers: Layers that those answered so far ran.
        left: Texts that are not answered yet.
        began_s: When it came, by ``time.perf_counter``.
    """

    watch: PolicyWatch | None
    count: int
    layers: int = 0
    left: int = field(init=False)
    began_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.left = self.count

    def answer(self, layers: int) -> None:
        """Note that one of them was answered after so many layers."""
        self.left -= 1
        self.layers += layers
        if not self.left and self.watch is not None:
            seconds = time.perf_counter() - self.began_s
            self.watch.note_first(seconds)
            self.watch.tally.note_request(seconds, self.count, self.layers)


def tell_batch(
    watch: PolicyWatch | None, run: Classified, layers: int, failures: int, seconds: float
) -> None:
    """Tell whoever watches a release what became of a batch under it.

    Args:
        watch: The release's; None: nobody watches.
        run: What became of it.
        layers: Layers of the model.
        failures: Failures of the policy.
        seconds: What it took.
    """
    if watch is None:
        return
    for _ in range(failures):
        watch.note_failure()
    for each in run.layers_N.tolist():
        watch.note_token(each, layers)
    watch.note_gap(seconds, tokens=len(run.layers_N), layers=run.row_layers)


class TextAudits:
    """Audits texts as requests for tokens are audited: the first of a release, then a share.

    Full depth is read by the release's own heads; of a canary that brought others than the stable
    release has, by the stable release's: nobody knows yet what its own are worth.

    Args:
        share: Share of the texts that is audited.
    """

    def __init__(self, share: float) -> None:
        self._picker = AuditPicker(share)

    def judge(
        self,
        classifier: Classifier,
        snapshot: PolicySnapshot,
        current: PolicySnapshot,
        answered: Sequence[Answered],
    ) -> None:
        """Run those that are picked through all layers, and tell their release's watch.

        Args:
            classifier: The worker's own.
            snapshot: The release that they were answered under.
            current: The stable release.
            answered: The texts.
        """
        watch = snapshot.watch
        if watch is None:
            return
        own, stable = classifier.under(snapshot), classifier.under(current)
        brings = snapshot.rollout.is_canary and own.heads.digest != stable.heads.digest
        picked = [each for each in answered if self._picker.picks(snapshot)]
        early = [each for each in picked if brings or each[2] < classifier.stack.layers]
        if not early:
            return
        try:
            full = (stable if brings else own).run([tokens for tokens, _, _ in early])
        except Exception:  # they were answered: nothing of an audit may end the service
            log.exception("an audit of %s texts failed", len(early))
            return
        for (_, label, _), best in zip(early, full.label_N.tolist(), strict=True):
            watch.judge(label == best, snapshot.setting)


class TextShadows:
    """Classifies answered texts once more under a canary in shadow, which serves nobody.

    One at a time, of ``SHADOW_PROMPT`` tokens at most; full depth is asked about each.

    Args:
        audits: Asks it.
        share: Share of the time that this may take, in (0, 1).
    """

    def __init__(self, audits: TextAudits, share: float = SHADOW_SHARE) -> None:
        self._audits = audits
        self._share = share
        self._next_s = 0.0

    def work(self, classifier: Classifier, current: PolicySnapshot, text: Sequence[int]) -> None:
        """Repeat a text if a canary is in shadow and one is due.

        Args:
            classifier: The worker's own.
            current: The stable release, and its canary if there is one.
            text: Token ids of a text that was answered.
        """
        begun_s, canary = time.perf_counter(), current.canary
        if canary is None or not canary.rollout.is_shadow:
            return
        if begun_s < self._next_s or len(text) > SHADOW_PROMPT:
            return
        failed = classifier.guard.failures
        try:
            run = classifier.under(canary).run([text], canary.policy)
        except Exception:  # it says nothing to those who are served
            log.exception("generation %s took no shadow of a text", canary.generation)
        else:
            failures = classifier.guard.failures - failed
            asked = AskedTexts(canary.watch, 1, began_s=begun_s)
            took_s = time.perf_counter() - begun_s
            tell_batch(canary.watch, run, classifier.stack.layers, failures, took_s)
            asked.answer(run.row_layers)
            answered = [(text, int(run.label_N[0]), run.row_layers)]
            self._audits.judge(classifier, canary, current, answered)
        now_s = time.perf_counter()
        self._next_s = now_s + (now_s - begun_s) * (1 / self._share - 1)
