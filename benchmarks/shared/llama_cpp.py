"""llama.cpp on the same weights and prompts, through the wheels of ``xllamacpp``."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shared.timing import Report

REMEDY = 'pip install -e ".[peers]" (xllamacpp, gguf)'

STAND_IN = re.compile(r"<t(\d+)>")
"""A token of the vocabulary that ``write_gguf`` writes, by its number."""


def is_installed() -> bool:
    return all(find_spec(package) is not None for package in ("xllamacpp", "gguf"))


def description() -> str:
    """Version of the wheel, and the instructions that it was compiled for."""
    import xllamacpp

    return f"xllamacpp {xllamacpp.__version__}, {xllamacpp.get_system_info().strip(' |')}"


class LlamaCpp:
    """One model file, loaded for a batch of fixed size, as llama.cpp's server runs it in process.

    All prompts of a batch go in by one call, so they are read in one launch, and every later
    launch decodes one token of each. The clock is the server's own: from the first token, which
    comes with the prompts, to the last. It starts and stops within a millisecond for all rows.

    Args:
        path: A GGUF file with the vocabulary of ``write_gguf``.
        batch: Rows decoded together.
        tokens: Most tokens of a row, prompt included.
        threads: Threads of llama.cpp.
    """

    def __init__(self, path: Path, batch: int, tokens: int, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = batch
        params.n_ctx = batch * (256 * (tokens // 256 + 1))  # of each row, in llama.cpp's units
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_ram_mib = 0  # nothing is kept of a prompt that was served
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def run(self, prompts: list[list[int]], new: int) -> Report:
        """Decode greedily, ``new`` tokens a row."""
        answer: dict[str, Any] = self.server.handle_completions({
            "prompt": prompts, "n_predict": new, "samplers": ["top_k"], "top_k": 1,
            "ignore_eos": True, "cache_prompt": False,
        })  # fmt: skip
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        emitted = [[int(token) for token in STAND_IN.findall(each["text"])] for each in choices]
        if any(len(tokens) != new for tokens in emitted):
            raise RuntimeError(f"llama.cpp gave {[len(each) for each in emitted]} of {new} tokens")
        seconds = answer["timings"]["predicted_ms"] / 1e3
        return Report(seconds, (new - 1) * len(prompts), emitted=emitted)
