"""Why ``offramp serve`` cannot serve: one sentence, or one line of JSON, and never a traceback."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview, ServeStatus

from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import tune_classes
from offramp.controller.errors import ConfigError
from offramp.deploy.serve import serve_app
from support.classifying.labelled_files import encoder_folder, labelled_file
from support.classifying.sequence_models import make_encoder
from support.tokenizers import word_tokenizer


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
        (("--prompt-keep", "3,5"), "prompt_keep: does nothing without a policy for prompts"),
        (("--grow-after", "3"), "grow_after: the pool does not grow. Give --max-replicas"),
        (("--classify", "no_such"), "heads: "),
        (("--classify", "h", "--translators", "t"), "translators: means nothing with --classify"),
        (("--classify", "h", "--prefill", "exits"), "prefill: means nothing with --classify"),
        (("--classify", "h", "--hold", "6"), "hold: means nothing with --classify"),
    ],
)
def test_options_that_cannot_be_used_so_are_named(
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


def test_heads_of_another_model_are_refused_before_ray_starts(cli: Any, tmp_path: Path) -> None:
    heads, data = tmp_path / "heads", labelled_file(tmp_path / "texts.csv", texts=60)
    own = encoder_folder(tmp_path / "own")
    tune_classes(ClassifyTuneConfig(model=str(own), data=data), heads)
    make_encoder("roberta").save_pretrained(tmp_path / "other")
    word_tokenizer(97).save_pretrained(tmp_path / "other")
    told = cli.refused("serve", "--model", tmp_path / "other", "--classify", heads)
    assert told.startswith(f"heads: {heads} was fitted to another model")


TOLD = (
    "\nof it\n    raise\nofframp.controller.errors.ConfigError: costs: were measured elsewhere.\n\n"
)


def test_of_a_deployment_that_failed_the_workers_own_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Deploying app 'mine' failed: Failed to update the deployments ['w'].")

    def status() -> ServeStatus:
        parts: dict[str, Any] = {"replica_states": {}, "status_trigger": "UNSPECIFIED"}
        failed = DeploymentStatusOverview(status="DEPLOY_FAILED", message=TOLD, **parts)
        fine = DeploymentStatusOverview(status="HEALTHY", message="ValueError: no", **parts)
        app: dict[str, Any] = {"status": "DEPLOY_FAILED", "message": "", "last_deployed_time_s": 0}
        apps = {
            "mine": ApplicationStatusOverview(deployments={"w": failed, "v": fine}, **app),
            "other": ApplicationStatusOverview(deployments={"w": fine}, **app),
        }
        return ServeStatus(applications=apps)

    monkeypatch.setattr("ray.serve.run_many", fail)
    monkeypatch.setattr("ray.serve.status", status)
    target = serve.RunTarget(None, name="mine")
    with pytest.raises(ConfigError) as failed:
        serve_app._deploy([target])
    assert str(failed.value) == "workers: none could start: costs: were measured elsewhere."


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
    monkeypatch.setattr("ray.serve.status", ServeStatus)
    with pytest.raises(ConfigError) as failed:
        serve_app._deploy([])
    why = "none could start: costs: were measured on another model."
    assert str(failed.value) == f"workers: {why}"
