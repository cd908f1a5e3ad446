"""Fields of other servers' requests that are not supported here, and what may stand in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offramp.controller.errors import RequestError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's and vLLM's.
    "suffix": ("",),
    "response_format": ({}, {"type": "text"}),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "detokenize": (True,),
    "include_stop_str_in_output": (False,),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "structured_outputs": ({},),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object"),
        ("", [], {}, False),
    ),
    # Those of SGLang, llama.cpp and Hugging Face that change tokens.
    **dict.fromkeys(("regex", "ebnf", "grammar", "json_schema", "stop_regex"), ("", [], {})),
    "custom_logit_processor": ("",),
    "lora_path": ("",),
    "no_stop_trim": (False,),
    "do_sample": (True,),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "samplers": ([],),
    **dict.fromkeys(("top_a", "dry_multiplier", "xtc_probability", "dynatemp_range"), (0,)),
}
"""Fields without support here, and the values of them that change nothing (as null)."""

NEUTRAL_IN_CHATS: dict[str, tuple[Any, ...]] = NEUTRAL | {
    # A conversation is read by the model's own template alone.
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": ("",),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
"""The same of conversations."""

OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
"""What other servers call fields that are supported here, by that name."""


def require_supported(extra: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse what would silently be dropped.

    Args:
        extra: The fields of a request that are none of this API's.
        neutral: Unsupported fields, and the values of them that change nothing.

    Raises:
        RequestError: a field that is not supported has a value that matters, or a supported one
            has another name.
    """
    for field, value in extra.items():
        if field in OTHER_NAMES:
            raise RequestError(field, "is not this API's name", f"Call it {OTHER_NAMES[field]}")
        if field in neutral and value not in neutral[field]:
            raise RequestError(field, f"{value!r:.40} is not supported", "Leave it out")
