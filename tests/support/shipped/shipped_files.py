"""Containers with their commands, from the Dockerfile, from compose and from the manifests."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from offramp.deploy.cli.main import build_app

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"

SHELL_COMMAND = re.compile(r"(?:^[ #]*|-- |[;&|] )offramp ([a-z][^;&|\n`#]*)", re.MULTILINE)
"""What follows the word in a line of shell."""

MADE_UP = "redis-made-up-secret"


@dataclass(frozen=True)
class Shipped:
    """A container of ours as one file describes it.

    Attributes:
        place: Names it in messages.
        command: Arguments of ``offramp``.
        environment: Its variables; secrets have made-up values.
        mounts: Paths that come from outside of the image.
        grace_s: Seconds between SIGTERM and SIGKILL.
        pause_s: Seconds of them that pass before the command is told.
        probe: The command that is asked whether it lives; empty where there is none.
    """

    place: str
    command: list[str]
    environment: dict[str, str]
    mounts: list[str]
    grace_s: float
    pause_s: float = 0.0
    probe: tuple[str, ...] = ()


def compose() -> dict[str, Any]:
    """The compose file, its variables filled in."""
    text = (DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(re.sub(r"(?<!\$)\$\{\w+(:[?-][^}]*)?\}", MADE_UP, text))
    return found


def manifests(folder: str = "kubernetes") -> list[dict[str, Any]]:
    """Every Kubernetes object in the files of a folder."""
    files = sorted((DEPLOY / folder).glob("*.yaml"))
    texts = (file.read_text(encoding="utf-8") for file in files)
    return [found for text in texts for found in yaml.safe_load_all(text)]


def pods() -> dict[str, dict[str, Any]]:
    """Every pod that the manifests make, by its owner's name."""
    return {
        found["metadata"]["name"]: found["spec"]["template"]["spec"]
        for found in manifests()
        if "template" in found.get("spec", {})
    }


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments."""
    text = (DEPLOY / "image" / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    parts = (line.partition(" ") for line in text.splitlines() if line)
    return [(word, rest.strip()) for word, _, rest in parts]


def parse(command: list[str]) -> dict[str, Any]:
    """What ``offramp`` would be told; a flag or a value that it does not take raises."""
    at: Any = get_command(build_app(command))
    context = at.make_context("offramp", list(command))
    while hasattr(at, "resolve_command"):
        name, at, rest = at.resolve_command(context, [*context._protected_args, *context.args])
        context = at.make_context(name, rest, parent=context)
    parameters: dict[str, Any] = context.params
    return parameters


def shell_commands(text: str) -> list[list[str]]:
    """Commands of offramp in lines of shell."""
    return [shlex.split(found) for found in SHELL_COMMAND.findall(text)]


def containers() -> Iterator[Shipped]:
    """Every container of compose and of the manifests that runs a command of offramp."""
    for name, service in compose()["services"].items():
        if service["image"] == "offramp" and "entrypoint" not in service:
            yield Shipped(
                f"compose {name}",
                service["command"],
                service["environment"],
                [volume.split(":")[1] for volume in service["volumes"]],
                float(service.get("stop_grace_period", "10s").removesuffix("s")),
                probe=tuple(service.get("healthcheck", {}).get("test", ())),
            )
    for name, pod in pods().items():
        for container in pod["containers"]:
            if container["image"] == "offramp":
                pause = container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
                yield Shipped(
                    f"pod {name}, {container['name']}",
                    container["args"],
                    {
                        each["name"]: each.get("value", f"redis://{MADE_UP}")
                        for each in container["env"]
                    },
                    [mount["mountPath"] for mount in container["volumeMounts"]],
                    pod.get("terminationGracePeriodSeconds", 30),
                    float(pause.get("command", [0])[-1]),
                    tuple(container.get("livenessProbe", {}).get("exec", {}).get("command", ())),
                )
