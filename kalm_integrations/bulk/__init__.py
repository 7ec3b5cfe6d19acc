"""Bulk: a corpus of any size into shards of Parquet, killed at any moment, nothing lost.

`embed_corpus` is what `kalm embed` runs; `read` gives rows and vectors back, for stores. They need
the extra "bulk".
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kalm_integrations.bulk.job import embed_corpus as embed_corpus
    from kalm_integrations.bulk.job import estimate as estimate
    from kalm_integrations.bulk.options import Options as Options
    from kalm_integrations.bulk.reading import Rows as Rows
    from kalm_integrations.bulk.reading import read as read

_HOMES: Final = {
    "Options": "options",
    "Rows": "reading",
    "embed_corpus": "job",
    "estimate": "job",
    "read": "reading",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ImportError as error:
        from kalm_integrations.install_hints import install_command

        raise ImportError(
            f"kalm_integrations.bulk needs pyarrow: {install_command('bulk')}."
        ) from error
