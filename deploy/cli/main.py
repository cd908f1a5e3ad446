"""The ``offramp`` command: its subcommands, and how expected failures end."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from offramp.controller.errors import OfframpError
from offramp.deploy.cli.console import say

TOPICS = {
    "record": "cli.record_drift",
    "drift": "cli.record_drift",
    "train": "cli.teaching",
    "evaluate": "cli.evaluating",
    "calibrate": "cli.calibrating",
    "import": "cli.tuning",
    "tune": "cli.tuning",
    "profile": "cli.profiling",
    "publish": "cli.releases.control",
    "promote": "cli.releases.control",
    "rollback": "cli.releases.control",
    "status": "cli.releases.control",
    "watch": "cli.releases.control",
    "learn": "cli.releases.continual",
    "history": "cli.releases.past",
    "diff": "cli.releases.past",
    "keys": "cli.releases.keys",
    "console": "console.console_command",
    "clients": "clients.clients_command",
    "serve": "cli.pool.serving",
    "demo": "demo.demo_command",
    "doctor": "cli.doctor",
}
"""Module of each command. Only the one in use is imported: ``status`` must not wait for torch."""


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The command line, with the commands of the topic that is asked for, or all of them."""
    app = typer.Typer(
        name="offramp",
        help="Learned early exits for transformer serving: record, learn, publish, query.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    # Typer makes an app of a single command that command; with a callback it stays a group.
    app.callback()(lambda: None)
    asked = TOPICS.get(arguments[0]) if arguments else None
    for topic in dict.fromkeys(TOPICS.values()) if asked is None else (asked,):
        importlib.import_module(f"offramp.deploy.{topic}").add_to(app)
    return app


def main() -> None:
    """Run the command; expected failures end in one sentence and exit status 1."""
    _keep_ray_local()
    # Told to end, clean up just as on Ctrl-C: what was started is stopped.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        build_app(sys.argv[1:])()
    except (OfframpError, OSError) as error:
        say(f"[bold red]error[/] {escape(str(error))}")
        sys.exit(1)


def _keep_ray_local() -> None:
    """Let a Ray of our own listen on loopback only, its metrics and agents included."""
    # Its only switch for that is a variable, which it reads as it is imported, in each process.
    if "ray" not in sys.modules and not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
