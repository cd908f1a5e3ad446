"""An object whose pickle executes code, so that a test sees whether somebody loads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Hostile:
    """Unpickled without care, it makes a folder.

    Args:
        mark: The folder.
    """

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)
