"""An engine that decodes in a thread of its own and waits whenever somebody else is to decide.

The engine calls its policy, an environment is called by its agent: one of the two has to wait. Here
the engine waits. Its policy puts questions into one queue and takes the answers from another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import numpy as np

from offramp.controller.errors import ConfigError
from offramp.envs.live.session import Question
from offramp.worker.decoding.request import Request
from offramp.worker.engine.engine import AdaptiveEngine

CLOSE_S = 60.0
"""Seconds that a thread may take to finish the step it is at."""


class HandOver:
    """The two queues between a policy in the engine's thread and whoever decides in its place.

    Attributes:
        asked: Questions that are asked together, as the engine meets them; None at the end, an
            exception where the engine stopped.
        answers: One target for each; None gives the run up.
        is_abandoned: Whether it was given up.
    """

    def __init__(self) -> None:
        self.asked: SimpleQueue[Sequence[Question] | BaseException | None] = SimpleQueue()
        self.answers: SimpleQueue[Sequence[int] | None] = SimpleQueue()
        self.is_abandoned = False

    def ask(self, questions: Sequence[Question]) -> Sequence[int] | None:
        """Wait for the targets; None once the run is given up."""
        if not self.is_abandoned:
            self.asked.put(questions)
            targets = self.answers.get()
            if targets is not None:
                return targets
            self.is_abandoned = True
        return None


class EngineRun:
    """One request on its way, in a thread.

    Args:
        engine: The engine that decodes; nobody else uses it meanwhile.
        hand_over: The queues that the request's policy asks through.
        request: What is decoded.
        work: Steps the engine until the request is done, or ``hand_over.is_abandoned``.
    """

    def __init__(
        self,
        engine: AdaptiveEngine,
        hand_over: HandOver,
        request: Request,
        work: Callable[[], None],
    ) -> None:
        self._engine, self._hand_over, self._request = engine, hand_over, request
        self._work = work
        self._thread = threading.Thread(target=self._run, name="offramp-live", daemon=True)
        self._thread.start()

    def next(self) -> Sequence[Question] | None:
        """Wait for questions; None at the end. What stopped the engine is raised here."""
        asked = self._hand_over.asked.get()
        if isinstance(asked, BaseException):
            self._thread.join()
            self._engine.cancel(self._request.id)
            raise asked
        if asked is None:
            self._thread.join()
        return asked

    def answer(self, targets: Sequence[int]) -> None:
        """Answer the questions that ``next`` gave, one target each."""
        self._hand_over.answers.put(targets)

    def abandon(self) -> None:
        """End the thread, and the request if it is not over."""
        self._hand_over.answers.put(None)
        self._thread.join(CLOSE_S)
        assert not self._thread.is_alive()  # a step takes milliseconds
        self._engine.cancel(self._request.id)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # raised again on the other side
            self._hand_over.asked.put(error)
        else:
            self._hand_over.asked.put(None)


def draw_document(engine: AdaptiveEngine, documents: int, rng: np.random.Generator) -> int:
    """Which of some documents is next, drawn by ``rng``.

    Raises:
        ConfigError: somebody else uses the engine.
    """
    if engine.load != (0, 0):
        raise ConfigError("engine", "is busy", "Wait until its requests have ended")
    return int(rng.integers(documents))


def require_documents(
    documents: Sequence[Sequence[int]], prompt_tokens: int, least: int, behind: int
) -> None:
    """Refuse documents that are too short.

    Args:
        documents: Token ids of each.
        prompt_tokens: Tokens of each that are its prompt.
        least: Tokens that a prompt needs.
        behind: Tokens that must follow the prompt.

    Raises:
        ConfigError: too short a prompt, no document, or one with too few tokens.
    """
    if prompt_tokens < least:
        raise ConfigError("prompt_tokens", f"{prompt_tokens} is below {least}")
    shortest = min((len(document) for document in documents), default=0)
    if shortest < prompt_tokens + behind:
        raise ConfigError(
            "documents",
            f"have {shortest} tokens at the shortest, the prompt {prompt_tokens}",
            f"Give documents of {behind} tokens more than the prompt",
        )
