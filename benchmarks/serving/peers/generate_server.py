"""``model.generate`` behind FastAPI, as most people write it: a thread and a streamer a request.

Started by ``serving.peers.peer_servers``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


def main(
    model: Annotated[Path, typer.Argument(help="Folder in Hugging Face format.")],
    port: Annotated[int, typer.Option(help="Port to listen on.")],
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    app = serving(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval(),
        AutoTokenizer.from_pretrained(model),
    )
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


def serving(model: Any, tokenizer: Any) -> FastAPI:
    """The application: one route that streams greedy completions."""
    app = FastAPI()

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> StreamingResponse:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        inputs = tokenizer(body["prompt"], return_tensors="pt")
        options = {**inputs, "max_new_tokens": body["max_tokens"], "do_sample": False}
        threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer}).start()
        return StreamingResponse(events(streamer), media_type="text/event-stream")

    return app


def events(texts: Iterator[str]) -> Iterator[str]:
    """One event for each piece of text, then the end."""
    for text in texts:
        yield event({"text": text, "finish_reason": None})
    yield event({"text": "", "finish_reason": "length"})
    yield "data: [DONE]\n\n"


def event(choice: dict[str, Any]) -> str:
    """A server-sent event in the shape of OpenAI's completions."""
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


if __name__ == "__main__":
    typer.run(main)
