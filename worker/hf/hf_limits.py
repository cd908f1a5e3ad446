"""What of Hugging Face's ``generate`` the engine cannot honour, refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from torch import Tensor
from transformers import GenerationMixin

from offramp.controller.errors import RequestError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "is_assistant": (None, False),
    "use_mtp": (None, False),
    "guidance_scale": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "cache_implementation": (None, "dynamic"),
}
"""Fields of a generation configuration, and the values that ask for nothing special."""

HONOURED = frozenset(
    {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
)
"""Inputs of the model that are understood; a cache only if it is ``generate``'s own."""

STATEFUL = (
    transformers.ClassifierFreeGuidanceLogitsProcessor,
    transformers.SynthIDTextWatermarkLogitsProcessor,
    transformers.UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors whose answer depends on earlier calls, or on rows that are not there."""


def passed_over() -> dict[str, Any]:
    """Arguments of ``generate`` that it does not hand to a callable, from its own frame.

    transformers 5.23 drops the streamer without a word, and its reader would wait for ever; an
    assistant would be ignored. Empty if it is not ``generate`` that calls.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return {}
    names = ("streamer", "assistant_model", "synced_gpus")
    return {name: frame.f_locals.get(name) for name in names}


def require_plain(generation_config: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse ways of decoding other than greedy decoding and sampling.

    Args:
        generation_config: What ``generate`` prepared.
        arguments: More arguments by name, refused unless None or False.

    Raises:
        RequestError: naming the flag.
    """
    for name, neutral in NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if value not in neutral:
            raise RequestError(
                name, f"{value!r} is not served by early exits", f"Leave it at {neutral[-1]}"
            )
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise RequestError(name, "is not served by early exits", "Leave it out")


def require_inputs(inputs: Mapping[str, Any]) -> None:
    """Refuse inputs of the model beside token ids, mask and positions.

    Raises:
        RequestError: naming the input.
    """
    for name, value in inputs.items():
        if name not in HONOURED and value is not None:
            raise RequestError(name, "is not served by early exits", "Give input_ids alone")
    if getattr(inputs.get("past_key_values"), "_is_user_defined", False):
        raise RequestError(
            "past_key_values", "cannot be used: the engine has its own cache", "Leave it out"
        )


def require_stateless(processors: Iterable[Any]) -> None:
    """Refuse processors that are no functions of their arguments.

    Raises:
        RequestError: naming the class.
    """
    for each in processors:
        if isinstance(each, STATEFUL):
            raise RequestError(
                "logits_processor",
                f"{type(each).__name__} keeps a state between calls, and rows that exit come and "
                "go on their own",
                "Leave it out",
            )


def prompt_lengths(mask_BN: Tensor | None, input_ids_BN: Tensor) -> list[int]:
    """Tokens of each row without the padding on its left.

    Raises:
        RequestError: padding in the middle or on the right, or a row of nothing else.
    """
    rows, columns = input_ids_BN.shape
    if mask_BN is None:
        return [columns] * rows
    kept_BN = mask_BN != 0
    shape = tuple(kept_BN.shape)
    if shape != (rows, columns):
        raise RequestError(
            "attention_mask", f"has shape {shape}, not {(rows, columns)}", "Mask input_ids"
        )
    for row, kept_N in enumerate(kept_BN.tolist()):
        if kept_N != sorted(kept_N) or not any(kept_N):
            raise RequestError(
                "attention_mask",
                f"row {row} is not padding, then at least one token",
                'Set padding_side="left" in the tokenizer',
            )
    return [int(count) for count in kept_BN.sum(-1)]


def require_positions(positions: Tensor | None, lengths: list[int], columns: int) -> None:
    """Refuse positions that do not count each row's tokens from 0.

    Raises:
        RequestError: naming the row.
    """
    if positions is None:
        return
    rows = positions.expand(len(lengths), columns).tolist()
    for row, (found, length) in enumerate(zip(rows, lengths, strict=True)):
        if found[columns - length :] != list(range(length)):
            raise RequestError(
                "position_ids", f"of row {row} do not count its tokens from 0", "Leave them out"
            )
