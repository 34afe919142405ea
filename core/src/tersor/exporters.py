"""Exporters: plugins that write a compressed model in the format of an inference engine.

An exporter is a class made with :func:`tersor.method` that derives from :class:`Exporter`, found through the entry-point group
``tersor.exporter`` and the hook ``tersor_exporter``. It reads an :class:`ExportModel`, tensor by tensor, and writes a folder or a
file. Nothing is quantized a second time: what the format cannot hold as it is raises :class:`tersor.ExportError`, which names the
tensors and the property.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import attrs

from tersor import config as _config
from tersor import container
from tersor.errors import CorruptPayloadError, ExportError, InputError, PluginError, TersorError
from tersor.results import Payload, Uniform


@attrs.frozen(eq=False)
class ModelTensor:
    """One tensor of a compressed model. Nothing is decoded before it is asked for, and nothing decoded is kept.

    ``name``: its full name in the network. ``shape``: in the network. ``turned``: the network keeps this weight as in x out.
    ``method``: what it was compressed with, or ``""`` where it was kept as it is.
    """

    name: str
    shape: tuple[int, ...]
    turned: bool
    _part: container.Part
    _view: memoryview

    @property
    def kept(self) -> bool:
        """Whether the tensor was kept as it is."""
        return not self._part.name.startswith("t:")

    def payload(self) -> Payload | None:
        """What the tensor was compressed to, its method configured; None where it was kept."""
        from tersor.api import payload_of

        if self.kept:
            return None
        header, views = container.read(self._view, False)
        return payload_of(header, views)

    @property
    def method(self) -> str:
        """The method's string, such as ``gptq:bits=3``."""
        payload = self.payload()
        return "" if payload is None else str(payload.method)

    def dense(self) -> Any:
        """The values as a torch tensor in the network's layout: decoded, or what was kept in its own element type."""
        from tersor.api import restore
        from tersor.arrays import from_buffer, to_torch

        payload = self.payload()
        if payload is None:
            return from_buffer(self._part.dtype, self._part.shape, self._view, "torch")
        value = restore(payload)
        if not hasattr(value, "shape"):
            raise CorruptPayloadError(f"tensor {self.name!r} decodes to a {type(value).__name__}")
        tensor = to_torch(value)
        return tensor.T.contiguous() if self.turned and tensor.ndim == 2 else tensor

    def uniform(self) -> Uniform | None:
        """The values as evenly spaced levels, out x in; None where the method's values are none, or the tensor was kept."""
        payload = self.payload()
        return None if payload is None or payload.method.kind != "quantizer" else payload.method.uniform(payload)  # type: ignore[attr-defined]

    def mask(self) -> Any:
        """What a pruner kept, boolean, in the network's layout; None for what no pruner made."""
        from tersor.arrays import to_torch
        from tersor.sparse import unpack_mask

        payload = self.payload()
        if payload is None or payload.method.kind != "pruner":
            return None
        try:
            mask = to_torch(unpack_mask(payload.parts["m/"], tuple(map(int, payload.meta["shapes"][""]))))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptPayloadError(f"tensor {self.name!r} has no mask ({type(error).__name__}: {error})") from error
        return mask.T.contiguous() if self.turned and mask.ndim == 2 else mask


class ExportModel:
    """A model's ``.tsr`` file as exporters read it.

    ``tensors``: names to :class:`ModelTensor`, in the file's order, without those that are tied to another. ``ties``: the names of
    tied tensors to that of the one that is stored. ``files``: the configuration and tokenizer files, names to bytes. ``config``:
    the content of config.json. ``method``: what the model was compressed with. ``name``: of the file, without suffix.
    """

    def __init__(self, source: Any) -> None:
        header, views = container.read(source)
        if header.kind != "model":
            raise InputError(
                f"exports are made from the .tsr file of a whole model; this one is of one array, by {header.kind} {header.method}"
            )
        turned, ties = header.meta.get("transposed", []), header.meta.get("ties", {})
        self.tensors: dict[str, ModelTensor] = {}
        self.files: dict[str, bytes] = {}
        for part in header.parts:
            kind, _, name = part.name.partition(":")
            if kind == "f":
                self.files[name] = bytes(views[part.name])
                continue
            shape = part.shape
            if kind == "t":
                nested, _ = container.read(views[part.name], False)  # the file's own checksum covers it
                shape = nested.spec.shape
                shape = shape[::-1] if name in turned and len(shape) == 2 else shape
            self.tensors[name] = ModelTensor(name, shape, name in turned, part, views[part.name])
        if not isinstance(ties, dict) or not all(isinstance(v, str) and v in self.tensors for v in ties.values()):
            raise CorruptPayloadError("the file ties a tensor to one that is not there")
        self.ties: dict[str, str] = dict(ties)
        self.method = str(header.meta.get("method", header.method))
        self.name = Path(source).stem if isinstance(source, (str, os.PathLike)) else "model"
        try:
            config = json.loads(self.files["config.json"])
        except KeyError:
            raise ExportError(
                "the model has no config.json, which says what network it is: it was made from a .safetensors file; "
                "compress the transformers folder instead"
            ) from None
        except ValueError as error:
            raise CorruptPayloadError(f"the file's config.json cannot be read: {error}") from error
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}

    def __iter__(self) -> Iterator[ModelTensor]:
        return iter(self.tensors.values())

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<ExportModel {self.name}: {len(self)} tensors, {self.method}>"


@attrs.frozen
class Exported:
    """What an export gives: ``path``, its size in ``nbytes``, and ``tensors``: names to how each was written."""

    path: Path
    nbytes: int
    tensors: dict[str, str] = attrs.field(repr=False)


def refuse(what: str, problems: Mapping[str, str]) -> None:
    """Raise :class:`tersor.ExportError` for tensors that ``what`` cannot hold (names to why), if there are any: the reasons one after
    another, each with how many tensors it concerns and the first of them."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in problems.items():
        by_reason.setdefault(reason, []).append(name)
    if by_reason:
        said = "; ".join(
            f"{names[0]}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''}: {reason}"
            for reason, names in by_reason.items()
        )
        raise ExportError(f"{what} cannot hold this model: {said}")


class Exporter:
    """A plugin that writes a compressed model in another format.

    Facts (plain class attributes): ``name``; ``suffix`` of the file that it writes, ``""`` for a folder. An exporter implements
    ``_export(model, out)``, which writes into ``out`` (a new, empty folder, or the path of a file that is not there yet) and says for
    every tensor how it was written, and where it takes not every network ``check(config)``. Settings are fields, as of methods.
    """

    kind: ClassVar[str] = "exporter"
    name: ClassVar[str] = ""
    suffix: ClassVar[str] = ""
    _origin: ClassVar[Any] = None

    @classmethod
    def _check_class(cls) -> None:
        if not cls.name or (cls.suffix and not cls.suffix.startswith(".")):
            raise PluginError(
                f"exporter class {cls.__name__}: name={cls.name!r}, suffix={cls.suffix!r}; needed: a name, and a suffix such as '.gguf' or ''"
            )

    @classmethod
    def build(cls, _text: bool = False, /, **settings: Any) -> Self:
        """An instance from settings; unknown settings are a :class:`tersor.ConfigError` with the nearest name."""
        return _config.build(cls, settings, text=_text)  # type: ignore[no-any-return]

    def settings(self) -> dict[str, Any]:
        """The whole configuration, JSON-ready."""
        return {f.name: getattr(self, f.name) for f in attrs.fields(type(self))}  # type: ignore[arg-type]

    @classmethod
    def origin(cls) -> tuple[str, str]:
        """Name and version of the distribution that the exporter comes from."""
        if cls._origin is None:
            from tersor import registry

            try:
                cls._origin = registry.find(cls.kind, cls.name)
            except TersorError:
                return "", "0"
        return cls._origin.distribution, cls._origin.version

    def __str__(self) -> str:
        changed = _config.changed(self)
        return self.name + (":" if changed else "") + ",".join(f"{k}={_config.to_text(v)}" for k, v in changed.items())

    def __repr__(self) -> str:
        return f"<exporter {self}>"

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise :class:`tersor.ExportError` where the format has no place for the network of this config.json."""

    def export(self, source: Any, out: str | os.PathLike[str], *, replace: bool = False) -> Exported:
        """Write the model in a ``.tsr`` file (path or bytes) to ``out``: aside, then renamed, so that nothing is left half-written.

        ``replace``: take the place of what is there. Raises :class:`tersor.ExportError` where the format cannot hold the model,
        :class:`tersor.InputError`, the errors under :class:`tersor.FileError`, OSError.
        """
        from tersor.registry import operate

        out = self.target(out, replace)
        model = source if isinstance(source, ExportModel) else ExportModel(source)
        self.check(model.config)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        written = aside / (out.name if self.suffix else "folder")
        try:
            if not self.suffix:
                written.mkdir()
            tensors = operate("export", self, lambda: self._export(model, written))
            nbytes = written.stat().st_size if self.suffix else sum(f.stat().st_size for f in written.rglob("*") if f.is_file())
            if out.is_dir():
                os.replace(out, aside / "old")
            try:
                os.replace(written, out)
            except OSError:
                if (aside / "old").is_dir():
                    os.replace(aside / "old", out)
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Exported(out, nbytes, tensors)

    def target(self, out: str | os.PathLike[str], replace: bool = False) -> Path:
        """The path of an output, checked; :class:`tersor.InputError` where it has another suffix, or exists."""
        from tersor import remote

        if remote.is_remote(out):
            raise InputError(f"exports are written to local paths; given: {out}")
        path = Path(os.path.abspath(out))
        if self.suffix and path.suffix.lower() != self.suffix:
            raise InputError(f"{self.name} writes a {self.suffix} file; given: {path.name}")
        if not self.suffix and (path.is_file() or path.suffix.lower() in (".tsr", ".gguf", ".safetensors", ".json", ".bin")):
            raise InputError(f"{self.name} writes a folder; given: {path.name}")
        if self.suffix and path.is_dir():
            raise InputError(f"{path} is a folder; {self.name} writes a {self.suffix} file")
        if path.exists() and not replace and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path} exists; choose another output, or replace=True")
        return path

    def _export(self, model: ExportModel, out: Path) -> dict[str, str]:
        raise NotImplementedError(f"{type(self).__name__}._export")


def exporter(name: str, **settings: Any) -> Exporter:
    """The exporter ``name`` (or ``distribution/name``), configured; errors as :func:`tersor.codec`."""
    from tersor import registry

    return registry.lookup("exporter", name).build(**settings)  # type: ignore[no-any-return]


def as_exporter(given: Any, **settings: Any) -> Exporter:
    """An exporter, from one or from the string that the CLI takes, such as ``gguf:rest=dense``; ``settings`` come on top."""
    from tersor import registry

    if isinstance(given, str):
        name, text = _config.parse(given)
        given = registry.lookup("exporter", name).build(True, **text)
    if not isinstance(given, Exporter):
        raise InputError(f"an exporter is needed, or a string such as 'gguf'; given: {given!r:.80}")
    return given.build(**{**given.settings(), **settings}) if settings else given


def export(source: Any, to: Any, out: str | os.PathLike[str], *, replace: bool = False, **settings: Any) -> Exported:
    """Write the model in a ``.tsr`` file in the format of an inference engine.

    ``source``: the path of the file, or its bytes. ``to``: an exporter, or its string such as ``"gguf"``; ``settings``: of the
    exporter. ``out``: the folder or file to write; ``replace``: take the place of what is there. The values are those of the file:
    nothing is quantized again. Raises :class:`tersor.ExportError`, which names the tensors that the format cannot hold and why,
    the lookup errors of :func:`tersor.codec`, :class:`tersor.InputError`, the errors under :class:`tersor.FileError`, OSError.
    """
    return as_exporter(to, **settings).export(source, out, replace=replace)


def compress_to(source: Path, method: Any, out: str | os.PathLike[str], to: Any, replace: bool, **options: Any) -> Path:
    """Compress a model and export it. The ``.tsr`` file on the way is ``OUT.tsr``; it is left where the export fails, so that the
    work is not lost, and taken away where it is done."""
    from tersor.model import compress_model

    exporting = as_exporter(to)
    target = exporting.target(out, replace)
    config = source / "config.json"
    if config.is_file():
        try:
            told = json.loads(config.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{config} is not JSON: {error}") from error
        exporting.check(told)
    between = target.with_name(f"{target.name}.tsr")
    if between.exists():
        raise InputError(f"{between} exists: a model whose export failed? `tersor export` goes on from it, or take it away")
    compress_model(source, method, between, **options)
    try:
        exporting.export(between, target, replace=replace)
    except ExportError as error:
        raise ExportError(f"{error}; the compressed model is kept in {between}") from error
    between.unlink()
    return target


def common_group(group_size: int, columns: int) -> int:
    """The largest size of whole groups of which all groups of a row consist, a shorter last one too: 64 for 576 columns in 128s."""
    return math.gcd(min(group_size, columns), columns)
