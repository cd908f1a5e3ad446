"""Waiting texts are classified in batches, by a thread of its own, for coroutines that wait.

A batch is the text that has waited longest and those behind it under the same policy. Its rows
leave as they are decided, and the next batch begins when the last of them has left.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from offramp.controller.costs.readings import EnergyReading
from offramp.controller.errors import DecodeFailedError, OverloadedError, RequestError
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.worker.classifying.best_of import BestOf
from offramp.worker.classifying.classified_text import ClassifiedText, classified_text, shares_of
from offramp.worker.classifying.classifier import FULL_DEPTH, Classifier
from offramp.worker.classifying.sequence_stack import require_sequences
from offramp.worker.classifying.text_watching import AskedTexts, TextAudits, TextShadows, tell_batch
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.energy.meter import EnergySource
from offramp.worker.energy.step_meter import (
    MOST_FIRST,
    Did,
    StepMeter,
    TrackBatches,
    serving_source,
)
from offramp.worker.engine.service import RETRY_AFTER_S, STOPPED, STUCK_AFTER_S

CLASSIFY = "classify"
"""The mode that certificates of classifications name."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A text in line, the request that it is part of, and who waits for it."""

    tokens: Sequence[int]
    asked: AskedTexts
    snapshot: PolicySnapshot
    policy: Policy
    race: BestOf | None = None
    done: Future[ClassifiedText] = field(default_factory=Future)

    @property
    def under(self) -> tuple[int, int]:
        """What texts of one batch have in common."""
        return self.snapshot.generation, id(self.race or self.policy)


class TextService:
    """Runs a classifier in its own thread.

    Args:
        classifier: Used by this service's thread only, from ``start`` on.
        current_policy: Gives the release that new texts are pinned to.
        rows: Texts of a batch at most.
        max_waiting: Texts that may wait beside them; more are refused.
        dtype: Number format of the weights, as certificates name it.
        audit_share: Share of the texts under a watched release that full depth is asked about, too,
            if they left early, once they are answered.
        source: Says what a batch took; by default the device's counter, or busy cores.

    Attributes:
        classified: Texts classified so far.
        meter: Energy of the batches so far.
    """

    def __init__(
        self,
        classifier: Classifier,
        current_policy: Callable[[], PolicySnapshot],
        *,
        rows: int = 8,
        max_waiting: int = 64,
        dtype: str = "float32",
        audit_share: float = 0.0,
        source: EnergySource | None = None,
    ) -> None:
        self.classifier = classifier
        self.classified = 0
        self._current = current_policy
        self._rows, self._most = rows, rows + max_waiting
        self._dtype = dtype
        self._audits = TextAudits(audit_share)
        self._shadows = TextShadows(self._audits)
        self.meter = StepMeter(source or serving_source(classifier.stack.device))
        self._tracks = TrackBatches()
        self._line: deque[_Waiting] = deque()
        self._running = 0
        self._ends = False
        self._changed = threading.Condition()
        self._last_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="offramp-classifier", daemon=True)

    def start(self) -> None:
        """Start the thread that classifies."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the batch under way; texts in line end with an error."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """Texts that run, and texts that wait."""
        return self._running, len(self._line)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives and, if it has work, makes progress."""
        recent = time.monotonic() - self._last_s < STUCK_AFTER_S
        return self._thread.is_alive() and (self.load == (0, 0) or recent)

    def gap(self, snapshot: PolicySnapshot) -> str:
        """Why a release's certificate says nothing of this service; "" if it does or is none."""
        certificate = snapshot.certificate
        if certificate is None:
            return ""
        heads = self.classifier.under(snapshot).heads.digest
        return certificate.gap(kv_mode=CLASSIFY, dtype=self._dtype, translators=heads)

    def policy_for(self, snapshot: PolicySnapshot, quality: float | None) -> Policy:
        """The release's policy where its certificate bounds the loss at 1 − quality, or none is
        asked for; else full depth.

        Raises:
            RequestError: a quality outside [0, 1].
        """
        if quality is None:
            return snapshot.policy
        if not 0 <= quality <= 1:
            raise RequestError("quality", f"{quality} is not in [0, 1]", "Ask for 1 for full depth")
        certificate = snapshot.certificate
        if certificate is None or self.gap(snapshot) or certificate.delta + quality > 1 + 1e-9:
            return FULL_DEPTH
        return snapshot.policy

    async def classify(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        quality: float | None = None,
        split_by: str = "",
        best: int | None = None,
    ) -> list[ClassifiedText]:
        """Classify texts, all of them under the release that is current when they come.

        Or find the best of them: they run together, whatever their number, and under no policy.

        Cancelling it takes those out of line that no batch has begun.

        Args:
            sequences: Token ids of each, at least one and no more than the context.
            quality: See ``policy_for``.
            split_by: Decides between the current policy and its canary.
            best: Class of which the likeliest text is sought; None classifies all of them.

        Raises:
            RequestError: a text cannot be classified, a quality that is none, or heads that
                bound no score where the best is sought.
            OverloadedError: there is no room for all of them.
            DecodeFailedError: the service has stopped, or a batch failed.
        """
        ordered = self.order(sequences, quality=quality, split_by=split_by, best=best)
        return list(await asyncio.gather(*map(asyncio.wrap_future, ordered)))

    def order(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        quality: float | None = None,
        split_by: str = "",
        best: int | None = None,
    ) -> list[Future[ClassifiedText]]:
        """Put texts in line as ``classify`` does, from any thread; cancel them to take them out."""
        require_sequences(sequences, self.classifier.stack)
        snapshot = self._current().track(split_by)
        policy = self.policy_for(snapshot, quality)
        race = None if best is None else BestOf(self.classifier.under(snapshot), best)
        # A race runs under no policy, so it says nothing of one.
        asked = AskedTexts(None if race else snapshot.watch, len(sequences))
        mine = [_Waiting(tokens, asked, snapshot, policy, race) for tokens in sequences]
        with self._changed:
            if self._ends:
                raise DecodeFailedError(STOPPED)
            if self._running + len(self._line) + len(mine) > self._most:
                raise OverloadedError(RETRY_AFTER_S)
            if self.load == (0, 0):
                self._last_s = time.monotonic()
            self._line.extend(mine)
            self._changed.notify()
        return [each.done for each in mine]

    def _run(self) -> None:
        while batch := self._next_batch():
            found: list[ClassifiedText] | DecodeFailedError
            try:
                found = self._classify(batch)
            except Exception as error:
                log.exception("a batch of %s texts failed", len(batch))
                found = DecodeFailedError(f"the texts could not be classified: {error}")
            self._last_s = time.monotonic()
            self._running = 0  # before anybody is told, who may ask for more at once
            if isinstance(found, DecodeFailedError):
                for each in batch:
                    each.done.set_exception(found)
                continue
            for each, said in zip(batch, found, strict=True):
                each.asked.answer(said.layers)
                each.done.set_result(said)
            if batch[0].race is None:
                self._look_after(batch, found)
        for each in self._line:
            each.done.set_exception(DecodeFailedError(STOPPED))

    def _next_batch(self) -> list[_Waiting]:
        """The texts that run next, once there are some; none once the service ends."""
        with self._changed:
            while not self._ends:
                batch: list[_Waiting] = []
                stay: deque[_Waiting] = deque()
                for each in self._line:
                    has_room = len(batch) < self._rows or each.race is not None
                    fits = has_room and (not batch or each.under == batch[0].under)
                    if not fits:
                        stay.append(each)
                    elif each.done.set_running_or_notify_cancel():
                        batch.append(each)
                self._line = stay
                if batch:
                    self._running = len(batch)
                    return batch
                self._changed.wait()
        return []

    def _classify(self, batch: Sequence[_Waiting]) -> list[ClassifiedText]:
        first, classifier = batch[0], self.classifier.under(batch[0].snapshot)
        race, sequences = first.race, [each.tokens for each in batch]
        labels = classifier.heads.labels
        # At full depth a release says something only if the heads are its own.
        own = 0 if first.snapshot.adapters is None else first.snapshot.generation
        if race is not None:
            (best, run), reading = self._metered(lambda: race.run(sequences), len(batch))
            self.classified += len(batch)
            shares = shares_of(run, reading)
            return [
                classified_text(run, row, labels, shares[row], own, is_best=row == best)
                for row in range(len(batch))
            ]
        failed, begun_s = classifier.guard.failures, time.perf_counter()
        watch = first.snapshot.watch
        policy = FULL_DEPTH if watch is not None and watch.tripped else first.policy
        run, reading = self._metered(lambda: classifier.run(sequences, policy), len(batch))
        self.classified += len(batch)
        failures, took_s = classifier.guard.failures - failed, time.perf_counter() - begun_s
        tell_batch(watch, run, classifier.stack.layers, failures, took_s)
        if watch is not None and reading is not None and reading.joules is not None:
            self._tracks.note(watch.tally, reading, reading.joules, len(batch))
        generation = own if isinstance(policy, NeverExit) else first.snapshot.generation
        shares = shares_of(run, reading)
        return [
            classified_text(run, row, labels, shares[row], generation) for row in range(len(batch))
        ]

    def _metered(self, step: Callable[[], Did], texts: int) -> tuple[Did, EnergyReading | None]:
        if not self.meter.is_due(MOST_FIRST):
            return self.meter.pass_by(step), None
        return self.meter.run(step, lambda _: texts)

    def _look_after(self, batch: Sequence[_Waiting], found: Sequence[ClassifiedText]) -> None:
        """Do with a batch what nobody waits for."""
        snapshot = batch[0].snapshot
        answered = [
            (each.tokens, said.label, said.layers) for each, said in zip(batch, found, strict=True)
        ]
        current = self._current()
        self._audits.judge(self.classifier, snapshot, current, answered)
        if not self._line:
            self._shadows.work(self.classifier, current, batch[0].tokens)
