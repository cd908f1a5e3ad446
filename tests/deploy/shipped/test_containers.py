"""What Dockerfile, compose and Kubernetes run are commands, settings and paths that there are."""

from __future__ import annotations

import re
import tomllib

import pytest

from offramp.deploy.http.gate import OPEN_ROUTES
from offramp.deploy.serve.fronting.front_keeper import STOP_S
from offramp.deploy.serve.settings import Settings
from support.shipped.shipped_files import (
    DEPLOY,
    ROOT,
    containers,
    instructions,
    parse,
    shell_commands,
)

SHIPPED = {each.place: each for each in containers()}
POOLS = [place for place in SHIPPED if place.endswith("pool")]
CONSOLES = [place for place in SHIPPED if place.endswith("console")]


def words(instruction: str) -> list[str]:
    """The Dockerfile's last instruction of that name, which is a list in JSON."""
    return re.findall(
        r'"([^"]*)"', [rest for word, rest in instructions() if word == instruction][-1]
    )


@pytest.mark.parametrize("place", SHIPPED)
def test_each_runs_a_command_with_settings_that_there_are(place: str) -> None:
    parse(SHIPPED[place].command)
    Settings.from_environment(SHIPPED[place].environment)


@pytest.mark.parametrize("place", POOLS)
def test_a_pool_finds_its_files_and_has_the_time_that_it_takes_to_stop(place: str) -> None:
    pool, told = SHIPPED[place], parse(SHIPPED[place].command)
    image = parse(words("CMD"))
    assert {name: told[name] for name in ("model", "trust", "host", "port")} == {
        name: image[name] for name in ("model", "trust", "host", "port")
    }
    assert str(told["trust"].parent) in pool.mounts
    assert {"/var/lib/offramp", "/home/offramp"} <= set(pool.mounts)
    assert pool.grace_s >= pool.pause_s + told["drain"] + STOP_S


@pytest.mark.parametrize("place", CONSOLES)
def test_a_console_signs_where_the_publisher_does_and_says_how_it_is(place: str) -> None:
    console, told = SHIPPED[place], parse(SHIPPED[place].command)
    [publisher] = (
        each
        for each in SHIPPED.values()
        if each.command[0] == "watch" and each.place.split()[0] == place.split()[0]
    )
    assert console.mounts == publisher.mounts
    assert console.environment.items() > publisher.environment.items()
    assert len(console.environment["OFFRAMP_CONSOLE_KEY"]) >= 16
    assert f"http://127.0.0.1:{told['port']}/health" in " ".join(console.probe)


def test_the_image_says_how_its_pool_is_and_runs_without_rights() -> None:
    told, said = parse(words("CMD")), dict(instructions())
    assert said["USER"] == "10001:10001"
    assert said["EXPOSE"] == str(told["port"])
    assert f"http://127.0.0.1:{told['port']}/health" in said["HEALTHCHECK"]
    assert "/health" in OPEN_ROUTES
    assert ("COPY", f"{told['model'][1:]} {told['model']}") in instructions()


def test_the_image_is_built_of_what_is_there() -> None:
    ignore = (DEPLOY / "image" / "Dockerfile.dockerignore").read_text().split("\n")
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    assert [path for path in let_in if not (ROOT / path).exists()] == []
    assert {path.name for path in (ROOT / "src/offramp").iterdir()} - {"research"} <= let_in
    sources = [rest.split()[:-1] for word, rest in instructions() if word == "COPY"]
    assert {path for paths in sources for path in paths if path[0].isalpha()} <= let_in


def test_the_image_has_a_python_and_a_torch_that_will_do() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    bases = [rest for word, rest in instructions() if word == "FROM"]
    assert [base for base in bases if f">={base[len('python:') :][:4]}" != wanted] == []
    change = next(rest for _, rest in instructions() if rest.startswith("sed "))
    basic, replacement = re.findall(r'"s/(.*)/(.*)/"', change)[0]
    # sed's basic expressions: groups have backslashes, a plus has none.
    pattern = basic.replace(")+", r")\+").replace(r"\(", "(").replace(r"\)", ")")
    pins = (ROOT / "constraints.txt").read_text()
    changed = re.sub(
        pattern, replacement.replace("${ACCELERATOR}", "cu130"), pins, flags=re.MULTILINE
    )
    assert re.findall(r"^torch==[\d.]+\+cu130$", changed, re.MULTILINE)


def test_what_comments_and_pages_say_to_type_is_taken() -> None:
    pages = [*DEPLOY.rglob("*.y*ml"), ROOT / "docs/operations.md", ROOT / "docs/control.md"]
    told = [command for page in pages for command in shell_commands(page.read_text())]
    assert len(told) > 5
    for command in told:
        parse(command)


def test_an_option_that_is_gone_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["serve", "--modle", "x"])
    assert shell_commands("test -e x || offramp keys new; cp") == [["keys", "new"]]
