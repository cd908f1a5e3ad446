"""Fit what skipped layers are filled through, ``offramp tune --kv``: the whole way, top to bottom.

Shape suffixes: T tokens, L layers, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.agents.recording.corpus import load_corpus, window
from offramp.agents.recording.documents import Document, encode
from offramp.agents.recording.record_config import quarters
from offramp.agents.tuning.exit_losses import typical_rows
from offramp.agents.tuning.kv_moments import FillMoments
from offramp.agents.tuning.kv_quality import FillQuality, compare_fills
from offramp.agents.tuning.stream import data_digest
from offramp.controller.adapters.adapter_folder import read_description
from offramp.controller.errors import ConfigError, TraceError
from offramp.worker.model.families import stack_for
from offramp.worker.model.filling.folding import folded
from offramp.worker.model.filling.kv_map import KV, KVMap
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.model.loading import (
    layers_and_vocab,
    load_model,
    load_tokenizer,
    model_fingerprint,
    parse_dtype,
    require_device,
)
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.translators import FILL, exits_of, read_weights, save_exits

OnFitting = Callable[[str, int, int], None]
"""Told (stage, documents done, documents in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTuneConfig:
    """How to fit a map of the fill.

    Attributes:
        model: Folder in Hugging Face format.
        corpus: Folder of documents; None takes the interpreter's standard library.
        documents: Documents to take from the corpus, over all splits; None takes all.
        exits: Layers to fit; () places three at the quarters of the depth, or takes those of
            ``beside``.
        rank: r of each exit's map; the whole width, where it is less.
        length: Tokens of each document, at most.
        held_out: Validation documents measured, at most.
        beside: Folder of adapters that exits are read through; what is written holds both. None
            reads exits as they are.
        dtype: Weights of the model; the map is always fitted and kept in float32.
        device: Device that the model runs on.
        threads: Torch threads; part of what makes a run reproducible.
        seed: Draws which tokens leave when the map is measured.
    """

    model: str
    corpus: Path | None = None
    documents: int | None = 320
    exits: tuple[int, ...] = ()
    rank: int = 256
    length: int = 256
    held_out: int = 24
    beside: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("held_out", 1), ("threads", 1), ("length", 2)):
            if getattr(self, name) < least:
                problem = f"{getattr(self, name)} is below {least}"
                raise ConfigError(name, problem, f"Use {least} or more")
        if self.beside is not None and self.exits:
            raise ConfigError("exits", "are those of --translators", "Leave them out")


def require_fill_exits(config: KVTuneConfig) -> tuple[int, ...]:
    """The layers to fit, after every check that needs no weights of the model.

    Raises:
        ModelError: there is no such model.
        ConfigError: exits that are not below the model's depth, or the dtype or device is unknown.
    """
    layers, _ = layers_and_vocab(config.model)
    parse_dtype(config.dtype)
    require_device(config.device)
    exits = config.exits or quarters(layers)
    if list(exits) != sorted(set(exits)) or not all(1 <= layer < layers for layer in exits):
        problem = f"{','.join(map(str, exits))} do not ascend within 1 to {layers - 1}"
        raise ConfigError("exits", problem, f"The model has {layers} layers; 3,6,9 is an example")
    return exits


def tune_kv(
    config: KVTuneConfig, folder: Path, on_progress: OnFitting = lambda *_: None
) -> list[FillQuality]:
    """Fit a map of the fill, measure it, and save it as adapters.

    The same config, documents, machine and threads give the same file on a CPU.

    Args:
        config: The model, its exits and what to fit to.
        folder: Folder that is written to.
        on_progress: Told of "states", then of "check", in documents.

    Returns:
        What the fill destroys on held-out documents, by exit.

    Raises:
        ConfigError: an option is unusable, or the adapters to write beside are another model's.
        ModelError: the model cannot be loaded.
        TraceError: there are no documents.
    """
    exits = require_fill_exits(config)
    train, held_out = _documents(config)
    torch.set_num_threads(config.threads)
    model = load_model(config.model, parse_dtype(config.dtype), config.device)
    stack, fingerprint = stack_for(model), model_fingerprint(model)
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"kind": FILL, "model": fingerprint}
    if config.beside is not None:
        facts = read_description(config.beside)
        exits = exits_of(config.beside, facts, fingerprint, stack.layers)
        tensors = read_weights(config.beside, facts)
    if config.length > stack.context:
        problem = f"{config.length} exceeds the model's context of {stack.context}"
        raise ConfigError("length", problem, "Use less")
    train_ids, held_ids = (_windows(config, each) for each in (train, held_out))
    kv_map = fit(stack, exits, train_ids, config.rank, on_progress)
    found = compare_fills(stack, kv_map, held_ids, config.seed, on_progress)
    kept = {name: each for name, each in tensors.items() if not name.startswith(KV)}
    fill = {
        "data": data_digest(train, held_out),
        "tokens": sum(map(len, train_ids)),
        "rank": config.rank,
        "dtype": config.dtype,
        "report": [asdict(each) for each in found],
    }
    save_exits(
        folder,
        {**kept, **kv_map.tensors()},
        {**facts, "layers": stack.layers, "width": stack.width, "exits": list(exits), FILL: fill},
    )
    return found


@torch.inference_mode()
def fit(
    stack: LayerStack,
    exits: Sequence[int],
    documents: Sequence[Sequence[int]],
    rank: int,
    on_progress: OnFitting = lambda *_: None,
) -> KVMap:
    """The least squares over documents, by exit.

    Args:
        stack: The model.
        exits: Layers to fit.
        documents: Token ids.
        rank: r of each exit's map, at most.
        on_progress: Told of "states", in documents.
    """
    weights = [stack.kv_weights(index) for index in range(stack.layers)]
    made = [folded(each).cpu() for each in weights]
    values = stack.kv_heads * stack.head_dim
    sums = {layer: FillMoments(stack.width, made[layer:], values) for layer in exits}
    projector = KVProjector(stack)
    for number, tokens in enumerate(documents):
        inputs = fill_inputs(stack, tokens, exits[0])
        for layer, each in sums.items():
            deeper = inputs.read_LTD[layer - exits[0] :]
            before_TK = projector.values_before(inputs.states_LTD[layer - exits[0]], layer)
            x_TI = torch.cat((deeper[0], before_TK.float().cpu()), 1)
            each.add(x_TI[inputs.typical_T], deeper[:, inputs.typical_T].unbind())
        on_progress("states", number + 1, len(documents))
    width = min(rank, stack.width)
    return KVMap({layer: each.solve(width) for layer, each in sums.items()})


class FillInputs(NamedTuple):
    """What the layers from one on read of a document's tokens.

    Attributes:
        states_LTD: The states in front of them, where the model is.
        read_LTD: The same after the norm, but for what this multiplies by and adds; float32 on the
            CPU.
        typical_T: Says which tokens are no attention sinks.
    """

    states_LTD: Tensor
    read_LTD: Tensor
    typical_T: Tensor


def fill_inputs(stack: LayerStack, tokens: Sequence[int], first: int) -> FillInputs:
    """Run a document, for what the layers from one (index) on read of it."""
    tokens_1T = torch.tensor([list(tokens)], device=stack.device)
    positions_1T = torch.arange(len(tokens), device=stack.device)[None]
    x_1TD = stack.embed(tokens_1T, positions_1T)
    rotary, inputs = stack.rotary(x_1TD, positions_1T), []
    for index in range(stack.layers):
        if index >= first:
            inputs.append(x_1TD[0])
        if index < stack.layers - 1:
            x_1TD = stack.run_layer(index, x_1TD, rotary, None, None)
    states_LTD = torch.stack(inputs)
    read_LTD = _normed(states_LTD.float(), stack).cpu()
    return FillInputs(states_LTD, read_LTD, typical_rows(inputs[0]).cpu())


def _normed(x_LTD: Tensor, stack: LayerStack) -> Tensor:
    weights = stack.kv_weights(0)
    if weights.norm == "layer":
        return torch.nn.functional.layer_norm(x_LTD, x_LTD.shape[-1:], eps=weights.eps)
    return x_LTD * torch.rsqrt(x_LTD.pow(2).mean(-1, keepdim=True) + weights.eps)


def _documents(config: KVTuneConfig) -> tuple[list[Document], list[Document]]:
    documents = load_corpus(config.corpus, limit=config.documents)
    train = [each for each in documents if each.split == "train"]
    held_out = [each for each in documents if each.split == "validation"][: config.held_out]
    return train, held_out


def _windows(config: KVTuneConfig, documents: Sequence[Document]) -> list[list[int]]:
    tokenizer = load_tokenizer(config.model)
    found = [window(each, encode(tokenizer, each), config.length) for each in documents]
    if not any(found):
        raise TraceError("corpus", "gives no tokens", "Use other documents")
    return [tokens for tokens in found if tokens]
