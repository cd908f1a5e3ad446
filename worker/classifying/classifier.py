"""Runs batches of sequences through a stack, asks a policy at exits, and lets rows leave.

Shape suffixes: N rows of the batch, M rows asked, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from offramp.controller.errors import RequestError
from offramp.controller.features import OUTLOOK_V1, SOFTMAX_V2, BoolArray, FloatArray, IntArray
from offramp.controller.policies.protocols import IndexArray, NeverExit, Policy, RoutingPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import Manifest
from offramp.worker.classifying.class_heads import ClassHeads
from offramp.worker.classifying.sequence_stack import (
    SequenceBatch,
    SequenceStack,
    require_sequences,
)
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.engine.admission import require_policy
from offramp.worker.probes.softmax import SoftmaxMemory

FULL_DEPTH = NeverExit()


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """What became of a batch.

    Attributes:
        label_N: Index of each sequence's likeliest class.
        probs_NC: Chances of the classes.
        layers_N: Layers that each sequence ran.
        launches: Layers run, whatever the number of rows in them.
        row_layers: Layers run, counted for each row in them.
    """

    label_N: IntArray
    probs_NC: FloatArray
    layers_N: IntArray
    launches: int
    row_layers: int


class Classifier:
    """Classifies sequences with early exits.

    Args:
        stack: Runs the layers.
        heads: Read classes off pooled states.
        guard: Asks policies, counts their failures and goes on at full depth then; None: a new one.
    """

    def __init__(
        self, stack: SequenceStack, heads: ClassHeads, guard: PolicyGuard | None = None
    ) -> None:
        self.stack = stack
        self.heads = heads
        self.guard = guard or PolicyGuard()
        # Checks of a policy, and its unpacking, take longer than to ask it.
        self._admitted: tuple[object, Policy] = (FULL_DEPTH, FULL_DEPTH)

    def under(self, snapshot: PolicySnapshot) -> Classifier:
        """The same model and guard with the heads of a release, if it brought some."""
        if snapshot.adapters is None:
            return self
        # A release for this worker brings nothing else.
        return Classifier(self.stack, cast("ClassHeads", snapshot.adapters), self.guard)

    def require_policy(self, policy: Policy) -> None:
        """Refuse a policy that is none for these heads.

        Raises:
            RequestError: it is no policy, reads what only tokens have, or asks where there is no
                head.
        """
        given: object = policy  # callers need not keep to the annotation
        is_policy = isinstance(given, Policy) and not isinstance(given, type)
        schema, exits = (policy.schema, policy.exits) if is_policy else (None, ())
        if schema is not None and schema != SOFTMAX_V2:
            raise RequestError(
                "policy",
                f"reads {schema.name!r} features, which sequences do not have: it is for "
                "another task",
                "Train one on a classification",
            )
        if missing := [str(each) for each in exits if each not in self.heads.exits]:
            raise RequestError(
                "policy",
                f"asks after layers {', '.join(missing)}, where no head was fitted",
                f"Heads are after {', '.join(map(str, self.heads.exits))}",
            )
        require_policy(policy, self.stack.layers, self.stack.width)

    def _admit(self, given: Policy | PolicyBundle) -> Policy:
        """The policy, checked unless it is the one that was asked last."""
        known, policy = self._admitted
        if given is known:
            return policy
        if isinstance(given, PolicyBundle):
            self._require_made_for(given.manifest)
            policy = given.policy()
        else:
            policy = given
        self.require_policy(policy)
        self._admitted = (given, policy)
        return policy

    def _require_made_for(self, manifest: Manifest) -> None:
        is_any = manifest.kind == "never" and not manifest.adapters
        if not is_any and manifest.adapters != self.heads.digest:
            named = f"heads {manifest.adapters[:12]}" if manifest.adapters else "no heads"
            problem = f"was made for {named}, and these are {self.heads.digest[:12] or 'unsaved'}"
            raise RequestError("policy", problem, "Train one for them")

    @torch.inference_mode()
    def run(
        self, sequences: Sequence[Sequence[int]], policy: Policy | PolicyBundle = FULL_DEPTH
    ) -> Classified:
        """Classify a batch; rows that leave are gone from all later layers.

        Args:
            sequences: Token ids, each at least one and no more than the context.
            policy: Says who leaves where. Of a bundle it is checked that it was made for these
                heads.

        Raises:
            RequestError: there is no sequence, one cannot be run (its place is the field), or the
                policy is for another task.
        """
        require_sequences(sequences, self.stack)
        policy = self._admit(policy)
        batch = SequenceBatch(self.stack, sequences)
        lengths_N = np.array([len(tokens) for tokens in sequences], np.float32)
        asked = AskedRows(policy, self.guard, self.stack, lengths_N)
        found = _Found(len(sequences), len(self.heads.labels))
        for layer in range(1, self.stack.layers):
            batch.run_layer(layer - 1)
            due_M = asked.due(layer)
            if not len(due_M):
                continue
            logits_MC = self.heads.logits(layer, batch.pooled(self.heads.pool, due_M))
            leave_M = asked.leaving(layer, due_M, logits_MC)
            if not leave_M.any():
                continue
            found.take(batch.rows[due_M[leave_M]], logits_MC, leave_M, layer)
            stay_N = np.ones(len(batch.rows), np.bool_)
            stay_N[due_M[leave_M]] = False
            batch.keep(stay_N)
            asked.keep(stay_N)
            if not len(batch.rows):
                return found.classified(batch)
        batch.run_layer(self.stack.layers - 1)
        logits_NC = self.heads.logits(self.stack.layers, batch.pooled(self.heads.pool))
        found.take(batch.rows, logits_NC, np.ones(len(batch.rows), np.bool_), self.stack.layers)
        return found.classified(batch)


class AskedRows:
    """Rows under one policy: at which exit each is asked next, and what it is shown there.

    Args:
        policy: The policy that all rows run under.
        guard: Asks it.
        stack: The model, for shares of its depth and context.
        lengths_N: Tokens of each row.
    """

    def __init__(
        self, policy: Policy, guard: PolicyGuard, stack: SequenceStack, lengths_N: FloatArray
    ) -> None:
        self._policy, self._guard = policy, guard
        exits = len(policy.exits)
        position_N = ((lengths_N - 1) / stack.context).astype(np.float32)
        self._memory = SoftmaxMemory(exits, stack.layers, position_N)
        self._outlook_NC = outlook_of_sequences(len(lengths_N))
        if isinstance(policy, RoutingPolicy):
            first = guard.start(policy, self._outlook_NC)
            self._target_N = np.array([exits if each is None else each for each in first])
        else:
            self._target_N = np.zeros(len(lengths_N), np.int64)

    def due(self, layer: int) -> IndexArray:
        """Places of the rows that are asked after so many layers."""
        if layer not in self._policy.exits:
            return np.empty(0, np.int64)
        return np.flatnonzero(self._target_N == self._policy.exits.index(layer))

    def leaving(self, layer: int, due_M: IndexArray, logits_MC: Tensor) -> BoolArray:
        """Which of the rows that are due leave; where the policy fails, none is asked again."""
        policy, here = self._policy, self._policy.exits.index(layer)
        if policy.schema is None:
            features_MF = np.empty((len(due_M), 0), np.float32)
        else:
            features_MF = self._memory.features(layer, logits_MC, due_M)
        never = len(policy.exits)
        if isinstance(policy, RoutingPolicy):
            outlook_MC = self._outlook_NC[due_M]
            routed = self._guard.route(policy, here, features_MF, outlook_MC)
            next_M = np.array([never if each is None else each for each in routed], np.int64)
            self._target_N[due_M] = next_M
            return np.asarray(next_M == here)
        leave_M = self._guard.decide(policy, features_MF)
        if leave_M is None:
            self._target_N[due_M] = never
            return np.zeros(len(due_M), np.bool_)
        self._target_N[due_M] = here + 1
        return leave_M.copy()  # a view that the policy's next call reuses

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        self._memory.keep(stay_N)
        self._target_N = self._target_N[stay_N]
        self._outlook_NC = self._outlook_NC[stay_N]


class _Found:
    """What is known so far of the rows of a batch."""

    def __init__(self, rows: int, classes: int) -> None:
        self._label_N = np.empty(rows, np.int32)
        self._probs_NC = np.empty((rows, classes), np.float32)
        self._layers_N = np.empty(rows, np.int32)

    def take(self, rows_N: IndexArray, logits_MC: Tensor, leave_M: BoolArray, layer: int) -> None:
        """Note the classes of rows that leave, out of the logits of all that were asked."""
        probs_MC = logits_MC.float().softmax(-1).cpu().numpy()[leave_M]
        self._probs_NC[rows_N] = probs_MC
        self._label_N[rows_N] = probs_MC.argmax(-1)
        self._layers_N[rows_N] = layer

    def classified(self, batch: SequenceBatch) -> Classified:
        return Classified(
            label_N=self._label_N,
            probs_NC=self._probs_NC,
            layers_N=self._layers_N,
            launches=batch.launches,
            row_layers=batch.row_layers,
        )


def outlook_of_sequences(rows: int) -> FloatArray:
    """OUTLOOK_V1 of sequences, as replay shows it of documents of one token, [N, C].

    One token is left, none was emitted, nothing is pending, and nobody else is there.
    """
    out_NC = np.zeros((rows, OUTLOOK_V1.width), np.float32)
    out_NC[:, OUTLOOK_V1.index("left")] = 1 / 256
    for column in ("acceptance", "last_depth", "active"):
        out_NC[:, OUTLOOK_V1.index(column)] = 1.0
    return out_NC
