"""Option that commands about releases share."""

from __future__ import annotations

from typing import Annotated

import typer

Channel = Annotated[
    str | None,
    typer.Option(help="Stream of releases to write or to read.", show_default="OFFRAMP_CHANNEL"),
]
"""The channel that a command is about."""
