"""llama.cpp's HTTP server, of the wheels of ``xllamacpp``; ``peer_servers`` starts it.

Needs nothing but ``xllamacpp``.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

CONTEXT = 512
"""Tokens that a row has room for."""


def main(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    port: Annotated[int, typer.Option(help="Port to listen on.")],
    slots: Annotated[int, typer.Option(help="Rows decoded together.")],
    threads: Annotated[int, typer.Option(help="Threads of llama.cpp.")] = 1,
) -> None:
    import xllamacpp  # of the extra `peers`

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames, params.port = ["127.0.0.1"], port
    params.n_parallel, params.n_ctx = slots, slots * CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0  # nothing is kept of a prompt that was served
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    typer.run(main)
