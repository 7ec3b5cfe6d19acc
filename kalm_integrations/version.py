"""The version, where the package's metadata are not: in a container that has its sources only."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
