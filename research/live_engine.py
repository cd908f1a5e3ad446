"""A real engine as the session of ``offramp/LiveExit-v0``.

It decodes a sequence in a thread of its own (``engine_run``), under a policy that hands each
question over and waits.

Shape suffixes: N = 1 row, F feature columns, C columns of outlook, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np

from offramp.agents.onpolicy.engine_run import EngineRun, HandOver, draw_document, require_documents
from offramp.controller.errors import ConfigError
from offramp.controller.features import FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.protocols import IndexArray, NeverExit
from offramp.envs.live.session import KVMode, LiveToken, Moment, Question
from offramp.worker.decoding.request import Request
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.follow import follow


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
        require_documents(documents, prompt_tokens, least=1, behind=2)
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
        index = draw_document(self._engine, len(self._documents), rng)
        tokens, prompt = self._documents[index], self._prompt_tokens
        if index not in self._full:
            [followed], _ = follow(self._engine, [tokens], prompt, NeverExit())
            self._full[index] = followed.emitted
        policy = AskedRouter(self.exits, self.schema, self._candidates_VK, self.asks_first)
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
        self._run.answer(target)
        return self._run.next()

    def close(self) -> None:
        """Give up what is running, once its present token is done; the engine is idle then."""
        run, self._run = self._run, None
        if run is not None:
            run.abandon()


class AskedRouter:
    """A policy that asks somebody else, and waits.

    Attributes:
        exits, schema, candidates_VK: What a ``RoutingPolicy`` declares under these names.
        hand_over: Who is asked.
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
        self.hand_over = HandOver()
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
        targets = self.hand_over.ask([Question(here, features_F.copy(), outlook_C.copy())])
        return np.array([len(self.exits)] if targets is None else targets)


class _Run:
    """One sequence on its way."""

    def __init__(
        self,
        engine: AdaptiveEngine,
        policy: AskedRouter,
        request: Request,
        full: list[int],
        columns: dict[int, int],
    ) -> None:
        self._engine = engine
        self._hand_over = policy.hand_over
        self._request = request
        self._full = full
        self._columns = columns
        self._came_out: SimpleQueue[LiveToken] = SimpleQueue()
        self._run = EngineRun(engine, policy.hand_over, request, self._decode)

    def answer(self, target: int) -> None:
        """Answer the present question."""
        self._run.answer([target])

    def next(self) -> Moment:
        """Wait for a question or the end; what stopped the engine is raised here."""
        asked = self._run.next()
        tokens = []
        while not self._came_out.empty():
            tokens.append(self._came_out.get())
        return Moment(tuple(tokens), None if asked is None else asked[0])

    def abandon(self) -> None:
        """End the thread, and the request if it is not over."""
        self._run.abandon()

    def _decode(self) -> None:
        done = -1  # the prompt's own token comes first, and was nobody's decision
        while not self._hand_over.is_abandoned and done < len(self._full):
            for event in self._engine.step():
                if done >= 0:
                    following = self._request.forced[done + 1]
                    column = self._columns[event.exit_layer]
                    token = LiveToken(column, event.token, self._full[done], following)
                    self._came_out.put(token)
                done += 1
