"""Tells whoever watches a release what it does with texts, and asks full depth about some."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from offramp.controller.release.manifest import SHADOW_SHARE
from offramp.controller.watching.guardrails import PolicyWatch
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

    Args:
        share: Share of the texts that is audited.
    """

    def __init__(self, share: float) -> None:
        self._picker = AuditPicker(share)

    def judge(
        self, classifier: Classifier, snapshot: PolicySnapshot, answered: Sequence[Answered]
    ) -> None:
        """Run those that are picked through all layers, and tell their release's watch."""
        watch = snapshot.watch
        if watch is None:
            return
        picked = [each for each in answered if self._picker.picks(snapshot)]
        early = [each for each in picked if each[2] < classifier.stack.layers]
        if not early:
            return
        try:
            full = classifier.run([tokens for tokens, _, _ in early])
        except Exception:  # they were answered: nothing of an audit may end the service
            log.exception("an audit of %s texts failed", len(early))
            return
        for (_, label, _), best in zip(early, full.label_N.tolist(), strict=True):
            watch.judge(label == best, snapshot.setting)


class TextShadows:
    """Classifies answered texts once more under a canary in shadow, which serves nobody.

    One at a time; full depth is asked about each that leaves early.

    Args:
        audits: Asks it.
        share: Share of the time that this may take, in (0, 1).
    """

    def __init__(self, audits: TextAudits, share: float = SHADOW_SHARE) -> None:
        self._audits = audits
        self._share = share
        self._next_s = 0.0

    def work(
        self, classifier: Classifier, canary: PolicySnapshot | None, text: Sequence[int]
    ) -> None:
        """Repeat a text if a canary is in shadow and one is due.

        Args:
            classifier: The worker's own.
            canary: The one beside the current release, if there is one.
            text: Token ids of a text that was answered.
        """
        begun_s = time.perf_counter()
        if canary is None or not canary.rollout.is_shadow or begun_s < self._next_s:
            return
        classifier = classifier.under(canary)
        failed = classifier.guard.failures
        try:
            run = classifier.run([text], canary.policy)
        except Exception:  # it says nothing to those who are served
            log.exception("generation %s took no shadow of a text", canary.generation)
        else:
            failures = classifier.guard.failures - failed
            asked = AskedTexts(canary.watch, 1, began_s=begun_s)
            took_s = time.perf_counter() - begun_s
            tell_batch(canary.watch, run, classifier.stack.layers, failures, took_s)
            asked.answer(run.row_layers)
            self._audits.judge(classifier, canary, [(text, int(run.label_N[0]), run.row_layers)])
        now_s = time.perf_counter()
        self._next_s = now_s + (now_s - begun_s) * (1 / self._share - 1)
