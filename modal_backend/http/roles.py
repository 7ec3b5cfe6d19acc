"""The role of a request: by its path, by its model's name, or by `input_type`.

Clients of OpenAI's API send the same request for a query and for a document, and most cannot add a
field. All of them can be given a base URL or a model's name.
"""

from __future__ import annotations

import logging
from typing import get_args

from kalm_integrations.errors import ConfigurationError
from kalm_integrations.prompts import Role
from modal_backend.http.schema import EmbeddingsBody

log = logging.getLogger(__name__)


def split_model(name: str, served: str) -> tuple[str, Role | None]:
    """A model's name without `:query` or `:document` at its end, and that role."""
    for role in get_args(Role):
        if name == f"{served}:{role}":
            return served, role
    return name, None


def set_role(fields: EmbeddingsBody, path_role: Role | None, model_role: Role | None) -> None:
    """Set `fields.input_type` to the role that path, model or `input_type` name.

    Raises:
        ConfigurationError: They disagree; or path or model names a role and the body a priority,
            which only clients send that choose their role, or apply their instruction, themselves.
    """
    address = {}
    if path_role:
        address[f"the path /{path_role}/v1"] = path_role
    if model_role:
        address[f"model={fields.model!r}"] = model_role
    stated = dict(address)
    if fields.input_type:
        stated[f"input_type={fields.input_type!r}"] = fields.input_type
    if len(set(stated.values())) > 1:
        raise ConfigurationError(f"{' and '.join(stated)} name different roles; keep one of them.")
    if address and fields.priority:
        raise ConfigurationError(
            f"priority={fields.priority!r} and {' and '.join(address)}: send a priority only to "
            "/v1 and the model's bare name, as KalmClient does, which adds the instruction itself."
        )
    fields.input_type = path_role or model_role or fields.input_type


class RoleCheck:
    """Warns of callers whose requests name no role, once for each."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def warn(self, fields: EmbeddingsBody, caller: str) -> None:
        """Warn if `fields` say nothing of a role; `caller` names its key."""
        if fields.input_type or fields.instruction or fields.priority or caller in self._warned:
            return
        self._warned.add(caller)
        log.warning(
            "caller %s: a request names no role, so a query in it gets no instruction and finds "
            "less. Use the base URL /query/v1 for queries and /document/v1 for documents, or the "
            "model names that end in :query and :document (docs/other-clients.md).",
            caller,
        )
