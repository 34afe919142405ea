"""Folders in the format of compressed-tensors (https://github.com/vllm-project/compressed-tensors), which transformers reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tersor import ConfigError, Exporter, ExportError, ExportModel, ModelTensor, Uniform, field, method, one_of, track
from tersor.exporters import common_group, refuse
from tersor.model.loading import offline
from tersor_compressed_tensors.shards import Shards

#: Rows that do not fit whole groups are written in smaller ones, but not below this size.
SMALLEST = 16
_DTYPES = {"float32": torch.float32, "float16": torch.float16}

DENSE, SPARSE = "plain numbers", "sparse-24-bitmask"


class Scheme(NamedTuple):
    """How codes are written. ``group``: columns in a group, -1 for the whole row."""

    bits: int
    symmetric: bool
    group: int
    format: str

    @property
    def packed(self) -> bool:
        return self.format == "pack-quantized"

    def __str__(self) -> str:
        where = "channel" if self.group == -1 else f"group {self.group}"
        return f"{self.format} int{self.bits} {where}{'' if self.symmetric else ', zero points'}"


@method
class CompressedTensors(Exporter):
    """A folder that ``AutoModelForCausalLM.from_pretrained`` reads with the package compressed-tensors.

    Linear layers whose values are evenly spaced levels, of 1 to 8 bits, become

    - ``pack-quantized``: codes packed into int32 words, as ``weight_packed``, ``weight_shape``, ``weight_scale`` (and
      ``weight_zero_point``); one scale for a group or a row, symmetric or with zero points;
    - ``int-quantized``: codes as int8, whatever their bits, as ``weight``.

    The codes are those of the file. Groups that do not divide a row, and a shorter last one, are written as smaller groups with
    repeated scales: 576 columns in groups of 128 as groups of 64. What was kept is written as it was.

    Not held, with the tensor's name in the :class:`tersor.ExportError`: values that are no evenly spaced levels (codebooks, low
    rank, sparse ones); groups in the order of activations (``g_idx`` has left the format); zero points that are no whole
    numbers of ``bits`` bits; layers other than ``torch.nn.Linear``. ``rest="dense"`` writes these as plain numbers.
    Weights of which each run of four has at most two others than 0 fit ``sparse-24-bitmask``, which compressed-tensors reads up to
    0.14 and transformers 5 no longer does: ``sparse24`` writes it for engines that do.
    """

    name = "compressed-tensors"

    format: str = field("pack-quantized", one_of("pack-quantized", "int-quantized"), help="how codes are stored")
    dtype: str = field("float32", one_of("float32", "float16"), help="element type of scales, and of the model in config.json")
    rest: str = field("refuse", one_of("refuse", "dense"), help="tensors that the format cannot hold: an error, or plain numbers")
    sparse24: bool = field(False, help="write 2:4 sparse weights as sparse-24-bitmask, which transformers 5 does not read")

    def check(self, config: Mapping[str, Any]) -> None:
        if "quantization_config" in config:
            raise ExportError(
                "compressed-tensors: the model's config.json already has a quantization_config; export a plain model"
            )

    def _export(self, model: ExportModel, out: Path) -> dict[str, str]:
        (out / "config.json").write_text(json.dumps(model.config), "utf-8")
        linear = linear_layers(out)
        plan = self._plan(model, linear)
        shards = Shards(out)
        for t in track(model, "exporting"):
            layer = t.name.removesuffix(".weight")
            for name, value in self._parts(t, plan[t.name]).items():
                shards.add(f"{layer}.{name}" if name else t.name, value)
        shards.close()
        for name, content in model.files.items():
            (out / name).write_bytes(content)
        config = {**model.config, "dtype": self.dtype}
        config.pop("torch_dtype", None)
        schemes: dict[Scheme, list[str]] = {}
        for name, form in plan.items():
            if isinstance(form, Scheme):
                schemes.setdefault(form, []).append(name.removesuffix(".weight"))
        sparse = [name.removesuffix(".weight") for name, form in plan.items() if form == SPARSE]
        if schemes:
            config["quantization_config"] = _quantization(schemes, linear)
        elif sparse:
            config["quantization_config"] = _sparsity(sparse, linear)
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        return {name: str(form) for name, form in plan.items()}

    def _plan(self, model: ExportModel, linear: set[str]) -> dict[str, Scheme | str]:
        """How each tensor is written: as a scheme says, sparse, or as plain numbers. Nothing is written before all are known to fit."""
        plan: dict[str, Scheme | str] = {}
        problems: dict[str, str] = {}
        for t in track(model, "checking"):
            try:
                plan[t.name] = DENSE if t.kept else self._form(t, linear)
            except ExportError as error:
                plan[t.name] = DENSE
                if self.rest == "refuse":
                    problems[t.name] = str(error)
        packed = {n: f for n, f in plan.items() if isinstance(f, Scheme) and f.packed}
        if len(set(packed.values())) > 1 and not all(f.symmetric for f in packed.values()):
            plan |= _agreed(packed, {n: model.tensors[n].shape[-1] for n in packed}, problems)
        sparse = [n for n, f in plan.items() if f == SPARSE]
        quantized = [n for n, f in plan.items() if isinstance(f, Scheme)]
        if sparse and quantized:
            problems[sparse[0]] = f"it is sparse, and {quantized[0]} is quantized: one model is one of the two"
        refuse("compressed-tensors", problems)
        return plan

    def _form(self, t: ModelTensor, linear: set[str]) -> Scheme | str:
        """How one tensor is written; :class:`tersor.ExportError` says why it cannot be."""
        if t.name.removesuffix(".weight") not in linear or t.turned:
            raise ExportError("it is not the weight of a torch.nn.Linear, and no other layer has a quantized form")
        if self.sparse24 and (mask := t.mask()) is not None:
            _places(mask)
            return SPARSE
        u = t.uniform()
        if u is None:
            raise ExportError(_no_levels(t))
        group = _group(u)
        if self.dtype == "float16" and not bool((u.scale.half().float() == u.scale).all()):
            raise ExportError("its scales are not exact in float16; dtype=float32 holds them")
        if u.zero is not None and not bool(((u.zero == u.zero.round()) & (u.zero >= 0) & (u.zero < 1 << u.bits)).all()):
            raise ExportError(f"its zero points are not whole numbers of {u.bits} bits")
        if u.zero is not None and self.format == "pack-quantized" and u.bits == 4 and len(u.codes) <= 8:
            raise ExportError(
                f"it has {len(u.codes)} rows, and its zero points are one word of 32 bits, which compressed-tensors 0.20 fails to unpack; "
                f"format=int-quantized, or symmetric levels"
            )
        return Scheme(u.bits, u.zero is None, group, self.format)

    def _parts(self, t: ModelTensor, form: Scheme | str) -> dict[str, Tensor]:
        """The tensors that stand for one, by the last piece of their names; ``""`` is its own name."""
        from compressed_tensors.compressors import pack_to_int32

        if form == SPARSE:
            return _sparse24(t.dense(), t.mask())
        u = t.uniform() if isinstance(form, Scheme) else None
        if u is None or not isinstance(form, Scheme):
            return {"": t.dense()}
        u = _regrouped(u, form.group)
        offset = 1 << (u.bits - 1)
        codes = (u.codes.to(torch.int16) - offset).to(torch.int8)
        parts = {"weight_scale": u.scale.to(_DTYPES[self.dtype])}
        if not form.packed:
            parts["weight"] = codes
        else:
            parts["weight_packed"] = pack_to_int32(codes, u.bits)
            parts["weight_shape"] = torch.tensor(codes.shape)
        if u.zero is not None:
            zero = (u.zero - offset).to(torch.int8)
            parts["weight_zero_point"] = pack_to_int32(zero, u.bits, packed_dim=0) if form.packed else zero
        return parts


def linear_layers(folder: Path) -> set[str]:
    """The names of all linear layers of the network that a folder's config.json describes; nothing is allocated for it."""
    with offline() as transformers, torch.device("meta"):
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            network = transformers.AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError, OSError) as error:
            raise ConfigError(f"the model's config.json names no language model of transformers: {str(error)[:200]}") from error
    return {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}


def _group(u: Uniform) -> int:
    """The size of groups that all of a row's groups consist of, -1 where the row is one; ExportError where the format has no such."""
    columns = u.codes.shape[1]
    if u.scale.shape[1] == 1:
        return -1
    if u.index is not None and not torch.equal(u.index, torch.arange(columns, device=u.index.device) // u.group_size):
        raise ExportError(
            "its groups are in the order of activations, which the format no longer has (g_idx); "
            "compress with groups in the layout of the weights (gptq: static_groups=true, or act_order=false)"
        )
    size = common_group(u.group_size, columns)
    if size < min(SMALLEST, u.group_size):
        raise ExportError(
            f"its rows of {columns} are in groups of {u.group_size}, and groups of one size would have {size} weights; "
            f"at least {SMALLEST} are needed: choose a group size that divides {columns}"
        )
    return size


def _regrouped(u: Uniform, group: int) -> Uniform:
    """The same values in groups of that size (-1: the row is one)."""
    columns = u.codes.shape[1]
    size = columns if u.scale.shape[1] == 1 else u.group_size
    return Uniform(u.codes, u.scale, u.zero, u.bits, size).regrouped(columns if group == -1 else group)


def _agreed(packed: Mapping[str, Scheme], columns: Mapping[str, int], problems: dict[str, str]) -> dict[str, Scheme]:
    """One scheme for all layers, in smaller groups: transformers reads packed zero points only where there is one."""
    first = next(iter(packed.values()))
    for name, form in packed.items():
        if (form.bits, form.symmetric) != (first.bits, first.symmetric):
            problems[name] = (
                f"it has {form.bits} bits {'without' if form.symmetric else 'with'} zero points and others {first.bits} bits "
                f"{'without' if first.symmetric else 'with'}; transformers reads packed zero points only where all layers are alike: "
                f"format=int-quantized, or symmetric levels"
            )
    size = math.gcd(*(columns[n] if f.group == -1 else f.group for n, f in packed.items()))
    if size < min(SMALLEST, *(f.group for f in packed.values() if f.group > 0)):
        name = min(packed, key=lambda n: columns[n] if packed[n].group == -1 else packed[n].group)
        problems.setdefault(
            name,
            f"its groups and those of the other layers have {size} weights in common, at least {SMALLEST} are needed; transformers "
            f"reads packed zero points only where all layers are alike: format=int-quantized, or symmetric levels",
        )
    return {name: Scheme(form.bits, form.symmetric, size, form.format) for name, form in packed.items()}


def _no_levels(t: ModelTensor) -> str:
    payload = t.payload()
    if payload is not None and payload.method.kind == "pruner":
        return (
            f"it was pruned by {t.method}, and the format has had no sparse weights since compressed-tensors 0.15; "
            f"rest=dense writes its zeros, sparse24=true the older sparse-24-bitmask"
        )
    return f"what {t.method} gives are no evenly spaced levels with a scale; rest=dense writes plain numbers"


def _places(mask: Tensor) -> Tensor:
    """Two places in each run of four that hold all that was kept; ExportError where there are more."""
    rows, columns = mask.shape
    if columns % 8:
        raise ExportError(f"its rows of {columns} are no multiple of 8, as sparse-24-bitmask needs")
    quads = mask.reshape(-1, 4)
    if bool((quads.sum(1) > 2).any()):
        raise ExportError("a run of four has more than two weights that were kept, and only 2:4 has a sparse format")
    first = quads.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :2]
    return torch.zeros_like(quads).scatter_(1, first, True).reshape(rows, columns)


def _sparse24(value: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``compressed``: two values of each run of four; ``bitmask``: which two, eight to a byte, lowest bit first; ``shape``."""
    places = _places(mask)
    rows, columns = value.shape
    return {
        "compressed": value[places].reshape(rows, columns // 2),
        "bitmask": torch.from_numpy(np.packbits(places.numpy(), axis=-1, bitorder="little")),
        "shape": torch.tensor([[rows], [columns]]),
    }


def _quantization(schemes: Mapping[Scheme, list[str]], linear: set[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json. One scheme goes to all linear layers but those ignored; of several each names
    its layers."""
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus

    groups = {}
    for number, (form, names) in enumerate(schemes.items()):
        weights = QuantizationArgs(
            num_bits=form.bits, symmetric=form.symmetric, strategy="channel" if form.group == -1 else "group",
            group_size=None if form.group == -1 else form.group,
        )  # fmt: skip
        targets = ["Linear"] if len(schemes) == 1 else names
        groups[f"group_{number}"] = QuantizationScheme(targets=targets, weights=weights, format=form.format)
    quantized = {n for names in schemes.values() for n in names}
    config = QuantizationConfig(
        config_groups=groups, format=next(iter(schemes)).format, quantization_status=QuantizationStatus.COMPRESSED,
        ignore=sorted(linear - quantized),
    )  # fmt: skip
    told = {**config.model_dump(mode="json"), "version": __version__}
    if any(form.packed and not form.symmetric for form in schemes):
        told["dequantize"] = True  # the one way in which transformers reads packed zero points
    return told


def _sparsity(names: list[str], linear: set[str]) -> dict[str, Any]:
    """The configuration of sparse-24-bitmask, as compressed-tensors up to 0.14 reads it."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {
            "format": "sparse-24-bitmask", "sparsity_structure": "2:4", "global_sparsity": 0.5, "targets": ["Linear"],
            "ignore": sorted(linear - set(names)), "registry_requires_subclass": False,
        },
    }  # fmt: skip
