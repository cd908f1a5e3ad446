"""What a running pool is told by signals: to stop, or to replace its workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

REDEPLOY = signal.SIGUSR1
"""Has all workers replaced by new ones."""


def catch_signals() -> Callable[[], int]:
    """Catch signals from here on; the function it returns waits for the next, and says which."""
    # A byte in a pipe cannot be missed and raises nothing: a signal that comes before the wait
    # ends it at once, and a second one does not interrupt the cleaning up.
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM, REDEPLOY):
        signal.signal(number, lambda *_: None)
    return lambda: os.read(told, 1)[0]
