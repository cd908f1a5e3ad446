"""The ``offramp`` command."""

from __future__ import annotations

import sys

import typer
from rich.markup import escape

from offramp.controller.errors import OfframpError
from offramp.deploy.commands import control, learning, serving
from offramp.deploy.console import console

app = typer.Typer(
    name="offramp",
    help="Learned early exits for transformer serving: record, learn, publish, hot-swap, query.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
learning.add_to(app)
control.add_to(app)
serving.add_to(app)


def main() -> None:
    """Run the command; expected failures end in one sentence and exit status 1."""
    try:
        app()
    except (OfframpError, OSError) as error:
        console.print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
