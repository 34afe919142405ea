"""Progress on long work. Silent unless someone listens: the CLI does on a terminal, and :func:`listen` does for a library user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, int, int | None], None]
_listener: ContextVar[Listener | None] = ContextVar("tersor_progress", default=None)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield from ``items`` and tell whoever listens how many are done.

    ``label``: what is being done, in a word or two. ``total``: how many there are, where ``len`` cannot say.
    """
    listener = _listener.get()
    if listener is None:
        yield from items
        return
    if total is None:
        try:
            total = len(items)  # type: ignore[arg-type]
        except TypeError:
            total = None
    listener(label, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        listener(label, done, total)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Call ``listener(label, done, total)`` for all progress made inside the block (``total`` is None where unknown)."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def on_terminal(enabled: bool | None = None) -> Iterator[None]:
    """Progress bars on standard error inside the block; ``enabled`` None: only where that is a terminal."""
    import sys

    if enabled is None:
        enabled = sys.stderr.isatty()
    if not enabled:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    tasks: dict[str, int] = {}

    def show(label: str, done: int, total: int | None) -> None:
        if label not in tasks:
            tasks[label] = bars.add_task(label, total=total)
        bars.update(tasks[label], completed=done, total=total)  # type: ignore[arg-type]
        if total is not None and done >= total:
            bars.remove_task(tasks.pop(label))  # type: ignore[arg-type]

    with bars, listen(show):
        yield
