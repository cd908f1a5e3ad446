"""Which probe computes which feature schema: one line per probe.

Shape suffixes: N rows, K candidates, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from offramp.controller.errors import ConfigError
from offramp.controller.features import (
    CANDIDATES_V1,
    SKETCH_V1,
    SOFTMAX_V2,
    STATE_V1,
    FeatureSchema,
    IntArray,
    hidden_schema,
)
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import Policy
from offramp.worker.model.stack import LayerStack
from offramp.worker.probes.candidates.candidate_probe import CandidateProbe
from offramp.worker.probes.candidates.device_probe import DeviceProbe
from offramp.worker.probes.candidates.fused import FusedProbe
from offramp.worker.probes.candidates.successors import NgramIndex, candidates_of
from offramp.worker.probes.probe import BlankProbe, Probe, ProbeInputs, Scores
from offramp.worker.probes.readout import Readout
from offramp.worker.probes.sketch import SketchProbe
from offramp.worker.probes.softmax import SoftmaxProbe
from offramp.worker.probes.state import HiddenProbe, state_probe

MakesProbe = Callable[[ProbeInputs], Probe]

PROBES: MappingProxyType[str, MakesProbe] = MappingProxyType(
    {
        CANDIDATES_V1.digest: CandidateProbe.of,
        SOFTMAX_V2.digest: SoftmaxProbe,
        SKETCH_V1.digest: SketchProbe.of,
        STATE_V1.digest: state_probe,
    }
)
"""How to probe, by digest of the schema."""


class ProbeFactory:
    """Builds the probes of one model; holds what they share.

    Args:
        stack: The model, as a stack of layers.
    """

    def __init__(self, stack: LayerStack) -> None:
        self.readout = Readout(stack)
        shows = self.readout.norm is not None and self.readout.head_VD is not None
        self._is_compiled = shows and stack.dtype in (torch.float32, torch.bfloat16)

    def probe(
        self,
        policy: Policy,
        ngrams: Sequence[NgramIndex | None],
        x_ND: Tensor,
        positions_N: IntArray,
        drafted: Sequence[Sequence[int]] = (),
        scores: Sequence[Scores | None] = (),
    ) -> Probe:
        """The probe that a policy reads, for some rows at the start of a step.

        Args:
            policy: Says by its schema which probe, and by its table which candidates.
            ngrams: Each row's index; read only if the schema is of candidates.
            x_ND: The rows' embeddings.
            positions_N: Their token positions.
            drafted: Each row's tokens that its index does not know, since they may be taken
                back; () if no row has any.
            scores: As ``ProbeInputs`` has them; read only if the schema is of whole logits.

        Raises:
            ConfigError: no probe computes the schema.
        """
        if policy.schema is None:
            return BlankProbe()
        candidates_NK = None
        if policy.schema.digest == CANDIDATES_V1.digest:
            candidates_NK = _candidates(ngrams, policy.candidates_VK, drafted)
        inputs = ProbeInputs(
            self.readout, x_ND, positions_N, len(policy.exits), candidates_NK,
            policy.candidates_VK, scores,
        )  # fmt: skip
        # Kinds of policies derive from it, and decide otherwise.
        if candidates_NK is not None and not self.readout.is_host and type(policy) is MlpPolicy:
            return DeviceProbe(inputs, policy)
        return make_probe(policy.schema, inputs)

    def fused_probe(self, policy: Policy, rows: int) -> FusedProbe | None:
        """The probe of up to so many rows, for token after token; None: ``probe`` of each token.

        Args:
            policy: Policy that the rows run under.
            rows: Most rows that will be asked together.
        """
        if policy.schema is None or policy.candidates_VK is None or not self._is_compiled:
            return None
        if policy.schema.digest != CANDIDATES_V1.digest:
            return None
        return FusedProbe(self.readout, policy, rows)

    def prepare(self, policy: Policy) -> None:
        """Compute now what the policy's probe would compute on its first use.

        Call it when a policy arrives, from any thread: a sketch takes tens of milliseconds.
        """
        if policy.schema is None:
            return
        stack = self.readout.stack
        x_1D = torch.zeros(1, stack.width, dtype=stack.dtype, device=stack.device)
        self.probe(policy, [NgramIndex((0,))], x_1D, np.zeros(1, np.int32))
        fused = self.fused_probe(policy, 1)
        if fused is not None:
            fused.compile(x_1D)


def probe_of(schema: FeatureSchema) -> MakesProbe | None:
    """How to probe for a schema; None if nothing computes it."""
    if schema.name == "hidden" and schema == hidden_schema(schema.width):
        return HiddenProbe
    return PROBES.get(schema.digest)


def make_probe(schema: FeatureSchema, inputs: ProbeInputs) -> Probe:
    """Make the probe of a schema.

    Raises:
        ConfigError: no probe computes the schema, or it is of hidden states of another width.
    """
    factory = probe_of(schema)
    if factory is HiddenProbe and schema.width != inputs.readout.stack.width:
        problem = f"holds states of {schema.width} columns, the model's have another width"
        raise ConfigError("schema", problem, "Train the policy on traces of this model")
    if factory is None:
        problem = f"no probe computes {schema.name!r} version {schema.version}"
        raise ConfigError("schema", problem, "Add one to offramp.worker.probes.factory")
    return factory(inputs)


def _candidates(
    ngrams: Sequence[NgramIndex | None], table_VK: IntArray | None, drafted: Sequence[Sequence[int]]
) -> IntArray:
    assert table_VK is not None  # the engine admits no candidate policy without a table
    return candidates_of([row for row in ngrams if row is not None], table_VK, drafted)
