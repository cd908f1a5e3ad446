"""A real engine as the session of ``offramp/PrefillExit-v0``: it reads prompts, asking who leaves.

The engine computes the features of a chunk's tokens together, and none depends on the others'
answers, so a chunk's questions are handed over at once (``engine_run``) and asked one by one.

Shape suffixes: N tokens of a chunk, F feature columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from offramp.agents.onpolicy.engine_run import EngineRun, HandOver, draw_document, require_documents
from offramp.controller.errors import ConfigError, PolicyFaultError
from offramp.controller.features import PROMPT_V1, BoolArray, FloatArray
from offramp.envs.live.session import Moment, Question, ReadPrompt
from offramp.worker.decoding.prompting.prompt_exits import Prefill, PromptExits
from offramp.worker.decoding.request import Request
from offramp.worker.decoding.sequence import Sequence as Row
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.follow import nats_per_token, submit_scored

PLACE, DEPTH = PROMPT_V1.index("place"), PROMPT_V1.index("depth")
SCALE = 256
"""Tokens that PROMPT_V1 counts as 1."""

NO_OUTLOOK: FloatArray = np.zeros(0, np.float32)


class PromptReadingSession:
    """Reads the beginnings of documents, hands every decision over, and scores what follows.

    Sessions on the same model share its weights; each has an engine, and a cache, of its own.

    Args:
        model: A Hugging Face causal LM.
        documents: Token ids, each at least ``prompt_tokens`` + ``following`` long.
        prompt_tokens: Tokens of each that are the prompt.
        following: Tokens after the prompt whose loss is measured.
        exits: Layers after which to ask.
        keep_first, keep_last: Tokens that nobody is asked about; see ``PromptExits``.
        config: How the engine reads and decodes, but for its policy for prompts.

    Raises:
        ConfigError: no document or one that is too short, nothing to score, a prompt of which every
            token is kept, exits that the model does not have, or numbers of kept tokens that
            ``PromptExits`` refuses.
    """

    schema = PROMPT_V1

    def __init__(
        self,
        model: Any,
        documents: Sequence[Sequence[int]],
        *,
        prompt_tokens: int,
        following: int,
        exits: tuple[int, ...],
        keep_first: int = 4,
        keep_last: int = 32,
        config: EngineConfig | None = None,
    ) -> None:
        self._policy = AskedReader(exits)
        prompts = PromptExits(policy=self._policy, keep_first=keep_first, keep_last=keep_last)
        if following < 1:
            raise ConfigError("following", f"{following} is below 1", "Score some tokens")
        require_documents(documents, prompt_tokens, keep_first + keep_last + 1, following)
        config = replace(config or EngineConfig(), prefill="exits", prompts=prompts)
        self._engine = AdaptiveEngine(model, slots=1, config=config)
        self.exits, self.layers = exits, self._engine.stack.layers
        if not 0 < len(exits) <= max(exits, default=0) < self.layers:
            problem = f"{exits} are not layers from 1 to {self.layers - 1}"
            raise ConfigError("exits", problem, "Name one or more")
        self._policy.attach(self.layers, prompt_tokens, prompts)
        self.model = self._engine.model_fingerprint
        self.prompt_tokens = prompt_tokens
        self._parts = [
            (tuple(each[:prompt_tokens]), tuple(each[prompt_tokens:][:following]))
            for each in documents
        ]
        self._full: dict[int, list[Row]] = {}
        self._run: EngineRun | None = None

    def begin(self, rng: np.random.Generator) -> Moment:
        """Give up what is running, and start a prompt drawn by ``rng``; new ones are read in full
        first.

        Raises:
            ConfigError: somebody else uses the engine.
            PolicyFaultError: as ``answer``.
            Exception: whatever stopped the engine.
        """
        self.close()
        self._index = draw_document(self._engine, len(self._parts), rng)
        hand_over = self._policy.hand_over = HandOver()
        if self._index not in self._full:
            self._full[self._index] = self._read(self._submit("full"), hand_over)
        self._asked: Sequence[Question] = ()
        self._answers: list[int] = []
        self._left = 0
        request = self._submit("exits")
        came_out: deque[Row] = deque()
        self._came_out = came_out
        self._run = EngineRun(
            self._engine,
            hand_over,
            request,
            lambda: came_out.extend(self._read(request, hand_over)),
        )
        return self._next(self._run)

    def answer(self, target: int) -> Moment:
        """Answer the present question, and run to the next.

        Raises:
            ConfigError: nothing waits for an answer.
            PolicyFaultError: the prompt has features that are not finite.
            Exception: whatever stopped the engine.
        """
        if self._run is None or not self._asked:
            raise ConfigError("session", "waits for no answer", "Begin a prompt first")
        self._left += target == self._asked[len(self._answers)].here
        self._answers.append(target)
        if len(self._answers) < len(self._asked):
            return Moment((), self._asked[len(self._answers)])
        self._run.answer(self._answers)
        return self._next(self._run)

    def close(self) -> None:
        """Give up what is running, once the engine's present step is done; it is idle then."""
        run, self._run = self._run, None
        if run is not None:
            run.abandon()

    def _next(self, run: EngineRun) -> Moment:
        self._answers, self._asked = [], run.next() or ()
        if self._asked:
            return Moment((), self._asked[0])
        [row], [full] = self._came_out, self._full[self._index]
        if row.prompt_failed:
            raise PolicyFaultError(f"prompt {self._index} could not be asked about to its end")
        read = ReadPrompt(
            prompt=self._index,
            calls=row.prompt_calls,
            full_calls=full.prompt_calls,
            left=self._left,
            loss=nats_per_token(row),
            full_loss=nats_per_token(full),
        )
        return Moment((), None, read)

    def _submit(self, prefill: Prefill) -> Request:
        return submit_scored(self._engine, *self._parts[self._index], prefill=prefill)

    def _read(self, request: Request, hand_over: HandOver) -> list[Row]:
        """Step until the request is done: its row; nothing if it was given up."""
        finished: dict[str, Row] = {}
        while not finished and not hand_over.is_abandoned:
            self._engine.step(finished)
        return list(finished.values())


class AskedReader:
    """A policy for prompts that asks somebody else about each token that may leave.

    Attributes:
        exits, schema, candidates_VK: What an ``ExitPolicy`` declares under these names.
        hand_over: Who is asked; another for each prompt.
    """

    schema = PROMPT_V1
    candidates_VK = None

    def __init__(self, exits: tuple[int, ...]) -> None:
        self.exits = exits
        self.hand_over = HandOver()

    def attach(self, layers: int, tokens: int, prompts: PromptExits) -> None:
        """Say how deep the model is, how long prompts are, and which of their tokens are kept."""
        self._layers = layers
        self._asked = range(prompts.keep_first, tokens - prompts.keep_last)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Tokens whose answer was to leave, [N]; never one that is kept, nor after a giving up."""
        places_N = np.rint(SCALE * features_NF[:, PLACE]).astype(np.int64)
        asked = [n for n, place in enumerate(places_N.tolist()) if place in self._asked]
        leave_N = np.zeros(len(features_NF), np.bool_)
        if asked:
            here = self.exits.index(round(self._layers * float(features_NF[0, DEPTH])))
            questions = [Question(here, features_NF[n].copy(), NO_OUTLOOK) for n in asked]
            targets = self.hand_over.ask(questions)
            if targets is not None:
                leave_N[asked] = np.asarray(targets) == here
        return leave_N
