"""FlatQuant: Flatness Matters for LLM Quantization (https://arxiv.org/abs/2410.09426)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor import Calibration, CalibrationError, ConfigError, Quantizer, Spec, at_least, between, field, method, one_of, positive
from tersor_flatquant.layer import FlatLinear
from tersor_flatquant.learn import Block, Heads, block_calls, layers_in
from tersor_flatquant.rounding import reach
from tersor_flatquant.transforms import Stored, matrix
from tersor_kit_weight_quant import Grid, exponent_of, gram, load, normalise, store

SAMPLES = 1024  # inputs that are drawn where only their X'X is known
PARTS = 4  # of the inputs of a layer that is learned alone; a step takes one


@method
class FlatQuant(Quantizer):
    """Inputs and weights are made flat by learned invertible transforms, and both are then rounded to 4 bits.

    Weights: float, out x in. For the layers of a block that see the same inputs (query, key and value; gate and up; output; down) a
    transform x -> x D P is learned, P = P1 kron P2 with sizes nearest to the square root of the width (576 = 24 x 24), D a scale for
    each channel; the weight becomes W D^-1 P^-T, so that without rounding nothing changes (section 3.1). Each token's inputs are
    rounded to ``act_bits``, each output channel's weights to ``bits``, symmetric, with learned clipping thresholds. Keys after the
    rotary embedding and values have transforms of a head's width, in layers named as transformers names Llama's, and asymmetric
    grids of ``kv_bits``; the output layer's transform is then P_o kron P_v, over heads and within a head (section 3.2).

    All of it is learned block by block: AdamW on the squared error of the block's output (equation 3), straight through the rounding.
    One layer alone is learned in the same way from its ``inputs`` (samples x in), in half the steps; from X'X alone with Gaussian
    samples of these second moments. The thresholds start at the ratios of least squared error. The channels' scales and the singular
    values of P1 and P2 are learned as logarithms, so that P is invertible throughout.

    ``transform``: ``"hadamard"`` (a random rotation of the whole width and of heads) and ``"none"`` use the same quantizers with the
    thresholds of least squared error, and learn nothing.

    Stored: packed codes, a scale in float16 for each output channel, P1, P2, D and a head's transform in float16, the thresholds of
    inputs and caches. Decoding gives the weight that acts on untransformed inputs; ``compress_layers`` puts layers into a network that
    round their inputs too (:class:`FlatLinear`), and :class:`tersor_flatquant.cache.FlatCache` is the cache for it. Decoding multiplies floats, so it is
    not ``bitwise``.

    Raises :class:`tersor.ConfigError`, :class:`tersor.InputError` for NaN and infinity in the weights, and
    :class:`tersor.CalibrationError` for calibration data that is missing, of another width, all zero or not finite.
    """

    name = "flatquant"
    domains = ("weight",)
    native = "torch"
    bitwise = False
    calibration = "required"
    wants = ()
    studies = "block"

    bits: int = field(4, between(2, 8), help="bits per weight")
    act_bits: int = field(4, between(2, 16), help="bits per input in the method's layers, 2 to 8; 16: not rounded")
    kv_bits: int = field(4, between(2, 16), help="bits per key and value in the method's cache, 2 to 8; 16: not rounded")
    transform: str = field("learned", one_of("learned", "hadamard", "none"), help="what flattens inputs and weights")
    steps: int = field(12, at_least(0), help="steps of the optimizer for each block, of one calibration input each")
    lr: float = field(0.03, positive, help="learning rate of the transforms; thresholds learn at ten times that")
    seed: int = field(0, at_least(0), help="of the first transforms, and of the order of inputs")

    def __attrs_post_init__(self) -> None:
        for name in ("act_bits", "kv_bits"):
            if 8 < getattr(self, name) < 16:
                raise ConfigError(f"flatquant: {name}={getattr(self, name)} is not allowed; allowed: 2 to 8, or 16 for none")

    @classmethod
    def examples(cls) -> list[FlatQuant]:
        """For the conformance kit."""
        return [cls(steps=2), cls(bits=3, act_bits=16, steps=2), cls(bits=8, transform="hadamard"), cls(transform="none")]

    @classmethod
    def at_bits(cls, bits: int) -> list[FlatQuant]:
        """Weights alone are compared there, so that inputs and caches are not rounded."""
        return [cls(bits=bits, act_bits=16, kv_bits=16)] if 2 <= bits <= 8 else []

    def _study(self, view: Any) -> Mapping[str, Mapping[str, Any]]:
        thin, others = layers_in(view.layers)
        block = Block(self, thin, others, block_calls(view))
        if self.transform == "learned" and self.steps:
            block.train(self.steps)
        out = {name: {"flatquant": found} for name, found in block.results().items()}
        for name, (weight, rows) in block.others.items():
            out[name] = {"flatquant": self._alone(weight, rows)}
        return out

    def _alone(self, weight: Tensor, inputs: Tensor) -> dict[str, Any]:
        """What is learned of a layer (out x in) by itself, from its ``inputs`` (samples x in)."""
        with torch.enable_grad():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(normalise(weight, exponent_of(weight)), requires_grad=False)
            inputs = inputs / inputs.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            rows = [inputs[i::PARTS] for i in range(min(PARTS, len(inputs)))]
            block = Block(self, {"": layer}, {}, [lambda _, x=x: layer(x) for x in rows])  # type: ignore[misc]
            if self.transform == "learned" and self.steps:
                block.train(-(-self.steps // 2))
            return block.results()[""]

    def _quantize(self, x: Tensor, calibration: Calibration, spec: Spec) -> dict[str, Any]:
        found = calibration.extra.get("flatquant")
        if found is None:
            found = self._alone(x, self._inputs(calibration, spec.shape[1]))
        exponent = exponent_of(x)
        parts = {k: v for k, v in found.items() if k != "rows"}
        flat = Stored(parts, spec.shape[1], self.transform, self.seed).weight(normalise(x, exponent))
        if "value" in parts:
            flat = Heads.fuse(flat, matrix(parts["value"]))
        total = max(-120, min(120, exponent + exponent_of(flat)))
        flat = normalise(flat, total - exponent)
        scale = (reach(flat) * found["rows"] / (2 ** (self.bits - 1) - 1)).clamp(max=65504.0).half()
        grid = Grid(scale, None, self.bits, spec.shape[1], exponent=total)
        return {**store(grid, dataclasses.replace(grid, exponent=0).quantize(flat)), **parts}

    def _inputs(self, calibration: Calibration, width: int) -> Tensor:
        """The layer's inputs, samples x in; Gaussian ones where only X'X is known."""
        total = None if calibration.inputs is not None else gram(calibration, width)
        if not bool((calibration.inputs if total is None else total.diagonal()).any()):
            raise CalibrationError("all calibration inputs are zero; allowed: inputs that are like those in use")
        if total is None:
            return calibration.inputs  # type: ignore[no-any-return]
        values, vectors = torch.linalg.eigh(total.double() / total.diagonal().mean())
        drawn = torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(self.seed))
        return drawn @ (vectors * values.clamp(min=0).sqrt()).float().T.to("cpu")

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        grid, codes = load(parts, spec.shape, self.bits, -1, True)  # type: ignore[arg-type]
        transform = Stored(parts, spec.shape[1], self.transform, self.seed)
        w = dataclasses.replace(grid, exponent=0).dequantize(codes)
        if "value" in parts:
            w = Heads.fuse(w, torch.linalg.inv(matrix(parts["value"]).double()).float())
        dtype = getattr(torch, spec.dtype)
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        w = transform.back(w) * math.ldexp(1.0, grid.exponent)
        if bool(w.isnan().any()):
            raise ValueError("the transforms give weights that are no numbers")
        return w.clamp_(-limit, limit).to(dtype)

    def _module(self, parts: dict[str, Any], spec: Spec, bias: Any, layer: nn.Module) -> nn.Module | None:
        return FlatLinear(self, parts, spec, bias) if isinstance(layer, nn.Linear) else None
