"""The conformance kit: what must hold for every method of a kind, checked with hypothesis.

For authors, one call in a test::

    from tersor.testing import assert_conforms

    def test_conformance():
        assert_conforms("my-method")

``tersor check NAME`` runs the same. Checks follow what a method declares of itself (lossless, bitwise, domains, promises),
never the names of its settings. An expected failure is declared with its reason: ``assert_conforms(name, expected={"check":
"why"})``; a check that is expected to fail and passes is a failure too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.testing.checks import CHECKS, Result, run_checks
from tersor.testing.source import TableSource, greedy_tokens

__all__ = ["CHECKS", "Result", "TableSource", "assert_conforms", "check_method", "greedy_tokens"]


def check_method(method: Any, max_examples: int = 10, fresh_process: bool = True) -> list[Result]:
    """Run every check of the method's kind.

    ``method``: a name, a class or an instance. ``max_examples``: inputs that hypothesis draws for each check.
    ``fresh_process``: also decode in a new interpreter (seconds, where the method needs torch).
    Raises the lookup errors for a name that cannot be looked up.
    """
    from tersor import registry
    from tersor.kinds import Method

    if isinstance(method, str):
        method = registry.lookup(registry.kind_of(method), method)
    instances = [method] if isinstance(method, Method) else method.examples()
    return run_checks(instances, max_examples, fresh_process)


def assert_conforms(
    method: Any, max_examples: int = 10, fresh_process: bool = True, expected: Mapping[str, str] | None = None
) -> list[Result]:
    """:func:`check_method`, raising AssertionError that lists every failed check with its reason."""
    results = check_method(method, max_examples, fresh_process)
    expected = expected or {}
    unknown = set(expected) - {r.check for r in results}
    if unknown:
        raise ValueError(f"no such check: {', '.join(sorted(unknown))}; the checks: {', '.join(r.check for r in results)}")
    bad = [f"{r.check}: {r.reason}" for r in results if not r.passed and r.check not in expected]
    bad += [f"{r.check}: expected to fail ({expected[r.check]}), and passes" for r in results if r.passed and r.check in expected]
    if bad:
        raise AssertionError("the method does not conform:\n  " + "\n  ".join(bad))
    return results
