"""Times what the parts of a classification cost, one text at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch

from offramp.controller.costs.table import CostTable
from offramp.controller.policies.rules.entropy_patience import EntropyExit
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_stack import SequenceBatch
from offramp.worker.probes.softmax import SoftmaxMemory
from offramp.worker.profiling.profile import describe_machine


@torch.inference_mode()
def measure_costs(classifier: Classifier, sequences: Sequence[Sequence[int]]) -> CostTable:
    """Medians over some texts, each run alone at full depth and probed once.

    A probe is pooling, head and features; nothing is filled, for nothing is cached.

    Args:
        classifier: The model and its heads.
        sequences: Token ids of the texts, which should be like those that will be classified.
    """
    stack, heads = classifier.stack, classifier.heads
    policy = EntropyExit(exits=(1,), threshold=0.0)
    laps, dtype = [], torch.float32
    for tokens in sequences:
        clock = [time.perf_counter()]
        batch = SequenceBatch(stack, [tokens])
        dtype = batch.dtype
        clock.append(time.perf_counter())
        for index in range(stack.layers):
            batch.run_layer(index)
        clock.append(time.perf_counter())
        logits_1C = heads.logits(stack.layers, batch.pooled(heads.pool))
        clock.append(time.perf_counter())
        memory = SoftmaxMemory(1, stack.layers, np.zeros(1, np.float32))
        features_1F = memory.features(stack.layers, logits_1C)
        clock.append(time.perf_counter())
        classifier.guard.decide(policy, features_1F)
        clock.append(time.perf_counter())
        laps.append(np.diff(clock))
    step_s, layers_s, head_s, features_s, policy_s = (
        median(each) for each in zip(*laps, strict=True)
    )
    return CostTable(
        layer_s=layers_s / stack.layers,
        head_s=head_s,
        probe_s=head_s + features_s,
        policy_s=policy_s,
        fill_s=0.0,
        step_s=step_s,
        layers=stack.layers,
        machine=describe_machine(dtype),
    )
