"""The four kinds of methods. The base classes own the plumbing; a method's own file is its algorithm.

A method is a class made with :func:`tersor.method` that derives from :class:`Codec`, :class:`Quantizer`, :class:`Pruner` or
:class:`Decoder`, states its facts as plain class attributes and its configuration as annotated fields, and implements the
underscored functions of its kind.
"""

from __future__ import annotations

import inspect
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from tersor import config as _config
from tersor import domains
from tersor.arrays import buffer, cast, dtype_name, is_float, is_torch, to_native, to_numpy
from tersor.domains import DOMAINS, summary
from tersor.errors import (
    CalibrationError,
    ConfigError,
    CorruptPayloadError,
    InputError,
    LimitError,
    MissingStateError,
    PluginError,
    StateError,
    TersorError,
)
from tersor.results import Calibration, Codes, Decoded, Mask, Payload, Spec, Uniform

if TYPE_CHECKING:
    from tersor.model.statistics import View
    from tersor.stream import Stream

#: What the driver of whole networks can put into a layer's calibration.
STATISTICS = ("gram", "inputs", "gradients")


class Method:
    """What all four kinds share: facts, configuration, state.

    Facts (plain class attributes): ``name``; ``domains``; ``native`` (``"torch"``, ``"numpy"`` or ``"bytes"``: what the
    underscored functions receive and return); ``lossless``; ``bitwise`` (decoding gives the same bytes on every machine);
    ``fitted`` (needs a state); ``calibration`` (``"none"``, ``"optional"``, ``"required"``); ``allow_empty``;
    ``config_version`` (raised whenever a setting's default or meaning changes).

    Of weight methods, for the driver of whole networks: ``wants``, what it puts into each layer's calibration (``"gram"``:
    X^T X, its count, and the inputs' mean; ``"inputs"``: at most 2,048 rows of them; ``"gradients"``: the mean squared gradient
    of the loss for each weight); ``studies`` (``"layer"``, ``"block"``, ``"network"``): the largest part that the method looks
    at before a layer of it is compressed, see :meth:`_study`.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    domains: ClassVar[tuple[str, ...]] = ()
    native: ClassVar[str] = "numpy"
    lossless: ClassVar[bool] = False
    bitwise: ClassVar[bool] = True
    fitted: ClassVar[bool] = False
    calibration: ClassVar[str] = "none"
    allow_empty: ClassVar[bool] = False
    config_version: ClassVar[int] = 1
    wants: ClassVar[tuple[str, ...]] = ("gram",)
    studies: ClassVar[str] = "layer"
    _origin: ClassVar[Any] = None
    _own_state: dict[str, Any] | None = None

    @classmethod
    def _check_class(cls) -> None:
        problems = []
        if not cls.name:
            problems.append("it has no name")
        if not cls.domains or any(d not in DOMAINS for d in cls.domains):
            problems.append(f"domains={cls.domains!r}; allowed: {', '.join(DOMAINS)}")
        if cls.native not in ("torch", "numpy", "bytes"):
            problems.append(f"native={cls.native!r}; allowed: 'torch', 'numpy', 'bytes'")
        if cls.calibration not in ("none", "optional", "required"):
            problems.append(f"calibration={cls.calibration!r}; allowed: 'none', 'optional', 'required'")
        if any(w not in STATISTICS for w in cls.wants):
            problems.append(f"wants={cls.wants!r}; allowed: {', '.join(STATISTICS)}")
        if cls.studies not in ("layer", "block", "network"):
            problems.append(f"studies={cls.studies!r}; allowed: 'layer', 'block', 'network'")
        if problems:
            raise PluginError(f"method class {cls.__name__}: {'; '.join(problems)}")

    # -- configuration

    @classmethod
    def build(cls, _text: bool = False, /, **settings: Any) -> Self:
        """An instance from settings; unknown settings are a :class:`tersor.ConfigError` with the nearest name."""
        return _config.build(cls, settings, text=_text)  # type: ignore[no-any-return]

    @classmethod
    def migrate(cls, settings: dict[str, Any], version: int) -> dict[str, Any]:
        """Settings of an older ``config_version``, as the current one means them. Override when raising ``config_version``."""
        return settings

    @classmethod
    def examples(cls) -> list[Self]:
        """Small, quick (and where needed fitted) instances that the conformance kit exercises."""
        return [cls()]

    def example_inputs(self) -> list[Any]:
        """Inputs that the conformance kit uses beside those that it draws, for a method that takes few of the latter."""
        return []

    def bound(self, x: Any) -> float | None:
        """The largest absolute error that decoding ``x`` may have, where the method promises one."""
        return None

    @classmethod
    def origin(cls) -> tuple[str, str]:
        """Name and version of the distribution that the method comes from."""
        if cls._origin is None:
            from tersor import registry

            try:
                cls._origin = registry.find(cls.kind, cls.name)
            except TersorError:
                return "", "0"
        return cls._origin.distribution, cls._origin.version

    def settings(self) -> dict[str, Any]:
        """The whole configuration, JSON-ready."""
        import attrs

        return {f.name: getattr(self, f.name) for f in attrs.fields(type(self))}  # type: ignore[arg-type]

    def __str__(self) -> str:
        changed = _config.changed(self)
        return self.name + (":" if changed else "") + ",".join(f"{k}={_config.to_text(v)}" for k, v in changed.items())

    def __repr__(self) -> str:
        return f"<{self.kind} {self}>"

    # -- state

    def fit(self, samples: Iterable[Any]) -> Self:
        """A fitted copy. ``samples``: arrays of the method's domain. Reports progress (:mod:`tersor.progress`).

        Raises :class:`tersor.InputError` for samples that are not of the domain, or none at all.
        """
        if type(self)._fit is Method._fit:
            raise StateError(f"{self.name} has nothing to fit")
        items = [self._enter(s)[0] for s in samples]
        if not items:
            raise InputError(f"{self.name}: fit needs at least one sample")
        from tersor.registry import operate

        return self.with_state(operate("fit", self, lambda: self._fit(items)))

    def _fit(self, samples: list[Any]) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__}._fit")

    def _default_state(self) -> Path | None:
        """The safetensors file that the package ships for this configuration."""
        return None

    def with_state(self, state: Mapping[str, Any]) -> Self:
        """A copy of the method with this state (names to arrays)."""
        out = object.__new__(type(self))
        import attrs

        for f in attrs.fields(type(self)):  # type: ignore[arg-type]
            out.__dict__[f.name] = getattr(self, f.name)
        out.__dict__["_own_state"] = {k: to_native(v, "torch" if self.native == "torch" else "numpy") for k, v in state.items()}
        return out

    @property
    def state(self) -> dict[str, Any]:
        """The fitted state: names to arrays. Raises :class:`tersor.MissingStateError` where there is none."""
        if self._own_state is None:
            path = self._default_state()
            if path is None or not path.is_file():
                raise MissingStateError(
                    f"{self} has no fitted state and its package ships none for this configuration; "
                    f"use .fit(samples), or .load(path) with a saved state"
                )
            self.__dict__["_own_state"] = _load_state(path, self.native)
        return self._own_state  # type: ignore[return-value]

    @property
    def state_id(self) -> bytes:
        """8 bytes that name the state by its content."""
        cached = self.__dict__.get("_state_id")
        if cached is None:
            import xxhash

            digest = xxhash.xxh3_64()
            for key in sorted(self.state):
                dtype, shape, view = buffer(self.state[key])
                digest.update(f"{key}\0{dtype}\0{shape}\0".encode())
                digest.update(view)
            cached = self.__dict__["_state_id"] = digest.digest()
        return cached  # type: ignore[no-any-return]

    def save(self, path: str | Path) -> None:
        """Write the state as a safetensors file (to a temporary file, then renamed)."""
        from safetensors.numpy import save

        from tersor.files import atomic_write

        metadata = {"method": self.name, "config": _config.to_json(_config.changed(self)).decode() or "{}"}
        if self.native == "torch":
            from safetensors.torch import save as save_torch

            raw = save_torch({k: v.contiguous() for k, v in self.state.items()}, metadata)
        else:
            raw = save({k: np.ascontiguousarray(v) for k, v in self.state.items()}, metadata)
        with atomic_write(path) as file:
            file.write(raw)

    def load(self, path: str | Path) -> Self:
        """A copy of the method with the state that :meth:`save` wrote. Raises :class:`tersor.StateError`, OSError."""
        return self.with_state(_load_state(Path(path), self.native))

    # -- networks

    def _study(self, view: View) -> Mapping[str, Mapping[str, Any]]:
        """What a method finds out about a block or a whole network (``studies``) before the first of its layers is compressed.

        Called with gradients enabled where there is calibration data. Gives for each name in ``view.layers`` (or for some)
        what ``_quantize`` or ``_encode`` then finds in ``calibration.extra``. It leaves the network as it was.
        """
        raise NotImplementedError(f"{type(self).__name__}._study")

    #: ``token_weights(attention, hidden)``, of a method that has it: a weight for each token (batch x tokens) from the block's
    #: attention probabilities (batch x heads x queries x keys) and its input (batch x tokens x dim). The rows of the calibration
    #: are multiplied by it.
    token_weights: ClassVar[Any] = None

    # -- layers

    def module(self, payload: Payload | bytes, bias: Any = None, layer: Any = None) -> Any:
        """A torch module that computes with a compressed weight of this method: see :func:`tersor.model.module`."""
        from tersor.model.modules import module

        payload = _payload(payload)
        if payload.method.name != self.name or payload.method.kind != self.kind:
            raise InputError(
                f"{self.kind} {self.name} cannot read this payload: it is of {payload.method.kind} {payload.method.name}"
            )
        if payload.state is not None and self._own_state is not None and self.state_id == payload.state:
            import attrs

            payload = attrs.evolve(payload, method=payload.method.with_state(self._own_state))
        return module(payload, bias, layer)

    def _module(self, parts: dict[str, Any], spec: Spec, bias: Any, layer: Any) -> Any:
        """The method's own torch module in the place of ``layer`` (whose weight these parts hold, folded to out x in), or None.

        One that trains, or is faster than the dense layer, is worth having; every other method's weights are decoded whenever the
        layer is called.
        """
        return None

    # -- the way in and out

    def _enter(self, x: Any, domain: str | None = None) -> tuple[Any, Spec]:
        """Check an input against the domain; give it as the method's native array, with its spec."""
        x, rate, said = domains.unwrap(x)
        if isinstance(x, str) and "text" in self.domains and domain in (None, "text"):
            try:
                x, said = x.encode(), "text"
            except UnicodeEncodeError as error:
                raise InputError(f"{self.name} takes text that UTF-8 can hold: {error}") from error
        domain = domain or said
        if domain is None:
            domain = next((d for d in self.domains if DOMAINS[d].accepts(x)), None)
        if domain is None or not (domain in self.domains or (domain in DOMAINS and DOMAINS[domain].of in self.domains)):
            takes = " or ".join(f"{d} ({DOMAINS[d].convention})" for d in self.domains)
            raise InputError(f"{self.name} takes {takes}; given: {summary(x)}" + (f" as {domain}" if domain else ""))
        DOMAINS[domain].check(x, self.name)
        if DOMAINS[domain].elements == "bytes":
            x = bytes(x)
            if not x and not self.allow_empty:
                raise InputError(f"{self.name}: the input is empty")
            return x, Spec(domain, (len(x),), "bytes")
        spec = Spec(domain, tuple(int(n) for n in x.shape), dtype_name(x), rate)
        if spec.size == 0 and not self.allow_empty:
            raise InputError(f"{self.name}: the input is empty (shape {spec.shape})")
        if self.lossless and spec.dtype == "bfloat16" and self.native != "torch":
            raise InputError(f"{self.name} keeps numpy's element types exactly; given: bfloat16; take x.view(torch.int16)")
        if not self.lossless and is_float(spec.dtype):
            x = cast(x, "float32")
            if spec.dtype == "float64" and DOMAINS[domain].finite:
                DOMAINS[domain].check(x, f"{self.name} (in float32)")
        x = to_native(x, self.native)
        if domain == "weight" and self.kind != "pruner":
            x = x.reshape(_folded(spec).shape)
        return x, spec

    def _leave(self, x: Any, spec: Spec) -> Any:
        """Check what a decode gave against the spec; give it the input's shape and element type back."""
        if spec.dtype == "bytes":
            if not isinstance(x, (bytes, bytearray)) or len(x) != spec.shape[0]:
                raise CorruptPayloadError(f"{self.name}: decoding gave {summary(x)}, the header says {spec.shape[0]} bytes")
            return bytes(x)
        if not hasattr(x, "shape") or (tuple(x.shape) != _folded(spec).shape and tuple(x.shape) != spec.shape):
            raise CorruptPayloadError(f"{self.name}: decoding gave {summary(x)}, the header says shape {spec.shape}")
        x = cast(x.reshape(spec.shape), spec.dtype)
        return domains.wrap(x, spec.domain, spec.rate)

    def _pack(self, result: Any, out: dict[str, Any], spec: Spec, x: Any) -> Payload:
        parts = {k: v for k, v in out.items() if isinstance(v, (bytes, bytearray)) or hasattr(v, "dtype")}
        meta = {k: v for k, v in out.items() if k not in parts}
        check = _check(x) if self.lossless else None
        return result(self, spec, parts, meta, self.state_id if self.fitted else None, check)  # type: ignore[no-any-return]

    def _unpack(self, payload: Payload, limit: int | None) -> tuple[Method, dict[str, Any], Spec]:
        """The method that reads the payload (with its state), what its underscored function gets, and the spec."""
        from tersor.container import decoded_limit

        if payload.method.name != self.name or payload.method.kind != self.kind:
            raise InputError(
                f"{self.kind} {self.name} cannot read this payload: it is of {payload.method.kind} {payload.method.name}"
            )
        reader = payload.method
        if payload.state is not None and self._own_state is not None and self.state_id == payload.state:
            reader = reader.with_state(self._own_state)
        if payload.state is not None:
            reader = find_state(reader, payload.state)
        spec = payload.spec
        limit = decoded_limit() if limit is None else limit
        from tersor.arrays import SIZES

        needed = spec.size * SIZES[spec.dtype]
        if needed > limit:
            raise LimitError(f"decoding takes {needed} bytes; allowed: at most {limit} (limit=, or TERSOR_MAX_DECODED)")
        native = "torch" if self.native == "torch" else "numpy"
        parts = {k: v if isinstance(v, (bytes, bytearray)) else to_native(v, native) for k, v in payload.parts.items()}
        return reader, {**payload.meta, **parts}, spec

    def _restore(self, given: Payload | bytes, operation: str, limit: int | None) -> Any:
        payload = _payload(given)
        reader, parts, spec = self._unpack(payload, limit)
        inner = getattr(reader, f"_{operation}")

        def call() -> Any:
            try:
                return reader._leave(inner(parts, _folded(spec)), spec)
            except TersorError:
                raise
            except Exception as error:
                raise CorruptPayloadError(
                    f"{self.name}: the payload does not decode ({type(error).__name__}: {error})"
                ) from error

        from tersor.registry import operate

        out = operate(operation, reader, call)
        if payload.check is not None and _check(domains.unwrap(out)[0]) != payload.check:
            raise CorruptPayloadError(f"{self.name}: what was decoded is not what was encoded (its check value differs)")
        return out


def _payload(given: Payload | bytes) -> Payload:
    return given if isinstance(given, Payload) else Payload.from_bytes(given)


def _check(x: Any) -> int:
    """32 bits of the content of an array or bytes, kept with losslessly coded data; -0.0 counts as 0.0, which it equals."""
    import xxhash

    if hasattr(x, "dtype") and is_float(dtype_name(x)):
        with np.errstate(invalid="ignore"):
            x = x + 0
    return xxhash.xxh3_64_intdigest(buffer(x)[2]) & 0xFFFFFFFF


def _folded(spec: Spec) -> Spec:
    """A weight of any number of dimensions as out x in."""
    if spec.domain != "weight" or len(spec.shape) == 2:
        return spec
    rows = spec.shape[0] if len(spec.shape) > 1 else 1
    return Spec(spec.domain, (rows, spec.size // rows if rows else 0), spec.dtype, spec.rate)


def _load_state(path: Path, native: str) -> dict[str, Any]:
    from safetensors import SafetensorError

    try:
        if native == "torch":
            from safetensors.torch import load_file as load
        else:
            from safetensors.numpy import load_file as load  # type: ignore[assignment]
        return dict(load(path))
    except SafetensorError as error:
        raise StateError(f"{path} is not a safetensors file: {error}") from error


def find_state(method: Method, wanted: bytes) -> Method:
    """The method with the state of that content: its own, the one that its package ships, or a file in TERSOR_STATES.

    Raises :class:`tersor.MissingStateError` that names the state.
    """
    import os

    try:
        if method.state_id == wanted:
            return method
        have = f"the state here is {method.state_id.hex()}"
    except MissingStateError:
        have = "no state is here"
    for folder in filter(None, os.environ.get("TERSOR_STATES", "").split(os.pathsep)):
        for path in sorted(Path(folder).glob("*.safetensors")):
            try:
                candidate = method.load(path)
                if candidate.state_id == wanted:
                    return candidate
            except (TersorError, OSError):
                continue
    raise MissingStateError(
        f"{method.name}: the payload was made with state {wanted.hex()}, and {have}; "
        f"give it with state=PATH, or put its file into a folder named in TERSOR_STATES"
    )


class Codec(Method):
    """A method with ``encode(x) -> Payload`` and ``decode(payload) -> x``.

    A codec implements ``_encode(x, spec)``, which gives a dict of parts (bytes, arrays) and scalars, and ``_decode(parts,
    spec)``, which gets the same dict and gives x back. One whose ``calibration`` is not ``"none"`` implements ``_encode(x,
    calibration, spec)`` instead. One that carries something from one input to the next (error feedback) overrides :meth:`stream`.
    """

    kind = "codec"

    def encode(self, x: Any, calibration: Any = None, domain: str | None = None) -> Payload:
        """Encode ``x``, an array of one of the method's domains. ``domain``: which, where the array alone does not say.

        ``calibration``: for weight codecs that take some, a :class:`tersor.Calibration`, or an array samples x in.
        Raises :class:`tersor.InputError`, :class:`tersor.CalibrationError`.
        """
        from tersor.registry import operate

        if isinstance(calibration, str):
            raise InputError(f"{self.name}: calibration={calibration!r}; a domain is given by name: domain={calibration!r}")
        native, spec = self._enter(x, domain)
        ready = enter_calibration(self, calibration, native)
        folded = _folded(spec)

        def call() -> Payload:
            given = (native, folded) if self.calibration == "none" else (native, ready, folded)
            return self._pack(Payload, self._encode(*given), spec, native)

        return operate("encode", self, call)  # type: ignore[no-any-return]

    def stream(self, **options: Any) -> Stream:
        """What encodes a series of inputs of one shape, with the memory that the method keeps between them; see
        :class:`tersor.Stream`."""
        from tersor.stream import Stream

        return Stream(self, **options)

    def decode(self, payload: Payload | bytes, limit: int | None = None) -> Any:
        """What was encoded, from a payload or its bytes. ``limit``: bytes that the result may take (4 GiB).

        Raises the errors under :class:`tersor.FileError` and :class:`tersor.MissingStateError`.
        """
        return self._restore(payload, "decode", limit)

    def _encode(self, *given: Any) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__}._encode")

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        raise NotImplementedError(f"{type(self).__name__}._decode")


class Quantizer(Method):
    """A method with ``quantize(x, calibration=None) -> Codes`` and ``dequantize(codes) -> x``.

    A quantizer implements ``_quantize(x, calibration, spec)`` and ``_dequantize(parts, spec)``; a learned one also
    ``layer()``, the torch module that trains.
    """

    kind = "quantizer"
    idempotent: ClassVar[bool] = False  # quantizing what was dequantized gives the same values

    def quantize(self, x: Any, calibration: Any = None, domain: str | None = None) -> Codes:
        """Quantize ``x``. ``calibration``: a :class:`tersor.Calibration`, or an array samples x in.

        Raises :class:`tersor.InputError`, :class:`tersor.CalibrationError`.
        """
        from tersor.registry import operate

        native, spec = self._enter(x, domain)
        ready = enter_calibration(self, calibration, native)
        return operate(  # type: ignore[no-any-return]
            "quantize", self, lambda: self._pack(Codes, self._quantize(native, ready, _folded(spec)), spec, native)
        )

    def dequantize(self, codes: Codes | bytes, limit: int | None = None) -> Any:
        """The values that the codes stand for. ``limit`` and errors as :meth:`Codec.decode`."""
        return self._restore(codes, "dequantize", limit)

    def stream(self, **options: Any) -> Stream:
        """As :meth:`Codec.stream`."""
        from tersor.stream import Stream

        return Stream(self, **options)

    def uniform(self, codes: Codes | bytes) -> Uniform | None:
        """A weight's codes as evenly spaced levels, out x in, or None where the method's values are no such levels.

        Errors as :meth:`dequantize`.
        """
        payload = _payload(codes)
        reader, parts, spec = self._unpack(payload, None)
        try:
            return reader._uniform(parts, _folded(spec))  # type: ignore[attr-defined, no-any-return]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CorruptPayloadError(f"{self.name}: the payload has no levels ({type(error).__name__}: {error})") from error

    @classmethod
    def at_bits(cls, bits: int) -> list[Self]:
        """The instances that stand for about ``bits`` bits a weight where methods are compared; none where there are none."""
        try:
            return [cls.build(bits=bits)]
        except ConfigError:
            return []

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        return None

    def _quantize(self, x: Any, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__}._quantize")

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Any:
        raise NotImplementedError(f"{type(self).__name__}._dequantize")


def enter_calibration(method: Method, given: Any, x: Any) -> Calibration | None:
    """Check calibration data against a weight ``x`` (out x in); arrays in the method's native type."""
    if given is None:
        if method.calibration == "required":
            raise CalibrationError(
                f"{method.name} needs calibration data: an array samples x in, or tersor.Calibration(inputs=...) or (gram=..., count=...)"
            )
        return None
    if method.calibration == "none":
        return None
    if not isinstance(given, Calibration):
        given = Calibration(inputs=given)
    import attrs

    changes: dict[str, Any] = {}
    width = x.shape[-1] if hasattr(x, "shape") and len(x.shape) else None
    for name, ndim in (("inputs", None), ("gram", 2), ("gradients", None)):
        value = getattr(given, name)
        if value is None:
            continue
        if not hasattr(value, "dtype"):
            try:
                value = np.asarray(value, dtype=np.float32)
            except (ValueError, TypeError) as error:
                raise CalibrationError(f"{method.name}: calibration.{name} is no array of numbers: {error}") from error
        if len(value.shape) < 2 or 0 in tuple(value.shape):
            raise CalibrationError(
                f"{method.name}: calibration.{name} has shape {tuple(value.shape)}; allowed: samples x in, not empty"
            )
        DOMAINS["gradient"].check(value, f"{method.name}: calibration.{name}")
        value = cast(to_native(value, method.native), "float32")
        if name == "inputs":
            value = value.reshape(-1, value.shape[-1]) if len(value.shape) != 2 else value
        if name != "gradients" and width is not None and (value.shape[-1] != width or (ndim and value.shape[0] != width)):
            want = f"{width} x {width}" if ndim else f"samples x {width}"
            raise CalibrationError(f"{method.name}: calibration.{name} has shape {tuple(value.shape)}; allowed: {want}")
        if name == "inputs" and value.shape[0] == 0:
            raise CalibrationError(f"{method.name}: calibration.inputs has no samples")
        changes[name] = value
    return attrs.evolve(given, **changes)


class Pruner(Method):
    """A method with ``prune(x, calibration=None) -> Mask`` and ``apply(x, mask) -> x``.

    ``x`` is one array, or a mapping of names to arrays that are pruned together. A pruner implements ``_prune(tensors,
    calibration)``, which gives for each name a boolean array, True where the element is kept.
    """

    kind = "pruner"

    def promised(self, size: int) -> int | None:
        """How many of ``size`` elements (over all tensors) are kept, where the method promises a number."""
        return None

    def prune(self, x: Any, calibration: Any = None) -> Mask:
        """Which elements of ``x`` to keep. Raises :class:`tersor.InputError`, :class:`tersor.CalibrationError`."""
        from tersor.registry import operate

        tensors = {k: self._enter(v)[0] for k, v in _named(x).items()}
        if not tensors:
            raise InputError(f"{self.name}: no tensors were given")
        ready = (
            enter_calibration(self, calibration, next(iter(tensors.values())))
            if not isinstance(calibration, Mapping)
            else calibration
        )
        masks = operate("prune", self, lambda: self._prune(tensors, ready))
        return Mask(self, masks)

    def apply(self, x: Any, mask: Mask) -> Any:
        """``x`` with the elements that the mask drops set to zero; arrays in, arrays out, mappings in, dicts out."""
        from tersor.registry import operate

        tensors = _named(x)
        if set(tensors) != set(mask.masks):
            raise InputError(f"{self.name}: the mask is of {sorted(mask.masks)}, the tensors are {sorted(tensors)}")

        def one(name: str, value: Any) -> Any:
            if tuple(value.shape) != tuple(mask[name].shape):
                raise InputError(
                    f"{self.name}: mask of shape {tuple(mask[name].shape)} for a tensor of shape {tuple(value.shape)}"
                )
            native, kept = to_native(value, self.native), to_native(mask[name], self.native)
            return native.where(kept, 0) if is_torch(native) else np.where(kept, native, native.dtype.type(0))

        out = operate("apply", self, lambda: {k: one(k, v) for k, v in tensors.items()})
        return out if isinstance(x, Mapping) else out[""]

    def _prune(self, tensors: dict[str, Any], calibration: Any) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__}._prune")

    def pack(self, x: Any, mask: Mask) -> Payload:
        """The pruned tensors as a file: the mask's places and the values that it keeps."""
        tensors = {k: to_numpy(v) if dtype_name(v) != "bfloat16" else v for k, v in _named(x).items()}
        parts, meta = mask._parts()
        for name, value in tensors.items():
            keep = to_native(mask[name], "torch" if not isinstance(value, np.ndarray) else "numpy")
            parts[f"v/{name}"] = value[keep]
        single = not isinstance(x, Mapping)
        spec = Spec("array", tuple(x.shape) if single else (), dtype_name(x) if single else "float32")
        return Payload(self, spec, parts, {**meta, "single": single})

    def encode(self, x: Any, calibration: Any = None) -> Payload:
        """Prune and pack in one step."""
        return self.pack(x, self.prune(x, calibration))

    def decode(self, payload: Payload | bytes, limit: int | None = None) -> Any:
        """The pruned tensors as dense arrays (or the :class:`tersor.Mask`, where only that was saved)."""
        from tersor.sparse import unpack_mask

        reader, parts, spec = self._unpack(_payload(payload), limit)
        from tersor.container import decoded_limit

        left = decoded_limit() if limit is None else limit
        shapes = parts.get("shapes")
        if not isinstance(shapes, dict):
            raise CorruptPayloadError(f"{self.name}: the payload has no shapes")
        masks, out = {}, {}
        try:
            for name, shape in shapes.items():
                shape = tuple(int(n) for n in shape)
                left -= 8 * int(np.prod(shape, dtype=np.float64))
                if left < 0 or any(n < 0 for n in shape):
                    raise LimitError(f"{self.name}: the tensors take more bytes than the limit allows")
                masks[name] = unpack_mask(parts[f"m/{name}"], shape)
                if f"v/{name}" in parts:
                    values = to_native(parts[f"v/{name}"], self.native)
                    dense = to_native(np.zeros(shape, np.float32), self.native)
                    dense = cast(dense, dtype_name(values))
                    dense[to_native(masks[name], self.native)] = values
                    out[name] = dense
        except TersorError:
            raise
        except Exception as error:
            raise CorruptPayloadError(f"{self.name}: the payload does not decode ({type(error).__name__}: {error})") from error
        if not out:
            return Mask(reader, masks)
        return self._leave(out[""], spec) if parts.get("single") and "" in out else out


def _named(x: Any) -> dict[str, Any]:
    return dict(x) if isinstance(x, Mapping) else {"": x}


class Decoder(Method):
    """A method with ``decode(source, prompt) -> Decoded``: it draws tokens from a sequence model.

    ``source``: a :class:`tersor.Source`, or a transformers causal language model. A decoder implements ``_decode(source,
    prompt, budget)``.
    """

    kind = "decoder"
    domains = ("sequence",)
    exact: ClassVar[str | None] = None  # "greedy": the same tokens; "distribution": the same distribution as the source's

    def example_options(self, source: Any) -> dict[str, Any]:
        """Options (a draft source, say) that the conformance kit gives to ``decode`` with this source."""
        return {}

    def reseeded(self, seed: int) -> Self:
        """The same decoder with another seed; a decoder that draws at random has to say how."""
        raise NotImplementedError(f"{type(self).__name__}.reseeded")

    def target_probability(self, source: Any, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """The probability that ``tokens`` should have after ``prompt``: the source's own, unless the decoder changes it."""
        return source.probabilities(prompt, tokens)  # type: ignore[no-any-return]

    def decode(self, source: Any, prompt: Sequence[int] | np.ndarray, max_new_tokens: int = 128, **options: Any) -> Decoded:
        """Decode at most ``max_new_tokens`` tokens after ``prompt`` (at least one token number below ``source.vocabulary``).

        ``options``: what the decoder's own documentation names (a draft source, an input to copy from).
        Raises :class:`tersor.InputError`.
        """
        from tersor.registry import operate

        if not hasattr(source, "open"):
            from tersor.model.source import TransformersSource

            source = TransformersSource(source)
        try:
            tokens = np.asarray(prompt)
            max_new_tokens = operator.index(max_new_tokens)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self.name}: the prompt is a list of token numbers and max_new_tokens a whole number: {error}"
            ) from error
        known = inspect.signature(self._decode).parameters
        for option in options:
            if option not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                allowed = ", ".join(list(known)[3:]) or "none"
                raise InputError(f"{self.name}: unknown option {option!r}; allowed: {allowed}")
        if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise InputError(f"{self.name}: the prompt is a non-empty list of token numbers; given: {summary(tokens)}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= source.vocabulary:
            raise InputError(
                f"{self.name}: the prompt has tokens from {tokens.min()} to {tokens.max()}; allowed: 0 to {source.vocabulary - 1}"
            )
        if max_new_tokens < 0:
            raise InputError(f"{self.name}: max_new_tokens={max_new_tokens}; allowed: 0 or more")
        start = time.perf_counter()
        if max_new_tokens == 0:
            return Decoded(np.empty(0, np.int64))
        prompt_list = [int(t) for t in tokens]
        out = operate("decode", self, lambda: self._decode(source, prompt_list, max_new_tokens, **options))
        out.seconds = time.perf_counter() - start
        out.tokens = np.asarray(out.tokens, np.int64)
        if out.tokens.size and not 0 <= int(out.tokens.min()) <= int(out.tokens.max()) < source.vocabulary:
            raise InputError(
                f"{self.name}: the source led to a token beyond its vocabulary of {source.vocabulary} (NaN in its logits?)"
            )
        return out  # type: ignore[no-any-return]

    def _decode(self, source: Any, prompt: list[int], budget: int, **options: Any) -> Decoded:
        raise NotImplementedError(f"{type(self).__name__}._decode")
