"""The functions of ``import tersor``: look a method up, compress, decompress."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor import registry
from tersor.errors import ConfigError, InputError, UnsupportedVersionError

if TYPE_CHECKING:
    from tersor.kinds import Codec, Decoder, Method, Pruner, Quantizer
    from tersor.results import Codes, Payload


def codec(name: str, **config: Any) -> Codec:
    """The codec ``name`` (or ``distribution/name``), configured.

    Raises :class:`tersor.UnknownMethodError`, :class:`tersor.ConflictError`, :class:`tersor.PluginError`,
    :class:`tersor.ConfigError`.
    """
    return registry.lookup("codec", name).build(**config)  # type: ignore[attr-defined, no-any-return]


def quantizer(name: str, **config: Any) -> Quantizer:
    """The quantizer ``name``, configured; errors as :func:`codec`."""
    return registry.lookup("quantizer", name).build(**config)  # type: ignore[attr-defined, no-any-return]


def pruner(name: str, **config: Any) -> Pruner:
    """The pruner ``name``, configured; errors as :func:`codec`."""
    return registry.lookup("pruner", name).build(**config)  # type: ignore[attr-defined, no-any-return]


def decoder(name: str, **config: Any) -> Decoder:
    """The decoder ``name``, configured; errors as :func:`codec`."""
    return registry.lookup("decoder", name).build(**config)  # type: ignore[attr-defined, no-any-return]


def method(text: str) -> Method:
    """A method of any kind, from the string that the CLI takes: ``gptq:bits=4,group_size=128``; errors as :func:`codec`."""
    from tersor.config import parse

    name, settings = parse(text)
    cls = registry.lookup(registry.kind_of(name), name)
    return cls.build(True, **settings)  # type: ignore[attr-defined, no-any-return]


def available(kind: str | None = None, family: str | None = None, domain: str | None = None) -> list[dict[str, str]]:
    """All installed methods, or those of one kind, family or domain; reads metadata and imports no plugin.

    ``kind="exporter"`` gives the exporters, which are no methods. Each is a dict of ``name, kind, family, domain, summary, distribution, version, status`` (``ok``, ``broken``, ``conflict``).
    """
    if kind is not None and kind not in registry.OFFERS:
        raise ConfigError(f"kind={kind!r}; allowed: {', '.join(registry.OFFERS)}")
    return [
        m
        for m in registry.listing()
        if (m["kind"] in registry.KINDS if kind is None else m["kind"] == kind)
        and (family is None or family in m["family"].split(","))
        and (domain is None or domain in m["domain"].split(","))
    ]


def info(name: str, kind: str | None = None) -> dict[str, Any]:
    """What there is to know of one method or exporter: metadata, facts, settings with types, defaults and help; imports its plugin."""
    import attrs

    from tersor.config import describe

    if kind is None:
        kind = "exporter" if registry.is_exporter(name) else registry.kind_of(name)
    cls: Any = registry.lookup(kind, name)
    entry = registry.find(kind, name)
    meta = entry.metadata
    urls = dict(u.split(", ", 1) for u in meta.get("project-url", []) if ", " in u)
    fields = []
    for f in attrs.fields(cls):
        rules = getattr(f.validator, "_validators", (f.validator,) if f.validator else ())
        fields.append(
            {
                "name": f.name,
                "type": describe(f.type),
                "default": None if f.default is attrs.NOTHING else f.default,
                "required": f.default is attrs.NOTHING,
                "allowed": "; ".join(str(r.allowed) for r in rules if hasattr(r, "allowed")),
                "help": f.metadata.get("help", ""),
            }
        )
    facts = (
        {"writes": f"a {cls.suffix} file" if cls.suffix else "a folder"}
        if kind == "exporter"
        else {
            "domains": list(cls.domains),
            "lossless": cls.lossless,
            "bitwise": cls.bitwise,
            "fitted": cls.fitted,
            "calibration": cls.calibration,
            "config_version": cls.config_version,
        }
    )
    return {
        "name": cls.name,
        "kind": kind,
        "family": ",".join(entry.keywords("family", meta)),
        "summary": " ".join(meta.get("summary", [])),
        "distribution": entry.distribution,
        "version": entry.version,
        "urls": urls,
        **facts,
        "settings": fields,
        "doc": (cls.__doc__ or "").strip(),
    }


def as_method(given: Any) -> Method:
    """A method instance, from one or from the string that the CLI takes."""
    from tersor.kinds import Method

    if isinstance(given, str):
        return method(given)
    if not isinstance(given, Method):
        raise ConfigError(f"a method is needed, or a string such as 'jpeg:quality=80'; given: {given!r:.80}")
    return given


def apply_method(m: Method, x: Any, calibration: Any = None) -> Payload:
    """Run the compressing operation of a method of any kind but decoder on ``x``."""
    if m.kind == "quantizer":
        return m.quantize(x, calibration)  # type: ignore[attr-defined, no-any-return]
    if m.kind == "pruner":
        return m.encode(x, calibration)  # type: ignore[attr-defined, no-any-return]
    if m.kind == "codec":
        return m.encode(x, calibration)  # type: ignore[attr-defined, no-any-return]
    raise InputError(
        f"{m.name} is a decoder: it draws tokens from a model and compresses nothing (tersor.decoder({m.name!r}).decode)"
    )


def compress(
    x: Any,
    with_: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    calibration: Any = None,
    frames: slice | str | None = None,
    size: tuple[int, int] | str | None = None,
    to: Any = None,
    replace: bool = False,
    **options: Any,
) -> Payload | Path | str:
    """Compress an array, bytes, a file (image, audio, video, ``.npy``, any other as bytes) or a whole model.

    ``x``: data, or the path of a file or of a model (a transformers folder, ``.safetensors``, ``.gguf``).
    ``with_``: a method, or its string such as ``"jpeg:quality=80"``. ``out``: where to write the ``.tsr`` file; without it the
    payload comes back. Either path may be a remote one (``s3://...``; see :mod:`tersor.remote`). ``frames``, ``size``: the part of a
    video file that is read; see :func:`tersor.io.load`. A model goes to the model driver, which needs ``out`` and takes the options
    of :func:`tersor.model.compress_model`. ``to``: an exporter or its string: the model is written in that format (see
    :func:`tersor.export`), not as a ``.tsr`` file; ``replace``: in the place of what is there. Many files: :func:`tersor.compress_many`.
    Raises :class:`tersor.InputError`, the lookup errors of :func:`codec`, OSError.
    """
    from tersor import remote

    m = as_method(with_)
    given = {"calibration": calibration, "frames": frames, "size": size, "to": to, "replace": replace, **options}
    if remote.is_remote(out) and to is None:
        with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
            compress(x, m, Path(folder, "out.tsr"), **given)
            remote.store(Path(folder, "out.tsr"), str(out))
        return str(out)
    if isinstance(x, str) and remote.is_remote(x):
        with remote.fetched(x) as path:
            return compress(path, m, out, **given)
    if isinstance(x, (str, os.PathLike)):
        from tersor.io import is_model, load

        if is_model(x, m):
            from tersor.model import compress_model

            if out is None:
                raise InputError("a model is written to a file: give out=PATH")
            if frames is not None or size is not None:
                raise InputError("frames and size choose a part of a video; a model was given")
            if to is not None:
                from tersor.exporters import compress_to

                return compress_to(Path(x), m, out, to, replace, calibration=calibration, **options)
            return compress_model(x, m, out, calibration=calibration, **options)
        x = load(x, m, frames=frames, size=size)
    elif frames is not None or size is not None:
        raise InputError("frames and size choose a part of a video file; what was given is not a file")
    if to is not None:
        raise InputError(f"to={to!r} exports whole models; {m.name} was given one array or file")
    if options:
        raise InputError(f"options {', '.join(options)} belong to whole models; {m.name} was given one array or file")
    payload = apply_method(m, x, calibration)
    if out is None:
        return payload
    payload.save(out)
    return Path(out)


def load_payload(source: Any, state: Any = None, verify: bool = True) -> Payload | Codes:
    """The payload in bytes or in the file at a path, its method looked up and configured but nothing decoded yet."""
    from tersor import container

    header, views = container.read(source, verify)
    return payload_of(header, views, state)


def payload_of(header: Any, views: Mapping[str, Any], state: Any = None) -> Payload:
    """The payload that a header and the bytes of its parts stand for; see :func:`load_payload`."""
    from tersor import results
    from tersor.arrays import from_buffer

    if header.kind == "model":
        raise InputError("this file holds a whole model: tersor.decompress(file, out=FOLDER)")
    # the distribution that wrote the file decides where several offer the name
    several = len(registry.index().get((header.kind, header.method), [])) > 1
    chosen = header.distribution and (several or header.distribution != f"tersor-{header.method}")
    cls: Any = registry.lookup(header.kind, f"{header.distribution}/{header.method}" if chosen else header.method)
    if header.config_version > cls.config_version:
        raise UnsupportedVersionError(
            f"{header.method}: the file has configuration version {header.config_version}, written by {header.distribution} "
            f"{header.version}; installed {cls.origin()[1]} reads up to {cls.config_version}: pip install -U {header.distribution}"
        )
    settings = header.config
    if header.config_version < cls.config_version:
        settings = cls.migrate(settings, header.config_version)
    m = cls.build(**settings)
    if state is not None:
        m = m.load(state) if isinstance(state, (str, os.PathLike)) else m.with_state(state)
    parts = {p.name: from_buffer(p.dtype, p.shape, views[p.name], cls.native) for p in header.parts}
    kind = results.Codes if header.kind == "quantizer" else results.Payload
    return kind(m, header.spec, parts, header.meta, header.state, header.check)  # type: ignore[no-any-return]


def restore(payload: Payload, limit: int | None = None) -> Any:
    """What a payload stands for, whatever the kind of its method."""
    m: Any = payload.method
    return m.dequantize(payload, limit) if m.kind == "quantizer" else m.decode(payload, limit)


def decompress(
    source: Any, out: str | os.PathLike[str] | None = None, *, state: Any = None, limit: int | None = None, replace: bool = False
) -> Any:
    """The opposite of :func:`compress`: from bytes, a payload or the path of a ``.tsr`` file.

    ``out``: where to write the result (an image, audio, ``.npy`` or raw file by its suffix; a folder for a model); without it
    the data comes back. ``state``: the path of a saved state, or its arrays, where the payload needs one that is not shipped.
    ``limit``: bytes that the result may take (4 GiB, or TERSOR_MAX_DECODED). ``replace``: a model may take the place of a folder.
    Raises the errors under :class:`tersor.FileError`, :class:`tersor.MissingStateError`, the lookup errors, OSError.
    """
    from tersor import remote, results

    if remote.is_remote(out):
        with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
            aside = Path(folder, str(out).rpartition("/")[2] or "out")
            decompress(source, aside, state=state, limit=limit)
            if aside.is_dir():
                raise InputError(f"a model is restored into a local folder; given: {out}")
            remote.store(aside, str(out))
        return out
    if remote.is_remote(source):
        with remote.fetched(source) as path:
            return decompress(path, out, state=state, limit=limit, replace=replace)
    if isinstance(source, results.Payload):
        value = restore(source, limit)
    else:
        from tersor import container

        header, views = container.read(source)
        if header.kind == "model":
            from tersor.model import restore_model

            return restore_model(header, views, out, limit=limit, replace=replace)
        value = restore(payload_of(header, views, state), limit)
    if out is None:
        return value
    from tersor.io import save

    save(value, out)
    return Path(out)


def inspect(source: Any) -> dict[str, Any]:
    """What a ``.tsr`` file (path or bytes) says of itself; loads no plugin. See :func:`tersor.container.inspect`."""
    from tersor.container import inspect as look

    return look(source)
