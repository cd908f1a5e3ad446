"""Holds the server to its /openapi.json, with requests that schemathesis makes up: ``make fuzz``.

``make test`` does not collect this file; it takes two minutes whatever it finds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.limits import DEFAULT_LIMITS
from offramp.deploy.http.patience import LimitedConfig, PatientProtocol
from offramp.worker import AdaptiveEngine
from offramp.worker.engine.service import EngineService
from support.models import make_model
from support.tokenizers import byte_level_tokenizer

HOOKS = Path(__file__).with_name("fuzz_hooks.py")
MOST_S = 100
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"

LEFT_OUT = (
    # What is well-formed may still be more than there is room for, or a model that is not served.
    "positive_data_acceptance",
    # Unknown fields are ignored, and null is the same as absent.
    "negative_data_rejection",
)


@pytest.fixture
def url(stand_in: Any) -> Iterator[str]:
    """A small model with a chat template, behind the real server."""
    tokenizer = byte_level_tokenizer("<|start|>")
    tokenizer.chat_template = TEMPLATE
    model = make_model("llama", vocab_size=258, max_position_embeddings=64)
    service = EngineService(AdaptiveEngine(model, tokenizer, slots=16), max_waiting=256)
    service.start()
    settings = LimitedConfig(
        create_app(stand_in(service)), port=0, http=PatientProtocol, ws="none", log_config=None
    )
    settings.limits = DEFAULT_LIMITS
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    service.stop()


@pytest.mark.timeout(300)
def test_no_request_breaks_the_server_or_its_promises(url: str, tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{url}/openapi.json"]
    options = ["--max-time", MOST_S, "--exclude-checks", ",".join(LEFT_OUT), "--no-shrink"]
    options += ["--request-timeout", 20, "--seed", 0, "--continue-on-failure"]
    done = subprocess.run(
        list(map(str, [*command, *options])),
        env=os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS), "PYTHONPATH": str(HOOKS.parent)},
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
