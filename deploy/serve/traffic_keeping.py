"""Has a worker keep traces of its live traffic: recorder and folder, put together."""

from __future__ import annotations

from offramp.envs.traces.traffic_folder import TrafficFolder
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.recording.live_recorder import TrafficRecorder
from offramp.worker.spec import TrafficConfig


class KeptTraffic:
    """What one worker keeps.

    Args:
        engine: The engine that serves.
        config: What is kept.
        worker: The worker's name, and its folder's.
    """

    def __init__(self, engine: AdaptiveEngine, config: TrafficConfig, worker: str) -> None:
        self._folder = TrafficFolder(config.folder / worker, config.most_mb)
        self._recorder = TrafficRecorder(engine, self._folder.keep, config)

    def work(self) -> None:
        """Record what is due; called between two steps, by the thread that decodes."""
        self._recorder.work()

    def close(self) -> None:
        """Have written what was recorded."""
        self._folder.close()

    def counts(self) -> dict[str, int]:
        """Tokens recorded, requests passed over, and chunks kept, dropped and lost."""
        return {
            "recorded_tokens": self._recorder.recorded,
            "passed_over": self._recorder.passed_over,
            "kept": self._folder.kept,
            "dropped": self._folder.dropped,
            "lost": self._folder.lost,
        }
