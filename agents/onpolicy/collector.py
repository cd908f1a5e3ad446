"""A Ray actor that holds an engine and a policy, and decodes documents with real exits.

Shape suffixes: T tokens, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from offramp.agents.learning.export import Weights
from offramp.agents.onpolicy.rollout import DecodedRollout, RecordingRouter
from offramp.controller.errors import ConfigError, PolicyFaultError
from offramp.controller.features import FeatureSchema, IntArray
from offramp.controller.policies.router import MlpRouter
from offramp.worker.decoding.request import KVMode
from offramp.worker.decoding.sequence import Sequence as Row
from offramp.worker.model.stack import LayerStack
from offramp.worker.spec import ModelFacts, WorkerSpec, describe, load_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSpec:
    """What all collectors of a run have in common.

    Attributes:
        worker: What each loads.
        exits: Layers to ask after.
        schema: The features read.
        kv_mode: What becomes of skipped layers. In ``defer`` full depth's word on each early token
            comes from its own later run; in ``project`` from one more pass over the document.
        prompt_tokens: Tokens of each document read at full depth first.
        model: Fingerprint that the loaded model must have; "" takes any.
        seed: Seeds the actions that are drawn.
    """

    worker: WorkerSpec
    exits: tuple[int, ...]
    schema: FeatureSchema
    kv_mode: KVMode = "project"
    prompt_tokens: int = 32
    model: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVersion:
    """Weights as they travel; log λ is still an input, since each document has its own.

    Attributes:
        version: Counted by the learner.
        routing: Layers of the net that routes, on [features, outlook, log λ].
        starting: Layers of the net that starts, on [outlook, log λ].
    """

    version: int
    routing: Weights
    starting: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Documents to decode together, by one collector.

    Attributes:
        number: Number of the task; with the run's seed it seeds the actions.
        documents: Digest, tokens and preference λ of each.
    """

    number: int
    documents: tuple[tuple[str, tuple[int, ...], float], ...]


class Collector:
    """Decodes a task's documents under one version of the policy.

    Args:
        spec: What to load.
        candidates_VK: Candidate table of the probe.

    Raises:
        ConfigError: the model is not the recorded one.
    """

    def __init__(self, spec: CollectSpec, candidates_VK: IntArray) -> None:
        self.spec = spec
        self.candidates_VK = candidates_VK
        self.engine = load_engine(spec.worker)
        if spec.model not in ("", self.engine.model_fingerprint):
            raise ConfigError(
                "model",
                f"{spec.worker.model!r} with native weights is not the recorded one",
                "Name that folder; for int8 or int4 weights, train without on-policy rounds",
            )

    def describe(self) -> tuple[ModelFacts, int]:
        """The model's facts, and the process that holds it."""
        return describe(self.engine), os.getpid()

    def collect(self, policy: PolicyVersion, task: Task) -> list[DecodedRollout]:
        """One rollout per document, all complete.

        Raises:
            PolicyFaultError: the policy failed in mid-document.
        """
        policies = [
            self._recorder(
                policy, preference, np.random.default_rng([self.spec.seed, task.number, place])
            )
            for place, (_, _, preference) in enumerate(task.documents)
        ]
        rows = self._decode([tokens for _, tokens, _ in task.documents], policies)
        return [
            recorder.rollout(
                version=policy.version,
                task=task.number,
                document=document,
                agreed_T=self._labels(row),
            )
            for recorder, row, (document, _, _) in zip(policies, rows, task.documents, strict=True)
        ]

    def _recorder(
        self, policy: PolicyVersion, preference: float, rng: np.random.Generator
    ) -> RecordingRouter:
        router = MlpRouter(
            self.spec.exits,
            self.spec.schema,
            fixed_preference(policy.routing, preference),
            first=fixed_preference(policy.starting, preference),
            candidates_VK=self.candidates_VK,
        )
        return RecordingRouter(router, preference, rng)

    def _decode(
        self, documents: Sequence[Sequence[int]], policies: Sequence[RecordingRouter]
    ) -> list[Row]:
        prompt = self.spec.prompt_tokens
        requests = [
            self.engine.submit(
                tokens[:prompt], policy=policy, forced=tokens[prompt:], kv_mode=self.spec.kv_mode
            )
            for tokens, policy in zip(documents, policies, strict=True)
        ]
        finished: dict[str, Row] = {}
        while len(finished) < len(requests):
            self.engine.step(finished)
        rows = [finished[request.id] for request in requests]
        if any(row.policy_failed for row in rows):
            raise PolicyFaultError("it failed while it collected")
        return rows

    def _labels(self, row: Row) -> np.ndarray | None:
        if self.spec.kv_mode != "project":
            return None  # the verdicts are the labels
        fed = [*row.request.prompt, *row.request.forced[:-1]]
        full = full_depth_tokens(self.engine.stack, fed)[len(row.request.prompt) :]
        agreed_T: np.ndarray = (np.asarray(row.emitted[1:]) == full).astype(np.int8)
        return agreed_T


def fixed_preference(layers: Weights, preference: float) -> Weights:
    """Fold log λ, the last input, into the first bias, so that the net runs at one preference."""
    (weight, bias), *rest = layers
    constant = np.float32(np.log(preference)) * weight[-1]
    return [(np.ascontiguousarray(weight[:-1]), bias + constant), *rest]


@torch.inference_mode()
def full_depth_tokens(stack: LayerStack, tokens: Sequence[int]) -> IntArray:
    """The most likely token after each, in one pass through all layers, [T]."""
    positions_1T = torch.arange(len(tokens), device=stack.device)[None]
    x_1TD = stack.embed(torch.tensor([list(tokens)], device=stack.device), positions_1T)
    rotary = stack.rotary(x_1TD, positions_1T)
    for index in range(stack.layers):
        x_1TD = stack.run_layer(index, x_1TD, rotary, None, None)
    best_T: IntArray = stack.logits(x_1TD[0]).argmax(-1).to(torch.int32).cpu().numpy()
    return best_T


CollectorActor: Any = ray.remote(max_restarts=0)(Collector)
"""The same as a Ray actor. Never restarted by Ray: the pool must know that its work is lost."""
