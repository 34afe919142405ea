"""Networks that compute with compressed weights: layers whose tensors are held as the parts of their files.

:func:`compress_layers` puts a weight method's results into a network as they are stored, not as they decode. A method may bring a
layer of its own (two thin ones for low-rank factors); for every other method the tensor's place is taken by a
:class:`CompressedTensor`, which keeps the parts as buffers and decodes when the layer asks for its weight. The layer itself stays
what it was, so this works for any module. A state dict holds the parts under ``NAME.PART`` (``0.weight.codes``), and loads strictly
into a network that was prepared with :func:`skeleton`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from tersor import container
from tersor.api import as_method, payload_of, restore
from tersor.arrays import SIZES, buffer, to_torch
from tersor.domains import DOMAINS
from tersor.errors import CorruptPayloadError, InputError, LimitError
from tersor.files import atomic_write
from tersor.model.driver import _need_batches, _Target, _targets, _walk
from tersor.model.recipe import Recipe
from tersor.model.statistics import transposed
from tersor.results import Payload, Spec

_KEY = "tersor"  # of the description in a file's metadata


class CompressedTensor(torch.nn.Module):
    """One compressed tensor: the parts of its payload as buffers, named as in the file (``.`` as ``%2E``; bytes as uint8).

    ``decode()`` gives the tensor, in the element type that the network was last cast to. The parts themselves are never cast.
    """

    def __init__(self, payload: Payload, transpose: bool = False) -> None:
        super().__init__()
        self.payload = attrs.evolve(payload, parts={})
        self.transpose = transpose
        self.dtype = getattr(torch, payload.spec.dtype)
        self._bytes = frozenset(k for k, v in payload.parts.items() if isinstance(v, (bytes, bytearray)))
        for name, value in payload.parts.items():
            # a name may be that of an attribute of modules ("data", "half"), which register_buffer refuses
            self._buffers[name.replace(".", "%2E")] = _tensor(value)

    def parts(self) -> dict[str, Any]:
        """The parts as the file has them; tensors share the buffers' memory."""
        out: dict[str, Any] = {}
        for key, value in self._buffers.items():
            name = key.replace("%2E", ".")
            out[name] = bytes(value.cpu().numpy()) if name in self._bytes else value  # type: ignore[union-attr]
        return out

    def full(self) -> Payload:
        """The payload, whose ``nbytes`` is what the tensor costs."""
        return attrs.evolve(self.payload, parts=self.parts())

    @torch.no_grad()
    def decode(self) -> torch.Tensor:
        """The tensor in its place's shape. Raises :class:`tersor.CorruptPayloadError`, :class:`tersor.MissingStateError`."""
        value = to_torch(restore(self.full()))
        device = next((b.device for b in self._buffers.values() if b is not None), value.device)
        value = value.to(device, self.dtype)
        return value.T if self.transpose else value  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedTensor:
        for key, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                self._buffers[key] = moved if moved.dtype == value.dtype else value.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.payload.method}, {'x'.join(map(str, self.payload.spec.shape))}"


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, (bytes, bytearray)):
        return torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0, dtype=torch.uint8)
    return to_torch(value).clone().contiguous()  # type: ignore[no-any-return]


class CompressedLayer:
    """Mixed into the class of a module whose tensors are compressed: their names give what they decode to."""

    _plain: type
    _names: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own; of one with a kernel (:func:`tersor.model.pack_layers`) the kernel's, for a few rows."""
        kernel = self.__dict__.get("_kernel")
        if kernel is not None and len(args) == 1 and not kwargs:
            from tersor.model.packed import ROWS

            x = args[0]
            wanted = torch.is_grad_enabled() and x.requires_grad
            if 0 < x.numel() <= ROWS * x.shape[-1] and not wanted and x.device.type == "cpu":
                out = kernel(x.reshape(-1, x.shape[-1])).to(x.dtype)
                bias = self._parameters["bias"]  # type: ignore[attr-defined]
                return (out if bias is None else out + bias).view(*x.shape[:-1], -1)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self._plain, self._names), self.__dict__


def _empty(cls: type, names: tuple[str, ...]) -> Any:
    """A layer of :func:`_class_of` without anything in it, for copies."""
    return object.__new__(_class_of(cls, names))


@functools.cache
def _class_of(cls: type, names: tuple[str, ...]) -> type:
    """The class of a layer, with properties in the place of some of its tensors."""

    def reader(name: str) -> property:
        return property(lambda self: self._modules[name].decode())

    return type(
        f"Compressed{cls.__name__}", (CompressedLayer, cls), {"_plain": cls, "_names": names, **{n: reader(n) for n in names}}
    )


def _hold(layer: torch.nn.Module, attribute: str, held: CompressedTensor) -> None:
    """Put a compressed tensor in the place of a parameter."""
    if isinstance(layer, torch.nn.RNNBase):
        raise InputError(f"{type(layer).__name__} keeps other references to {attribute}; tersor.model.quantize takes it")
    plain: Any = getattr(type(layer), "_plain", type(layer))
    names = {n for n, m in layer._modules.items() if isinstance(m, CompressedTensor)} | {attribute}
    del layer._parameters[attribute]
    layer._modules[attribute] = held
    layer.__class__ = _class_of(plain, tuple(sorted(names)))


def module(payload: Payload, bias: Any = None, layer: Any = None) -> torch.nn.Module:
    """A layer that computes with a compressed weight.

    ``bias``: out values, or None. ``layer``: the layer whose settings it has (a convolution, say); default: a linear one.
    The method's own kind of layer where it has one; else one that decodes whenever it is called. Raises
    :class:`tersor.InputError` for a payload that is no matrix and has no ``layer``, or for a layer of another shape.
    """
    if layer is None:
        if (payload.spec.domain != "weight" and payload.method.kind != "pruner") or len(payload.spec.shape) != 2:
            raise InputError(
                f"a linear layer needs a weight, out x in; the payload holds {payload.spec.domain} {payload.spec.shape}"
            )
        rows, columns = payload.spec.shape
        dtype = getattr(torch, payload.spec.dtype)
        layer = torch.nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=dtype)
    wanted = tuple(layer.weight.shape)
    if tuple(payload.spec.shape) != (wanted[::-1] if transposed(layer) else wanted):
        raise InputError(f"a payload of shape {payload.spec.shape} for a layer whose weight has shape {wanted}")
    if bias is not None:
        bias = torch.nn.Parameter(to_torch(bias).detach().clone().to(getattr(torch, payload.spec.dtype)))
    holder = torch.nn.ModuleDict({"layer": _shallow(layer, bias)})
    _place(holder, "layer.weight", payload)
    return holder["layer"]


def _shallow(layer: torch.nn.Module, bias: Any) -> torch.nn.Module:
    """A copy of a layer that shares its tensors, with another bias."""
    import copy

    out = copy.copy(layer)
    for name in ("_parameters", "_buffers", "_modules"):
        out.__dict__[name] = dict(layer.__dict__[name])
    out._parameters["bias"] = bias
    return out


def _own(payload: Payload, layer: torch.nn.Module) -> Any:
    """The method's own layer in the place of ``layer``, or None."""
    from tersor.kinds import Method

    if type(payload.method)._module is Method._module:
        return None
    from tersor.kinds import _folded

    reader, parts, spec = payload.method._unpack(payload, None)
    try:
        return reader._module(parts, _folded(spec), layer._parameters.get("bias"), layer)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CorruptPayloadError(f"{reader.name}: the payload makes no layer ({type(error).__name__}: {error})") from error


def _place(model: torch.nn.Module, name: str, payload: Payload) -> None:
    """Put a payload in the place of the parameter ``name``, and of all others that are the same parameter."""
    parameter = model.get_parameter(name)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    info = _info(payload)
    held: dict[bool, CompressedTensor] = {}
    made: dict[int, torch.nn.Module] = {}
    for n in names:
        path, _, attribute = n.rpartition(".")
        layer = model.get_submodule(path)
        if id(layer) in made or attribute not in layer._parameters:
            continue  # the same layer under another name
        own = _own(payload, layer) if attribute == "weight" and path else None
        if own is None:
            turned = transposed(layer) and attribute == "weight"
            if turned not in held:
                held[turned] = CompressedTensor(payload, turned)
                held[turned].info = info  # type: ignore[assignment]
            _hold(layer, attribute, held[turned])
            continue
        own.info = info
        own.train(layer.training)
        if made:
            _share(next(iter(made.values())), own)
        made[id(layer)] = own
        for place, child in list(model.named_modules(remove_duplicate=False)):
            if child is layer:
                above, _, leaf = place.rpartition(".")
                model.get_submodule(above)._modules[leaf] = own


def _share(first: torch.nn.Module, other: torch.nn.Module) -> None:
    """Tied weights stay tied: the parameters of one layer, biases aside, become those of another."""
    for name, parameter in first.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf != "bias":
            other.get_submodule(path)._parameters[leaf] = parameter


def place_layers(model: Any, payloads: Mapping[str, Payload]) -> Any:
    """Put compressed weights into a network: names of tensors to payloads, such as :func:`tersor.model.quantize` returns.

    ``model`` is changed in place and returned. Raises :class:`tersor.InputError` for a name or a shape that is not the network's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, payload in payloads.items():
        if name not in parameters:
            raise InputError(f"the network has no tensor {name!r}; it has {', '.join(list(parameters)[:4])}, ...")
        layer = model.get_submodule(name.rpartition(".")[0])
        shape = tuple(parameters[name].shape)
        shape = shape[::-1] if name.endswith("weight") and transposed(layer) else shape
        if tuple(payload.spec.shape) not in (shape, ()):
            raise InputError(f"a payload of shape {payload.spec.shape} for {name!r}, which has shape {shape}")
        _place(model, name, payload)
    return model


def compress_layers(model: Any, method: Any, batches: Any = None, recipe: Any = None, jobs: int = 1) -> dict[str, Payload]:
    """Compress a network in memory and let it compute with the compressed weights.

    Arguments, errors and the choice of tensors are those of :func:`tersor.model.quantize`; so is what comes back, tensor names
    to payloads. Layers are replaced in place. Not for recurrent layers of torch.nn, which keep references to their weights.
    """
    method, recipe = as_method(method), Recipe.of(recipe)
    batches = list(batches or [])
    targets = _targets(model, method, recipe)
    _need_batches(targets, batches)

    def place(t: _Target, payload: Payload) -> None:
        _place(model, t.name, payload)

    return {t.name: payload for t, payload in _walk(model, targets, batches, lambda _: None, place, jobs)}


def _info(payload: Payload) -> dict[str, Any]:
    h = payload._header()
    parts = {k: [b[0], list(b[1])] for k, v in payload.parts.items() for b in (buffer(v),)}
    return {
        "kind": h.kind, "method": h.method, "distribution": h.distribution, "version": h.version,
        "config_version": h.config_version, "config": h.config, "meta": h.meta, "domain": h.spec.domain,
        "shape": list(h.spec.shape), "dtype": h.spec.dtype, "state": h.state.hex() if h.state else None, "check": h.check,
        "parts": parts,
    }  # fmt: skip


def describe(model: Any) -> dict[str, Any]:
    """What :func:`skeleton` needs to know of a network's compressed layers, JSON-ready: tensor names to methods, settings and the
    shapes of the parts. Keep it beside the state dict; :func:`save_layers` does."""
    out: dict[str, Any] = {}
    seen: set[int] = set()  # tied tensors have one description
    for name, child in model.named_modules(remove_duplicate=False):
        info = getattr(child, "info", None)
        if isinstance(info, dict) and "config_version" in info and id(info) not in seen:
            seen.add(id(info))
            out[name if isinstance(child, CompressedTensor) else f"{name}.weight"] = info
    return out


def skeleton(model: Any, description: Mapping[str, Any], state: Any = None) -> Any:
    """A network with empty compressed layers, as :func:`describe` says, for ``load_state_dict(..., strict=True)``.

    ``model``: a freshly built network, changed in place and returned. ``state``: the saved state of a fitted method, where its
    package does not ship it. Raises :class:`tersor.CorruptPayloadError` for a description that is not of this network,
    :class:`tersor.LimitError` for one of more bytes than an array may have, and the lookup errors.
    """
    total = 0
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, info in description.items():
        try:
            spec = Spec(info["domain"], tuple(map(int, info["shape"])), info["dtype"])
            parts = tuple(container.Part(k, d, tuple(map(int, s))) for k, (d, s) in info["parts"].items())
            header = container.Header(
                kind=info["kind"], method=info["method"], distribution=info["distribution"], version=info["version"],
                config_version=info["config_version"], config=info["config"], meta=info["meta"], spec=spec, check=info["check"],
                state=bytes.fromhex(info["state"]) if info["state"] else None, parts=parts,
            )  # fmt: skip
            total += sum(p.nbytes for p in parts)
            sound = all(min((0, *p.shape)) >= 0 for p in parts) and spec.dtype in SIZES and spec.domain in DOMAINS
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptPayloadError(f"the description of {name!r} cannot be read ({type(error).__name__}: {error})") from error
        shape = tuple(parameters[name].shape) if name in parameters else ()
        layer = model.get_submodule(name.rpartition(".")[0]) if name in parameters else None
        wanted = shape[::-1] if name.endswith("weight") and transposed(layer) else shape
        if not sound or (spec.shape != wanted and not (header.kind == "pruner" and spec.shape == ())):
            raise CorruptPayloadError(
                f"the description has {name!r} of shape {spec.shape}; the network's is {wanted or 'missing'}"
            )
        if total > container.decoded_limit():
            raise LimitError(f"the compressed layers take more than {container.decoded_limit()} bytes (TERSOR_MAX_DECODED)")
        _place(model, name, payload_of(header, {p.name: memoryview(bytearray(p.nbytes)) for p in parts}, state))
    return model


def save_layers(model: Any, path: str | os.PathLike[str]) -> Path:
    """Write a network's state dict with the description of its compressed layers as one safetensors file (atomically).

    Tensors that share memory are written once. Raises OSError.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    taken: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype) if value.numel() else name
        if taken.setdefault(key, name) != name:
            ties[name] = taken[key]
        else:
            tensors[name] = value.detach().contiguous()
    with atomic_write(path) as file:
        file.write(save(tensors, {_KEY: json.dumps({"layers": describe(model), "ties": ties})}))
    return Path(path)


def load_layers(model: Any, path: str | os.PathLike[str], state: Any = None) -> Any:
    """Load what :func:`save_layers` wrote into a freshly built network, strictly; ``model`` is changed in place and returned.

    ``state``: as :func:`skeleton`. Raises :class:`tersor.InputError` for a file of another kind or network, the errors of
    :func:`skeleton`, OSError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            told = json.loads(text) if text else None
            if not isinstance(told, dict) or not isinstance(told.get("layers"), dict) or not isinstance(told.get("ties"), dict):
                raise InputError(
                    f"{path} does not say which layers are compressed; tersor.model.save_layers writes files that do"
                )
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is no file of compressed layers: {error}") from error
    try:
        tensors.update({n: tensors[first] for n, first in told["ties"].items()})
        skeleton(model, told["layers"], state).load_state_dict(tensors, strict=True)
    except (RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds another network: {str(error)[:500]}") from error
    return model
