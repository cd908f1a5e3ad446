"""A real engine as the session of ``offramp/LiveExit-v0``.

The engine calls its policy, an environment is called by its agent: one of the two has to wait. Here
the engine waits. It decodes a sequence in a thread of its own, under a policy that puts each
question into one queue and takes the answer from another.

Shape suffixes: N = 1 row, F feature columns, C columns of outlook, V vocabulary, K candidates.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np

from offramp.controller.errors import ConfigError
from offramp.controller.features import FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.protocols import IndexArray, NeverExit
from offramp.envs.live.session import KVMode, LiveToken, Moment, Question
from offramp.worker.decoding.request import Request
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.follow import follow

CLOSE_S = 60.0
"""Seconds that a thread may take to finish the token it is at."""


class EngineSession:
    """Decodes documents, teacher-forced, and hands every decision over.

    Only one session at a time may use an engine, and nobody else meanwhile.

    Args:
        engine: The engine that decodes, idle.
        documents: Token ids, each longer than ``prompt_tokens`` + 1; an episode is one of them.
        prompt_tokens: Tokens of each that are read at full depth first.
        exits: Layers after which to ask.
        schema: The features to ask with.
        candidates_VK: For the candidate probe: its table.
        kv_mode: What becomes of skipped layers.
        asks_first: Whether to ask before the first layer, too.

    Raises:
        ConfigError: no document, or one that is too short.
        RequestError: at ``begin``, if exits, schema or table do not fit the model.
    """

    def __init__(
        self,
        engine: AdaptiveEngine,
        documents: Sequence[Sequence[int]],
        *,
        prompt_tokens: int,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        candidates_VK: IntArray | None = None,
        kv_mode: KVMode = "project",
        asks_first: bool = False,
    ) -> None:
        _check_documents(documents, prompt_tokens)
        self.exits = exits
        self.schema = schema
        self.kv_mode: KVMode = kv_mode
        self.asks_first = asks_first
        self.layers = engine.stack.layers
        self.model = engine.model_fingerprint
        self.max_pending = engine.config.max_pending
        layers = engine.decoder.translators.layers
        self.adapters = tuple(layer for layer in exits if layer in layers)
        self._engine = engine
        self._documents = [list(document) for document in documents]
        self._prompt_tokens = prompt_tokens
        self._candidates_VK = candidates_VK
        self._full: dict[int, list[int]] = {}
        self._run: _Run | None = None

    def begin(self, rng: np.random.Generator) -> Moment:
        """Give up what is running, and start a document drawn by ``rng``.

        Raises:
            ConfigError: somebody else uses the engine.
            RequestError: the engine refuses the exits, the schema or the table.
        """
        self.close()
        if self._engine.load != (0, 0):
            raise ConfigError("engine", "is busy", "Wait until its requests have ended")
        index = int(rng.integers(len(self._documents)))
        tokens, prompt = self._documents[index], self._prompt_tokens
        if index not in self._full:
            [followed], _ = follow(self._engine, [tokens], prompt, NeverExit())
            self._full[index] = followed.emitted
        policy = HandOver(self.exits, self.schema, self._candidates_VK, self.asks_first)
        request = self._engine.submit(
            tokens[:prompt], policy=policy, kv_mode=self.kv_mode, forced=tokens[prompt:]
        )
        columns = {layer: column for column, layer in enumerate((*self.exits, self.layers))}
        self._run = _Run(self._engine, policy, request, self._full[index], columns)
        return self._run.next()

    def answer(self, target: int) -> Moment:
        """Answer the present question, and run to the next.

        Raises:
            ConfigError: nothing waits for an answer.
            Exception: whatever stopped the engine.
        """
        if self._run is None:
            raise ConfigError("session", "waits for no answer", "Begin a sequence first")
        self._run.policy.answers.put(target)
        return self._run.next()

    def close(self) -> None:
        """Give up what is running, once its present token is done; the engine is idle then."""
        run, self._run = self._run, None
        if run is not None:
            run.abandon()


class HandOver:
    """A policy that asks somebody else, and waits.

    Attributes:
        exits, schema, candidates_VK: What a ``RoutingPolicy`` declares under these names.
        asked: Questions, as the engine meets them.
        answers: Targets; None gives the sequence up.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        candidates_VK: IntArray | None,
        asks_first: bool,
    ) -> None:
        self.exits = exits
        self.schema = schema
        self.candidates_VK = candidates_VK
        self.asked: SimpleQueue[Question | BaseException | None] = SimpleQueue()
        self.answers: SimpleQueue[int | None] = SimpleQueue()
        self.is_abandoned = False
        self._asks_first = asks_first

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """The first exit, or what the other side says."""
        if not self._asks_first:
            return np.zeros(1, np.int64)
        return self._ask(-1, np.zeros(self.schema.width, np.float32), outlook_NC[0])

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """What the other side says."""
        return self._ask(here, features_NF[0], outlook_NC[0])

    def _ask(self, here: int, features_F: FloatArray, outlook_C: FloatArray) -> IndexArray:
        if not self.is_abandoned:
            self.asked.put(Question(here, features_F.copy(), outlook_C.copy()))
            target = self.answers.get()
            if target is not None:
                return np.array([target])
            self.is_abandoned = True
        return np.array([len(self.exits)])


class _Run:
    """One sequence on its way, in a thread."""

    def __init__(
        self,
        engine: AdaptiveEngine,
        policy: HandOver,
        request: Request,
        full: list[int],
        columns: dict[int, int],
    ) -> None:
        self.policy = policy
        self._engine = engine
        self._request = request
        self._full = full
        self._columns = columns
        self._came_out: SimpleQueue[LiveToken] = SimpleQueue()
        self._thread = threading.Thread(target=self._decode, name="offramp-live", daemon=True)
        self._thread.start()

    def next(self) -> Moment:
        """Wait for a question or the end; what stopped the engine is raised here."""
        asked = self.policy.asked.get()
        if isinstance(asked, BaseException):
            self._thread.join()
            self._engine.cancel(self._request.id)
            raise asked
        tokens = []
        while not self._came_out.empty():
            tokens.append(self._came_out.get())
        if asked is None:
            self._thread.join()
        return Moment(tuple(tokens), asked)

    def abandon(self) -> None:
        """End the thread, and the request if it is not over."""
        self.policy.answers.put(None)
        self._thread.join(CLOSE_S)
        assert not self._thread.is_alive()  # a token takes milliseconds
        self._engine.cancel(self._request.id)

    def _decode(self) -> None:
        try:
            self._decode_all()
        except BaseException as error:  # raised again on the other side
            self.policy.asked.put(error)
        else:
            self.policy.asked.put(None)

    def _decode_all(self) -> None:
        done = -1  # the prompt's own token comes first, and was nobody's decision
        while not self.policy.is_abandoned and done < len(self._full):
            for event in self._engine.step():
                if done >= 0:
                    following = self._request.forced[done + 1]
                    column = self._columns[event.exit_layer]
                    token = LiveToken(column, event.token, self._full[done], following)
                    self._came_out.put(token)
                done += 1


def _check_documents(documents: Sequence[Sequence[int]], prompt_tokens: int) -> None:
    if prompt_tokens < 1:
        raise ConfigError("prompt_tokens", f"{prompt_tokens} is below 1")
    shortest = min((len(document) for document in documents), default=0)
    if shortest < prompt_tokens + 2:
        raise ConfigError(
            "documents",
            f"have {shortest} tokens at the shortest, the prompt {prompt_tokens}",
            "Give documents of two tokens more than the prompt",
        )
