"""A Llama-like decoder layer with fewer calls: fused products, in-place sums, the same bits.

A layer of a small model is bound by calls, not by bytes: queries, keys and values come from one
product, gate and up projection from another, and what all layers of a step share is computed once.
Few tokens take one call for the whole layer (``kernels/layer.py``), which sums in an order of its
own.

Shape suffixes: B rows, T tokens, D width, N query and key heads, H head_dim, F rows of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.smollm3 import modeling_smollm3 as smollm3

from offramp.worker.model.attention import slot_attention
from offramp.worker.model.kernels.compiled_layer import CompiledLayers, LayerForm, norm_of
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.products import Product
from offramp.worker.model.quantised import QuantisedLinear
from offramp.worker.model.stack import KVUpdate, Rotary

FuseLinears = Callable[[Sequence[nn.Module]], Product]
"""Makes one product of linear maps of the same input: their outputs one after the other."""

FORMS: dict[type[nn.Module], frozenset[type[nn.Module]]] = {
    layer: frozenset((layer, *parts, nn.Linear, QuantisedLinear, SiLUActivation))
    for layer, *parts in (
        (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
        (
            mistral.MistralDecoderLayer,
            mistral.MistralAttention,
            mistral.MistralMLP,
            mistral.MistralRMSNorm,
        ),
        (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
        (qwen3.Qwen3DecoderLayer, qwen3.Qwen3Attention, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
        (
            smollm3.SmolLM3DecoderLayer,
            smollm3.SmolLM3Attention,
            smollm3.SmolLM3MLP,
            smollm3.SmolLM3RMSNorm,
        ),
    )
}
"""The layers that a lean one can stand in for, and the modules that such a layer consists of."""

NORMS: frozenset[type[nn.Module]] = frozenset(
    (
        llama.LlamaRMSNorm,
        mistral.MistralRMSNorm,
        qwen2.Qwen2RMSNorm,
        qwen3.Qwen3RMSNorm,
        smollm3.SmolLM3RMSNorm,
    )
)
"""Norms that a lean one can stand in for."""


def has_lean_form(block: nn.Module) -> bool:
    """Whether a lean layer computes what a layer does: nothing in it is replaced or hooked."""
    known = FORMS.get(type(block), frozenset())
    # Subclasses, and modules whose forward was replaced, may compute something else.
    whole = all(type(each) in known and "forward" not in vars(each) for each in block.modules())
    # Between two types Hugging Face's norm rounds otherwise.
    dtypes = {parameter.dtype for parameter in block.parameters()}
    return whole and len(dtypes) == 1 and not any(_hooks_within(block))


def lean_norm(module: nn.Module, dtype: torch.dtype) -> LeanNorm | None:
    """What computes a final norm with fewer calls, to activations of a dtype; None: nothing does.

    Another's subclass, or a module whose forward was replaced, may compute something else.
    """
    if type(module) not in NORMS or "forward" in vars(module):
        return None
    weight: Any = module.weight
    return LeanNorm(module) if weight.dtype is dtype else None


def _hooks_within(block: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where the hooks of a layer's parts are kept; its own are called by whatever stands for it."""
    parts = [each for each in block.modules() if each is not block]
    return tuple(
        hooks for each in parts for hooks in (each._forward_hooks, each._forward_pre_hooks)
    )


class Norm:
    """Hugging Face's RMS norm, rounded where it rounds.

    Args:
        module: Module whose weight and epsilon are used.
    """

    def __init__(self, module: Any) -> None:
        self._weight = module.weight.detach()
        self._shape = tuple(self._weight.shape)
        self._eps = float(module.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm over the last dimension."""
        # The weight is multiplied after rounding: given to rms_norm, it would be before.
        return torch.rms_norm(x, self._shape, None, self._eps).mul_(self._weight)


class LeanNorm(nn.Module):
    """Stands in for a final norm: one call of compiled code, where Hugging Face's is six.

    Args:
        module: A norm of one of ``NORMS``; its parameters and hooks stay its own, and where
            gradients are wanted it computes them.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._plain = (module,)  # in a tuple, so that its parameters are not listed twice
        self._norm = norm_of(module.weight.detach(), module.variance_epsilon)
        self._parameters = module._parameters
        self._forward_hooks = module._forward_hooks
        self._forward_pre_hooks = module._forward_pre_hooks

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension."""
        if torch.is_grad_enabled():
            return self._plain[0].forward(x)  # type: ignore[no-any-return]
        return self._norm(x)


class Rotation:
    """Turns queries and keys by position; one for all layers of a stack, which share its angles."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def __call__(self, heads_BTNH: Tensor, rotary: Rotary) -> Tensor:
        """Each head x becomes x · cos + (-right, left) · sin, as in ``apply_rotary_pos_emb``."""
        cos_BTH, sin_BTH = rotary
        half = sin_BTH.shape[-1] // 2
        if sin_BTH is not self._of:  # a new step, or other rows of it
            left, right = sin_BTH[:, :, None].chunk(2, dim=-1)
            # The sign is exact, whichever factor has it.
            self._sin = torch.cat((-left, right), dim=-1)
            self._cos = cos_BTH[:, :, None]
            self._of = sin_BTH
        turned = heads_BTNH.roll(half, -1).mul_(self._sin)
        return turned.add_(heads_BTNH * self._cos)


class LeanLayer(nn.Module):
    """Stands in for a decoder layer; its parameters and hooks are the layer's own.

    Args:
        layer: Clone of a layer with a lean form. Runs in its place while a part of it is hooked.
        rotation: Shared by all layers of a stack.
        fuse: Makes one product of several linear maps.
        form: What compiled code must know of it; None: it cannot be compiled.

    Attributes:
        compiled: Runs it, among the layers of its stack, in one call; None: nothing does.
        compiled_rows: Up to so many tokens are left to compiled code.
    """

    def __init__(
        self, layer: Any, rotation: Rotation, fuse: FuseLinears, form: LayerForm | None
    ) -> None:
        super().__init__()
        self.form = form
        self.compiled: CompiledLayers | None = None
        self.compiled_rows = 0
        self._modules = layer._modules
        self._forward_hooks = layer._forward_hooks
        self._forward_pre_hooks = layer._forward_pre_hooks
        self._hooked_within = _hooks_within(layer)
        attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
        # In a tuple, so that they are found without the detour by which modules look up modules.
        self._parts = (layer,)
        self.index: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._scaling: float = attention.scaling
        self._keys = config.num_key_value_heads
        self._queries = attention.num_key_value_groups * self._keys
        self._rotation = rotation if getattr(attention, "use_rope", True) else None
        self._norms = (Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm))
        has_head_norms = hasattr(attention, "q_norm")
        self._head_norms = (
            (Norm(attention.q_norm), Norm(attention.k_norm)) if has_head_norms else None
        )
        self._qkv = fuse((attention.q_proj, attention.k_proj, attention.v_proj))
        self._out = fuse((attention.o_proj,))
        self._gate_up = fuse((mlp.gate_proj, mlp.up_proj))
        self._down = fuse((mlp.down_proj,))

    def forward(
        self,
        x_BTD: Tensor,
        *,
        attention_mask: Any,
        past_key_values: KVUpdate | None,
        position_embeddings: Rotary,
    ) -> Tensor:
        """What the layer computes, [B, T, D]; arguments as ``run_layer`` gives them."""
        if any(self._hooked_within):
            [layer] = self._parts
            return layer.forward(  # type: ignore[no-any-return]
                x_BTD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
            )
        if (
            self.compiled is not None
            and x_BTD.numel() <= self.compiled_rows * x_BTD.shape[-1]
            and type(past_key_values) is SlotKV
        ):
            step = (x_BTD, attention_mask, past_key_values, position_embeddings)
            return self.compiled.run(self.index, self.index + 1, *step)
        attend, think = self._norms
        heads_BTNH = self._heads(attend(x_BTD))
        context_BTX = self._attend(heads_BTNH, attention_mask, past_key_values, position_embeddings)
        x_BTD = self._out(context_BTX).add_(x_BTD)
        gate_BTF, up_BTF = self._gate_up(think(x_BTD)).chunk(2, dim=-1)
        return self._down(nn.functional.silu(gate_BTF).mul_(up_BTF)).add_(x_BTD)

    @property
    def is_hooked(self) -> bool:
        """Whether somebody wants to know when this layer, or a part of it, is called."""
        own = self._forward_hooks or self._forward_pre_hooks
        return bool(own) or any(self._hooked_within)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """Queries, keys and values, head by head, [B, T, N, H]."""
        rows, tokens, _ = x_BTD.shape
        return self._qkv(x_BTD).view(rows, tokens, -1, self._head_dim)

    def _attend(self, heads_BTNH: Tensor, mask: Any, kv: KVUpdate | None, rotary: Rotary) -> Tensor:
        turning = self._queries + self._keys
        turned_BTNH = heads_BTNH[:, :, :turning]
        if self._head_norms is not None:
            parts = turned_BTNH.tensor_split([self._queries], 2)
            normed = zip(self._head_norms, parts, strict=True)
            turned_BTNH = torch.cat([norm(heads) for norm, heads in normed], dim=2)
        if self._rotation is not None:
            turned_BTNH = self._rotation(turned_BTNH, rotary)
        queries, keys = turned_BTNH.transpose(1, 2).tensor_split([self._queries], 1)
        values = heads_BTNH[:, :, turning:].transpose(1, 2)
        if kv is not None:
            keys, values = kv.update(keys, values, self.index)
        context_BTNH, _ = slot_attention(self, queries, keys, values, mask, self._scaling)
        return context_BTNH.flatten(2)


class LeanRun:
    """Runs neighbouring layers of a stack in one call, where nobody asks to see one of them.

    Args:
        layers: All layers of the stack.
        compiled: Runs them.
    """

    def __init__(self, layers: Sequence[LeanLayer], compiled: CompiledLayers) -> None:
        self._layers = tuple(layers)
        self._run = compiled.run

    def __call__(
        self, first: int, last: int, x_BTD: Tensor, rotary: Rotary, mask: Any, kv: Any
    ) -> Tensor | None:
        """What the layers compute, [B, T, D]; None where they have to be run one by one."""
        if type(kv) is not SlotKV or last > len(self._layers):
            return None
        tokens = x_BTD.numel() // x_BTD.shape[-1]
        for layer in self._layers[first:last]:
            if tokens > layer.compiled_rows or layer.is_hooked:
                return None
        return self._run(first, last, x_BTD, mask, kv, rotary)
