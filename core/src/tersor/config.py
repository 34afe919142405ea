"""Configuration of a method: frozen attrs fields, validated when built, JSON-serialisable, printable as a CLI string."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import attrs

from tersor.errors import ConfigError, PluginError

T = TypeVar("T", bound=type)
Validator = Callable[[Any, Any, Any], None]


def field(default: Any = attrs.NOTHING, *validators: Validator, help: str = "") -> Any:  # noqa: A002
    """One configuration field of a method.

    ``default``: int, float, bool, str, None or a tuple of these; without it the field must be given.
    ``validators``: :func:`between`, :func:`one_of`, :func:`positive`, :func:`at_least`, or any attrs validator.
    ``help``: one line for ``tersor info`` and the catalogue, with the unit.
    """
    return attrs.field(default=default, validator=list(validators), metadata={"help": help})


def _fail(instance: Any, attribute: Any, value: Any, allowed: str) -> None:
    raise ConfigError(f"{instance.name}: {attribute.name}={value!r} is not allowed; allowed: {allowed}")


def _rule(allowed: str, holds: Callable[[Any], bool]) -> Validator:
    """A validator that applies ``holds`` to a value, or to every element of a tuple; None passes (the type rules on it)."""

    def validate(instance: Any, attribute: Any, value: Any) -> None:
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not holds(each):
                _fail(instance, attribute, value, allowed)

    validate.allowed = allowed  # type: ignore[attr-defined]
    return validate


def between(low: float, high: float) -> Validator:
    """Allow values from ``low`` to ``high``, both included."""
    return _rule(f"{low} to {high}", lambda v: low <= v <= high)


def at_least(low: float) -> Validator:
    """Allow values from ``low`` on."""
    return _rule(f"{low} or more", lambda v: v >= low)


def positive(instance: Any, attribute: Any, value: Any) -> None:
    """Allow values above 0."""
    _rule("a value above 0", lambda v: v > 0)(instance, attribute, value)


positive.allowed = "a value above 0"  # type: ignore[attr-defined]


def one_of(*values: Any) -> Validator:
    """Allow exactly the values listed."""
    return _rule(", ".join(map(repr, values)), lambda v: v in values)


def describe(annotation: Any) -> str:
    """The type of a field in words: ``int``, ``float or None``, ``tuple of int``."""
    options = _options(annotation)
    return " or ".join(_describe_one(o) for o in options)


def _describe_one(option: Any) -> str:
    if option is type(None):
        return "None"
    if typing.get_origin(option) is tuple:
        return f"tuple of {_describe_one(typing.get_args(option)[0])}"
    return str(getattr(option, "__name__", option))


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


_BAD = object()


def _coerce_one(option: Any, value: Any) -> Any:
    """``value`` as ``option`` where nothing is lost (3 as 3.0, a list as a tuple, numpy scalars as Python ones), else _BAD."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if option is type(None):
        return None if value is None else _BAD
    if option is bool:
        return value if isinstance(value, bool) else _BAD
    if option is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _BAD
    if option is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf"):
            try:
                return float(value)
            except OverflowError:
                return _BAD
        return _BAD
    if option is str:
        return value if isinstance(value, str) else _BAD
    if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(option)[0]
        out = tuple(_coerce_one(inner, v) for v in value)
        return _BAD if any(v is _BAD for v in out) else out
    return _BAD


def _typed(cls: type, fields: list[attrs.Attribute[Any]]) -> list[attrs.Attribute[Any]]:
    hints = typing.get_type_hints(cls)
    out = []
    for f in fields:
        options = _options(hints.get(f.name, f.type))
        for option in options:
            base = typing.get_args(option)[0] if typing.get_origin(option) is tuple else option
            if base not in (int, float, bool, str, type(None)):
                raise PluginError(
                    f"{cls.__name__}.{f.name}: a configuration field is int, float, bool, str, None or a tuple of these, not {option!r}"
                )

        def convert(value: Any, self_: Any, attribute: Any, options: tuple[Any, ...] = options) -> Any:
            for option in options:
                out = _coerce_one(option, value)
                if out is not _BAD:
                    return out
            words = " or ".join(map(_describe_one, options))
            raise ConfigError(
                f"{self_.name}: {attribute.name}={value!r} is of type {type(value).__name__}; allowed: {words} (finite)"
            )

        out.append(
            f.evolve(converter=attrs.Converter(convert, takes_self=True, takes_field=True), type=hints.get(f.name, f.type))
        )
    return out


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field, attrs.field))
def method(cls: T) -> T:
    """Make a frozen, keyword-only attrs class of a method: its annotated attributes are its configuration.

    Raises :class:`tersor.PluginError` (the author's mistake) for a field of a type that JSON cannot hold or a missing fact.
    """
    out = attrs.frozen(kw_only=True, slots=False, repr=False, field_transformer=_typed)(cls)
    out._check_class()  # type: ignore[attr-defined]
    return out


def parse(text: str) -> tuple[str, dict[str, str]]:
    """Split ``gptq:bits=4,group_size=128`` into the name and a dict of still unconverted values.

    >>> parse("fsq:levels=[8,5,5],dim=3")
    ('fsq', {'levels': '[8,5,5]', 'dim': '3'})
    """
    name, _, rest = text.partition(":")
    out: dict[str, str] = {}
    depth, start = 0, 0
    pieces = []
    for i, c in enumerate(rest):
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            pieces.append(rest[start:i])
            start = i + 1
    pieces.append(rest[start:])
    for piece in pieces:
        if not piece.strip():
            if rest.strip():
                raise ConfigError(f"{text!r}: an empty setting; a method is written NAME:key=value,key=value")
            continue
        key, eq, value = piece.partition("=")
        if not eq:
            raise ConfigError(f"{text!r}: {piece!r} has no '='; a method is written NAME:key=value,key=value")
        if key.strip() in out:
            raise ConfigError(f"{text!r}: {key.strip()} is given twice")
        out[key.strip()] = value.strip()
    if not name.strip():
        raise ConfigError(f"{text!r}: no name; a method is written NAME:key=value,key=value")
    return name.strip(), out


def _from_text(option: Any, text: str) -> Any:
    if option is str:
        return text
    if option is type(None):
        return None if text.lower() in ("none", "null", "") else _BAD
    if option is bool:
        return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}.get(text.lower(), _BAD)
    try:
        if option is int:
            return int(text)
        if option is float:
            return float(text)
    except ValueError:
        return _BAD
    if typing.get_origin(option) is tuple:
        if text[:1] in "[(" and text[-1:] in "])":
            text = text[1:-1]
        inner = typing.get_args(option)[0]
        out = tuple(_from_text(inner, t.strip().strip("'\"")) for t in text.split(",") if t.strip())
        return _BAD if any(v is _BAD for v in out) else out
    return _BAD


def build(cls: type, config: Mapping[str, Any], text: bool = False) -> Any:
    """An instance of a method class from a mapping; ``text``: the values are strings as typed on a command line.

    Raises :class:`tersor.ConfigError` for unknown keys (with the nearest name), wrong types and values that are not allowed.
    """
    known = {f.name: f for f in attrs.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            allowed = ", ".join(known) or "none (this method has no settings)"
            raise ConfigError(f"{cls.name}: unknown setting {key!r}{hint}; allowed: {allowed}")  # type: ignore[attr-defined]
        if text:
            options = sorted(_options(known[key].type), key=lambda o: o is str)
            parsed = [v for v in (_from_text(o, value) for o in options) if v is not _BAD]
            if not parsed:
                raise ConfigError(f"{cls.name}: {key}={value} cannot be read; allowed: {describe(known[key].type)}")  # type: ignore[attr-defined]
            value = parsed[0]
        values[key] = value
    missing = [n for n, f in known.items() if f.default is attrs.NOTHING and n not in values]
    if missing:
        raise ConfigError(f"{cls.name}: {', '.join(missing)} must be given")  # type: ignore[attr-defined]
    return cls(**values)


def changed(instance: Any) -> dict[str, Any]:
    """The fields of ``instance`` that differ from their defaults, in order."""
    out = {}
    for f in attrs.fields(type(instance)):
        value = getattr(instance, f.name)
        if f.default is attrs.NOTHING or value != f.default or type(value) is not type(f.default):
            default = f.default
            if isinstance(default, int) and isinstance(value, float) and not isinstance(default, bool) and value == default:
                continue
            out[f.name] = value
    return out


def to_text(value: Any) -> str:
    """A value as the CLI takes it."""
    if isinstance(value, tuple):
        return "[" + ",".join(map(to_text, value)) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


def to_json(values: Mapping[str, Any]) -> bytes:
    """Compact deterministic JSON, for headers."""
    if not values:
        return b""
    return json.dumps(dict(values), separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
