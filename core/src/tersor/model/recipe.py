"""Recipes: which method, with which settings, each tensor of a network gets."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

from tersor.errors import ConfigError


@attrs.frozen
class Recipe:
    """Ordered (pattern, method) rules; the first that matches a tensor's name wins.

    A pattern is a shell pattern over the tensor's name (``model.layers.0.*``, ``*.down_proj.weight``), or a regular expression
    after ``re:``. The method is an instance, a string such as ``"rtn:bits=8"``, or None: keep the tensor as it is.
    """

    rules: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, given: Any) -> Recipe:
        """A recipe from one, from (pattern, method) pairs, a mapping, or the path of a JSON file that holds a list of pairs."""
        from tersor.api import as_method

        if given is None:
            return cls()
        if isinstance(given, Recipe):
            return given
        if isinstance(given, (str, os.PathLike)):
            try:
                given = json.loads(Path(given).read_text("utf-8"))
            except ValueError as error:
                raise ConfigError(f"recipe {given}: not JSON: {error}") from error
        if not isinstance(given, (dict, list, tuple)):
            raise ConfigError(f"a recipe is a list of [pattern, method or null]; given: {given!r:.80}")
        pairs: Iterable[Sequence[Any]] = given.items() if isinstance(given, dict) else given
        rules = []
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ConfigError(f"a recipe is a list of [pattern, method or null]; given: {pair!r}")
            method = None if pair[1] is None else as_method(pair[1])
            if method is not None and "weight" not in method.domains:
                raise ConfigError(f"recipe: {method.name} takes {', '.join(method.domains)}, not weights")
            if pair[0].startswith("re:"):
                try:
                    re.compile(pair[0][3:])
                except re.error as error:
                    raise ConfigError(f"recipe: pattern {pair[0]!r} is no regular expression: {error}") from error
            rules.append((pair[0], method))
        return cls(tuple(rules))

    def match(self, name: str) -> tuple[str, Any] | None:
        """The first rule whose pattern matches ``name``."""
        for pattern, method in self.rules:
            if pattern.startswith("re:"):
                if re.search(pattern[3:], name):
                    return pattern, method
            elif fnmatch.fnmatchcase(name, pattern):
                return pattern, method
        return None

    def check(self, names: Iterable[str]) -> None:
        """Raise :class:`tersor.ConfigError` for a pattern that wins no tensor, saying what there is."""
        names = list(names)
        won = {rule[0] for n in names if (rule := self.match(n))}
        for pattern, _ in self.rules:
            if pattern not in won:
                matches = [n for n in names if Recipe(((pattern, None),)).match(n)]
                if matches:
                    raise ConfigError(
                        f"recipe: pattern {pattern!r} comes after others that already match all its tensors ({matches[0]}, ...)"
                    )
                shown = ", ".join(names[:4])
                raise ConfigError(f"recipe: pattern {pattern!r} matches no tensor; the model has {len(names)}: {shown}, ...")
