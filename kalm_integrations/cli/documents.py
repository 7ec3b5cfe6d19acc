"""The JSON documents that commands print; docs/cli.schema.json is their schema.

Run as a program, it prints that schema anew.
"""

from __future__ import annotations

from pydantic import BaseModel

from kalm_integrations.doctor.base import Finding


class DoctorReport(BaseModel):
    """`kalm doctor`: `backend` is null if the settings are wrong; `wake`: a start was allowed."""

    ok: bool
    summary: str
    version: str
    backend: str | None
    wake: bool
    checks: list[Finding]
