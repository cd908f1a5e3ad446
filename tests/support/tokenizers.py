"""Small tokenizers of the kinds that decode each in their own way."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_fallback_tokenizer() -> Any:
    """Like Llama 2's: ▁ for spaces, single bytes for what is in no word, first space dropped."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "▁b", "a"]
    core = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def byte_level_tokenizer(*special: str) -> Any:
    """Like GPT-2's without merges: a token for each byte, then the special ones, <|end|> first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|end|>", *special])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def word_tokenizer(vocab: int) -> Any:
    """A token per word: ``w5`` is token 5; any other word is token 1, and 0 is padding."""
    core = Tokenizer(
        models.WordLevel(
            vocab={"<pad>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, vocab)},
            unk_token="<unk>",
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", model_max_length=10**6
    )
