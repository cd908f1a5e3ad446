"""Why ``offramp serve`` cannot serve: one sentence, or one line of JSON, and never a traceback."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import ray

from offramp.controller.errors import ConfigError
from offramp.deploy.serve import serve_app


def test_the_reason_is_json_where_lines_are(
    cli: Any, monkeypatch: pytest.MonkeyPatch, taken_port: int
) -> None:
    lines: list[str] = []
    monkeypatch.setattr("offramp.deploy.cli.pool.serving.show_line", lines.append)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for option, value in (("model", "no_such"), ("port", taken_port), ("dtype", "int8")):
        status, said = cli("serve", "--log-format", "json", f"--{option}", value)
        assert (status, said) == (1, "")
        line = json.loads(lines.pop())
        assert (line["level"], line["process"], line["field"]) == ("error", "command", option)
        assert line["message"].startswith(f"{option}: ")
        assert "error" not in line, "a traceback"
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert lines == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prefill", "exits"), "prefill: exits needs a policy for prompts"),
        (("--prefill", "half"), "prefill: 'half' is unknown"),
        (("--prompt-keep", "4"), "prompt_keep: '4' is not two numbers"),
        (("--prompt-policy", "no_such"), "policy folder:"),
    ],
)
def test_prompts_that_cannot_be_read_so_are_named(
    cli: Any, options: tuple[str, ...], said: str
) -> None:
    status, output = cli("serve", *options)
    assert status == 1
    assert said in " ".join(output.split())


@pytest.mark.parametrize("address", [None, "127.0.0.1:1"])
def test_a_ray_that_does_not_start_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    def fail(**_: Any) -> None:
        raise OSError("the disk is full.\n")

    monkeypatch.setattr(ray, "init", fail)
    with (
        pytest.raises(ConfigError, match="ray: .* disk is full. " if address is None else "at '"),
        serve_app.ray_session(address, 1),
    ):
        pytest.fail("it started")


def test_of_a_workers_traceback_its_last_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    told = """Deploying application offramp failed: the deployment failed to start 3 times in a row.
    Traceback (most recent call last):
      File "replica.py", line 66, in __init__
    offramp.controller.errors.ConfigError: costs: were measured on another model.

    See the logs.
    """

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(told)

    monkeypatch.setattr("ray.serve.run_many", fail)
    with pytest.raises(ConfigError) as failed:
        serve_app._deploy([])
    why = "none could start: costs: were measured on another model."
    assert str(failed.value) == f"workers: {why}"
