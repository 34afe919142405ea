"""Claims: the comparative statements of a method's paper, executable at small scale.

A plugin states them in a module ``claims`` of its package::

    from tersor.evidence import Row, claim, data

    @claim("output error below rtn at equal bits")
    def output_error(seed: int) -> list[Row]:
        ...

``tersor verify NAME`` runs them, prints both sides and keeps the result as ``docs/evidence/NAME.json``.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs

from tersor import data as data
from tersor.errors import ClaimError
from tersor.files import atomic_write

ClaimFunction = Callable[[int], "Iterable[Row]"]


@attrs.frozen(kw_only=True)
class Row:
    """One comparison: ``ours`` against ``baseline`` in ``metric`` (with its unit), ``better`` being ``lower`` or ``higher``.

    ``margin``: the relative difference that counts (0.1: ours must be 10 % better). ``tie``: equality holds too, which is what
    a claim of being exact or no slower says. ``slack``: by how much, in the metric's unit, ours may be worse, which is what a claim
    of being near says. ``note``: what a reader must know to read the numbers.
    """

    claim: str
    metric: str
    ours: float = attrs.field(converter=float)
    baseline: float = attrs.field(converter=float)
    baseline_name: str
    better: str = attrs.field(validator=attrs.validators.in_(("lower", "higher")))
    margin: float = 0.0
    tie: bool = False
    slack: float = 0.0
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the comparison comes out as the claim says."""
        if self.ours != self.ours or self.baseline != self.baseline:
            return False
        if self.tie and self.ours == self.baseline:
            return True
        needed = self.margin * abs(self.baseline) - self.slack
        return self.ours < self.baseline - needed if self.better == "lower" else self.ours > self.baseline + needed


def claim(title: str) -> Callable[[ClaimFunction], ClaimFunction]:
    """Mark a function ``(seed) -> rows`` of a plugin's ``claims`` module as a claim."""

    def mark(function: ClaimFunction) -> ClaimFunction:
        function.tersor_claim = title  # type: ignore[attr-defined]
        return function

    return mark


def claims_of(name: str, kind: str | None = None) -> list[tuple[str, ClaimFunction]]:
    """Title and function of each claim of an installed method, in the order of its ``claims`` module.

    Raises the lookup errors, and :class:`tersor.ClaimError` where the method makes no claim.
    """
    from tersor import registry

    cls = registry.lookup(kind or registry.kind_of(name), name)
    package = cls.__module__.rpartition(".")[0] or cls.__module__
    try:
        module: ModuleType = import_module(f"{package}.claims")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.claims":
            raise ClaimError(
                f"the claims of {name} need {error.name}, which is not installed: pip install {error.name}"
            ) from error
        raise ClaimError(f"{name} makes no claims (its package has no module {package}.claims)") from error
    found = [f for f in vars(module).values() if hasattr(f, "tersor_claim") and f.__module__ == module.__name__]
    return [(f.tersor_claim, f) for f in found]


def verify(name: str, seed: int = 0, only: str | None = None) -> Iterator[dict[str, Any]]:
    """Run the claims of a method, yielding each row as it is known.

    Each is a dict of ``claim, metric, ours, baseline, baseline_name, better, holds, seconds`` and, where given, ``margin``, ``tie``, ``slack`` and
    ``note``. ``seconds`` is the time since the row before; of a claim that gives its rows at once the first has it all. ``only``: run the claims whose title or function name contains this.
    """
    ran = False
    for title, function in claims_of(name):
        if only and only not in title and only not in function.__name__:
            continue
        ran = True
        start = time.perf_counter()
        count = 0
        for row in function(seed):
            count += 1
            out = {
                "claim": row.claim, "metric": row.metric, "ours": row.ours, "baseline": row.baseline,
                "baseline_name": row.baseline_name, "better": row.better, "holds": row.holds,
                "seconds": round(time.perf_counter() - start, 2),
            }  # fmt: skip
            if row.margin:
                out["margin"] = row.margin
            if row.tie:
                out["tie"] = True
            if row.slack:
                out["slack"] = row.slack
            if row.note:
                out["note"] = row.note
            yield out
            start = time.perf_counter()
        if not count:
            raise ClaimError(f"the claim {title!r} of {name} gave no row")
    if not ran:
        raise ClaimError(f"{name} has no claim that matches {only!r}; it has: {', '.join(t for t, _ in claims_of(name))}")


def versions(name: str) -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    from tersor import registry

    kind = registry.kind_of(name)
    out = {"python": platform.python_version(), registry.find(kind, name).distribution: registry.find(kind, name).version}
    for package in ("tersor", "numpy", "torch", "transformers", "constriction", "pillow", "scikit-image", "scikit-learn"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def record(name: str, rows: list[dict[str, Any]], seed: int, folder: str | Path = "docs/evidence") -> Path:
    """Keep the result of :func:`verify` as ``FOLDER/NAME.json``: rows under ``claims``, with seed, versions and date."""
    path = Path(folder, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "method": name,
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "versions": versions(name),
        "machine": f"{platform.machine()}, {platform.system()}",
        "claims": rows,
    }
    with atomic_write(path) as file:
        file.write((json.dumps(document, indent=1, allow_nan=True) + "\n").encode())
    return path
