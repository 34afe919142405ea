"""Contestants take turns; rows hold both sides of one run and the aim that was stated beforehand."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class Row:
    """``ours`` and ``theirs`` in ``unit``. ``aim``: the bound of ours / theirs (or of ours itself, where there is no peer), a
    lower bound where higher is ``better``, else an upper one."""

    case: str
    measure: str
    unit: str
    ours: float | None = None
    peer: str = ""
    theirs: float | None = None
    better: str = "higher"
    aim: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over theirs."""
        return self.ours / self.theirs if self.ours is not None and self.theirs else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without an aim or without a figure."""
        value = self.ratio if self.peer else self.ours
        if self.aim is None or value is None:
            return None
        return value >= self.aim if self.better == "higher" else value <= self.aim

    def asdict(self) -> dict[str, Any]:
        return {**attrs.asdict(self), "ratio": self.ratio, "met": self.met}


@attrs.frozen
class Report:
    """What one topic gives."""

    title: str
    rows: list[Row]
    notes: list[str] = attrs.field(factory=list)


@attrs.frozen
class Size:
    """How much to measure: ``quick`` shows that it works, ``full`` adds what takes minutes."""

    quick: bool = False
    full: bool = False

    def pick(self, quick: Any, usual: Any) -> Any:
        return quick if self.quick else usual


def say(text: str) -> None:
    """Progress, on stderr."""
    sys.stderr.write(f"  {text}\n")
    sys.stderr.flush()


def turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant; they take turns, after one round that is not counted. A contestant that returns a
    float has measured itself."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + (rounds > 1)):
        for name, run in contestants.items():
            start = time.perf_counter()
            own = run()
            spent = time.perf_counter() - start
            if i or rounds == 1:
                seconds[name].append(own if isinstance(own, float) else spent)
    return {name: statistics.median(s) for name, s in seconds.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the block and its child processes print to stdout goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def there(module: str) -> bool:
    """Whether a module is installed; does not import it."""
    return importlib.util.find_spec(module) is not None


def missing(case: str, peer: str, command: str) -> Row:
    """The row of a peer that is not installed."""
    return Row(case=case, measure="", unit="", peer=peer, note=f"not installed: {command}")


def number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:.3g}" if math.isfinite(x) and abs(x) < 1000 else f"{x:.0f}"


def show(name: str, report: Report) -> str:
    """A table in Markdown."""
    head = ["case", "measure", "ours", "peer", "theirs", "ours / theirs", "aim", "met"]
    cells = [head, ["---"] * len(head)]
    for row in report.rows:
        if row.note and row.ours is None and row.theirs is None:
            cells.append([row.case, row.note, "", row.peer, "", "", "", ""])
            continue
        sign = "≥" if row.better == "higher" else "≤"
        aim = "" if row.aim is None else f"{sign} {row.aim:g}" + ("" if row.peer else f" {row.unit}")
        met = {True: "yes", False: "NO", None: ""}[row.met]
        measure = f"{row.measure}, {row.unit}" if row.unit else row.measure
        note = f" ({row.note})" if row.note else ""
        cells.append([row.case, measure + note, number(row.ours), row.peer, number(row.theirs), number(row.ratio), aim, met])
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) if c != "---" else "-" * w for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    return "\n".join([f"## {name}: {report.title}", "", *lines, *(f"\n{n}" for n in report.notes), ""])
