"""Asks full depth about some of the texts that left early, once they are answered."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from offramp.worker.classifying.classifier import Classifier
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.engine.admission import AuditPicker

log = logging.getLogger(__name__)

Answered = tuple[Sequence[int], int, int]
"""A text that was answered: its token ids, the index of its class, and the layers that it ran."""


class TextAudits:
    """Audits texts as requests for tokens are audited: the first of a release, then a share.

    Args:
        classifier: Runs them again.
        share: Share of the texts that is audited.
    """

    def __init__(self, classifier: Classifier, share: float) -> None:
        self._classifier = classifier
        self._picker = AuditPicker(share)

    def judge(self, snapshot: PolicySnapshot, answered: Sequence[Answered]) -> None:
        """Run those that are picked through all layers, and tell their release's watch."""
        watch = snapshot.watch
        if watch is None:
            return
        picked = [each for each in answered if self._picker.picks(snapshot)]
        early = [each for each in picked if each[2] < self._classifier.stack.layers]
        if not early:
            return
        try:
            full = self._classifier.run([tokens for tokens, _, _ in early])
        except Exception:  # they were answered: nothing of an audit may end the service
            log.exception("an audit of %s texts failed", len(early))
            return
        for (_, label, _), best in zip(early, full.label_N.tolist(), strict=True):
            watch.judge(label == best, snapshot.setting)
