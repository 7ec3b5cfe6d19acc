"""Reports how many texts are finished: to a function of the caller, or as a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Progress = Callable[[int], object]
"""Called with the number of texts that were finished since the last call."""


def reporting(
    total: int, on_progress: Progress | None, show: bool
) -> AbstractContextManager[Progress]:
    """Report to `on_progress`; without one, show a bar if `show` is set, and there is some work."""
    if on_progress is not None:
        return nullcontext(on_progress)
    return progress_bar(total) if show and total > 1 else nullcontext(lambda _: None)


@contextmanager
def progress_bar(total: int, what: str = "Embedding") -> Iterator[Progress]:
    """A bar on stderr, or a widget in a notebook; yields what moves it on."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit=" texts") as bar:
        yield bar.update
