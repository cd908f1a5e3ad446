"""What the command line says to unusable input, and that it leaves nothing behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offramp.deploy.demo.demo_config import MARKER
from offramp.deploy.serve.redis_server import EmbeddedRedis

NOWHERE = "redis://127.0.0.1:1"
BAD_MODELS = {
    "missing": "there is no folder",
    "empty": "holds no config.json",
    "no causal LM": "is not a causal LM",
    "unsupported": "is a BloomForCausalLM, which is not supported",
    "damaged": "is damaged",
}

Untouched = Callable[[], None]
BadModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("kind", BAD_MODELS)
@pytest.mark.parametrize("command", ["record", "serve", "demo"])
def test_a_bad_model_is_named_before_anything_is_started(
    cli: Any, bad_model: BadModel, out: Path, untouched: Untouched, command: str, kind: str
) -> None:
    options = [] if command == "serve" else ["--out", out]
    model = bad_model(kind)
    untouched()
    message = cli.refused(command, "--model", model, *options)
    assert message.startswith("model: ")
    assert BAD_MODELS[kind] in message
    assert str(model) in message


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--exits", "3,x", "exits"),
        ("--exits", "6,3", "exits"),
        ("--exits", "3,3", "exits"),
        ("--exits", "0,3", "exits"),
        ("--exits", "-3", "exits"),
        ("--exits", "3,12", "exits"),
        ("--exits", "3;6", "exits"),
        ("--candidates", "4097", "candidates"),
        ("--dtype", "float16", "dtype"),
        ("--device", "tpu", "device"),
        ("--device", "cuda:99", "device"),
        ("--corpus", "no/such/folder", "corpus"),
        ("--documents", "3", "corpus"),
    ],
)
def test_record_names_the_bad_option(
    cli: Any, out: Path, untouched: Untouched, option: str, value: str, field: str
) -> None:
    untouched()
    assert cli.refused("record", "--out", out, option, value).startswith(f"{field}: ")


def test_record_refuses_a_corpus_without_documents(
    cli: Any, tmp_path: Path, out: Path, untouched: Untouched
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "short.txt").write_text("too short")
    (corpus / "other.md").write_text("x\n" * 5000)
    untouched()
    message = cli.refused("record", "--out", out, "--corpus", corpus)
    assert re.match(r"corpus: .*holds no usable document", message)


@pytest.mark.parametrize("command", [["record"], ["demo"]])
def test_files_that_are_there_are_not_written_over(
    cli: Any, out: Path, untouched: Untouched, command: list[str]
) -> None:
    out.mkdir()
    (out / "precious").write_text("data")
    untouched()
    message = cli.refused(*command, "--out", out)
    assert message.startswith("out: ")
    assert str(out) in message


@pytest.mark.parametrize("command", [["record"], ["demo"], ["train", "--traces", "no/such/folder"]])
def test_a_file_is_no_folder_to_write_into(
    cli: Any, out: Path, untouched: Untouched, command: list[str]
) -> None:
    out.write_text("data")
    untouched()
    assert cli.refused(*command, "--out", out).startswith("out: ")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--host", "0.0.0.0"], "host"),
        (["--dtype", "int8"], "dtype"),
        (["--device", "gpu"], "device"),
        (["--trust", "no/such/key"], "public key"),
        (["--trust", "README.md"], "public key"),
    ],
)
def test_serve_names_the_bad_option(
    cli: Any, untouched: Untouched, options: list[str], field: str
) -> None:
    untouched()
    assert cli.refused("serve", *options).startswith(f"{field}: ")


def test_serve_and_demo_name_a_port_that_is_taken(
    cli: Any,
    out: Path,
    untouched: Untouched,
    monkeypatch: pytest.MonkeyPatch,
    redis_url: str,
    taken_port: int,
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    untouched()
    for command in (["serve"], ["demo", "--out", out]):
        message = cli.refused(*command, "--port", taken_port)
        assert message.startswith(f"port: 127.0.0.1:{taken_port} cannot be used")


def test_serve_names_a_port_that_its_redis_cannot_have(
    cli: Any, untouched: Untouched, taken_port: int
) -> None:
    untouched()
    message = cli.refused("serve", "--redis-port", taken_port)
    assert message.startswith("redis_port: ")


@pytest.mark.parametrize(
    "command", [["serve"], ["demo"], ["status"], ["promote", "1"], ["rollback"]]
)
@pytest.mark.parametrize("url", [NOWHERE, "http://127.0.0.1", "redis://127.0.0.1:port"])
def test_a_registry_out_of_reach_is_named(
    cli: Any,
    out: Path,
    untouched: Untouched,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    url: str,
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    untouched()
    options = ["--out", out] if command == ["demo"] else []
    assert cli.refused(*command, *options).startswith("REDIS_URL: ")


@pytest.mark.parametrize("command", [["status"], ["promote", "1"], ["rollback"]])
def test_control_commands_ask_for_redis_url(
    cli: Any, untouched: Untouched, command: list[str]
) -> None:
    untouched()
    assert cli.refused(*command).startswith("REDIS_URL: is not set")


def test_generations_that_were_never_published_are_named(
    cli: Any, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_url)
    assert "generation" in cli.refused("promote", 5)
    assert cli.refused("rollback", "--to", 3)
    assert cli.refused("rollback")
    status, output = cli("status")
    assert status == 0
    assert "head: none" in output


def test_a_demo_that_cannot_run_leaves_the_last_ones_report(
    cli: Any, out: Path, untouched: Untouched, bad_model: BadModel, taken_port: int
) -> None:
    out.mkdir()
    (out / MARKER).touch()
    (out / "report.json").write_text("{}")
    model = bad_model("empty")
    untouched()
    assert cli.refused("demo", "--out", out, "--port", taken_port).startswith("port: ")
    assert cli.refused("demo", "--out", out, "--model", model).startswith("model: ")


@pytest.mark.parametrize("command", ["serve", "demo", "status", "doctor"])
def test_a_misspelt_variable_is_refused_with_a_suggestion(
    cli: Any, untouched: Untouched, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("OFFRAMP_CHANEL", "x")
    untouched()
    message = cli.refused(command)
    assert message == "OFFRAMP_CHANEL: is no known setting. Did you mean OFFRAMP_CHANNEL."


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["record", "--speed", "11"], "--speed"),
        (["record"], "--out"),
        (["record", "--out", "x", "--documents", "2"], "--documents"),
        (["train", "--traces", "x", "--out", "y", "--steps", "many"], "--steps"),
        (["promote", "0"], "generation"),
        (["promote"], "generation"),
        (["serve", "--port", "70000"], "--port"),
        (["dance"], "dance"),
    ],
)
def test_usage_errors_name_the_option(
    cli: Any, untouched: Untouched, arguments: list[str], named: str
) -> None:
    untouched()
    status, output = cli(*arguments)
    assert status == 2
    assert "Traceback" not in output
    assert named in output.lower()


def test_the_doctor_finds_this_machine_well(cli: Any, home: Path) -> None:
    status, output = cli("doctor")
    assert status == 0, output
    assert "fail" not in output
    assert "models/reference decodes (12 layers" in output
    assert not home.exists()


def test_the_doctor_names_what_is_missing(
    cli: Any, monkeypatch: pytest.MonkeyPatch, bad_model: BadModel
) -> None:
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    status, output = cli("doctor", "--model", bad_model("missing"))
    assert status == 1
    failures = [line for line in output.splitlines() if line.startswith("fail")]
    assert [line.split()[1] for line in failures] == ["redis:", "model:"]
    assert "there is no folder" in failures[1]
