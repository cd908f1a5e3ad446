"""Adapts each family of Hugging Face causal LMs in one small module; a registry finds it."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from offramp.controller.errors import ModelError
from offramp.worker.model.families.adapter import HFStack
from offramp.worker.model.families.gemma import GemmaStack
from offramp.worker.model.families.gpt2 import GPT2Stack
from offramp.worker.model.families.gpt_neox import GPTNeoXStack
from offramp.worker.model.families.llama import LlamaStack, MistralStack, Phi3Stack
from offramp.worker.model.families.opt import OPTStack

__all__ = ["FAMILIES", "HFStack", "adapter_of", "stack_for"]

FAMILIES: MappingProxyType[str, type[HFStack]] = MappingProxyType(
    {
        "LlamaForCausalLM": LlamaStack,
        "MistralForCausalLM": MistralStack,
        "Qwen2ForCausalLM": LlamaStack,
        "Qwen3ForCausalLM": LlamaStack,
        "SmolLM3ForCausalLM": LlamaStack,
        "Phi3ForCausalLM": Phi3Stack,
        "GemmaForCausalLM": GemmaStack,
        "GPT2LMHeadModel": GPT2Stack,
        "OPTForCausalLM": OPTStack,
        "GPTNeoXForCausalLM": GPTNeoXStack,
    }
)
"""The adapter of each architecture that is served."""

MISSING: MappingProxyType[str, str] = MappingProxyType(
    {
        "Gemma2ForCausalLM": "soft-capped logits and sliding windows",
        "Gemma3ForCausalLM": "sliding windows with their own rotary angles",
        "Olmo2ForCausalLM": "norms after attention, and over all keys at once",
        "CohereForCausalLM": "scaled logits",
        "GraniteForCausalLM": "scaled embeddings, residuals and logits",
        "BloomForCausalLM": "ALiBi position biases",
        "FalconForCausalLM": "ALiBi position biases and parallel norms, which some variants have",
        "GPTJForCausalLM": "interleaved rotary embeddings and a head with biases",
        "PhiForCausalLM": "a head with biases",
        "MambaForCausalLM": "layers without keys and values",
    }
)
"""What some well-known architectures that are not served have and no adapter here handles."""


def adapter_of(architecture: str, model: str = "") -> type[HFStack]:
    """The adapter of an architecture.

    Args:
        architecture: The name of a class, such as ``LlamaForCausalLM``.
        model: What the error calls the model, such as its path.

    Raises:
        ModelError: there is none; the message says what one would need.
    """
    adapter = FAMILIES.get(architecture)
    if adapter is None:
        missing = MISSING.get(architecture)
        reason = f"it has {missing}" if missing else "no adapter drives its layers"
        raise ModelError(
            "model",
            f"{model} is a {architecture}, which is not supported: {reason}".lstrip(),
            f"Supported are {', '.join(FAMILIES)}",
        )
    return adapter


def stack_for(model: Any) -> HFStack:
    """A ready model object behind its family's adapter.

    Raises:
        ModelError: an unsupported architecture, or a variant of a family that is not supported.
    """
    return adapter_of(type(model).__name__)(model)
