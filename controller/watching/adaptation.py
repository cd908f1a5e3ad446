"""Moves a worker among the certified settings of its release, as audits come in.

Apparate (Dai et al. 2024, "Apparate: Rethinking Early Exits to Tame Latency-Throughput Tensions in
ML Serving", SOSP) tunes thresholds at run time by what audits say. Here the settings are those of
a signed certificate alone, so a worker never goes where nothing was bounded. What it learns of the
setting that it stands at is a confidence sequence (see ``intervals``), which may be looked at after
every token.
"""

from __future__ import annotations

from collections.abc import Sequence

from offramp.controller.watching.intervals import refutes

CONFIDENCE = 0.95
"""Probability that what is concluded from the audits since the counts began is right."""

MOST_PROOFS = 64
"""Times in a row, at most, that audits must lie below the bound before a faster setting is tried
that was left again and again."""


class SettingWalk:
    """Says at which certified setting new requests run on a worker.

    It begins at the setting that was published, the fastest, or where it stood before the worker
    was started again, and takes one step at a time. Counts
    begin anew at every step, and whenever they have shown enough, so that an old past hides no
    change. A setting that is left before it has held since it was returned to has to be earned
    twice as often the next time: so traffic that suits the safer one of two neighbours, and not
    the other, makes it go to and fro ever less.

    Args:
        settings: Those that the certificate bounds, safest first.
        bound: Share of audited early tokens that full depth may disagree with.
        begin: Setting to begin at, one of them; None: the fastest.

    Attributes:
        place: Index of the setting that new requests run at.
        moves: How often it changed.
    """

    def __init__(self, settings: Sequence[float], bound: float, begin: float | None = None) -> None:
        self.settings = tuple(settings)
        fastest = len(self.settings) - 1
        self.place = fastest if begin is None else self.settings.index(begin)
        self.moves = 0
        self._bound = bound
        self._seen = self._disagreed = 0
        self._proofs = 0
        self._needed = [1] * len(self.settings)  # proofs below it before a setting is tried
        self._is_trial = False

    @property
    def setting(self) -> float:
        """The setting that new requests run at."""
        return self.settings[self.place]

    def tell(self, agreed: bool) -> bool:
        """Take an audit of a token that left at the present setting; True if that changes."""
        self._seen += 1
        self._disagreed += not agreed
        is_above = self._disagreed > self._bound * self._seen
        if not refutes(self._disagreed, self._seen, self._bound, CONFIDENCE):
            return False
        self._seen = self._disagreed = 0
        return self._step_back() if is_above else self._step_on()

    def _step_back(self) -> bool:
        if self._is_trial:
            self._needed[self.place] = min(2 * self._needed[self.place], MOST_PROOFS)
        self._proofs, self._is_trial = 0, False
        return self._move(-1)

    def _step_on(self) -> bool:
        if self._is_trial:  # it held
            self._needed[self.place], self._is_trial = 1, False
        if self.place == len(self.settings) - 1:
            return False
        self._proofs += 1
        if self._proofs < self._needed[self.place + 1]:
            return False
        self._proofs, self._is_trial = 0, True
        return self._move(+1)

    def _move(self, step: int) -> bool:
        place = self.place + step
        if not 0 <= place < len(self.settings):
            return False
        self.place = place
        self.moves += 1
        return True
