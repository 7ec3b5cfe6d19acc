"""The snippets of docs/environments.md, by heading."""

from __future__ import annotations

import re
from pathlib import Path

LIMIT = 120  # seconds; a program that takes longer hangs
PAGE = Path(__file__).parents[1] / "docs" / "environments.md"
SNIPPETS = dict(re.findall(r"^## (.+?)$.*?```python\n(.*?)```", PAGE.read_text(), re.M | re.S))
LOCAL = {"KALM_BACKEND": "local"}
"""Variables with which they need no service."""
