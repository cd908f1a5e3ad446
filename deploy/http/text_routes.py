"""Routes between text and token ids, as vLLM has them."""

from __future__ import annotations

from fastapi import FastAPI

from offramp.controller.errors import RequestError
from offramp.deploy.http.backend import Pool
from offramp.deploy.http.chat_prompts import encode_conversation
from offramp.deploy.http.served_models import ServedModels
from offramp.deploy.http.shapes.chat_contract import Conversation
from offramp.deploy.http.shapes.contract import Integers
from offramp.deploy.http.shapes.offramp_options import Nullable
from offramp.deploy.http.shapes.reply_shapes import DetokenizeReply, TokenizeReply
from offramp.worker.engine.admission import require_tokens
from offramp.worker.engine.detokenize import decode


class TokenizeRequest(Nullable):
    """Body of POST /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Conversation | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Nullable):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Integers


def add_text_routes(app: FastAPI, models: ServedModels) -> None:
    """Add them to an app."""

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeReply:
        backend = models.named(body.model)
        tokens = await _tokens(backend, body)
        return {"count": len(tokens), "max_model_len": backend.most_tokens, "tokens": tokens}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeReply:
        backend = models.named(body.model)
        encoder, tokenizer = backend.encoder, backend.tokenizer
        require_tokens("tokens", body.tokens, len(tokenizer))
        return {"prompt": await encoder.aside(decode, tokenizer, body.tokens)}


async def _tokens(backend: Pool, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt", "and messages: one of the two is needed", "Send one")
    if body.messages is not None:
        return list(await encode_conversation(backend, [each.plain for each in body.messages]))
    encoder, rendered = backend.encoder, not body.add_special_tokens
    return await encoder.aside(lambda: encoder.tokens_of(body.prompt or "", rendered=rendered))
