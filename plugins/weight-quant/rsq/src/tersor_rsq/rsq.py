"""RSQ: Learning from Important Tokens Leads to Better Quantized LLMs (https://arxiv.org/abs/2503.01820)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor import Calibration, CalibrationError, ConfigError, Quantizer, Spec, Uniform, at_least, between, field, method, one_of
from tersor_kit_weight_quant import CLIP_RATIOS, Rotation, exponent_of, gram, load, normalise, round_columns, store


@method
class RSQ(Quantizer):
    """Rotate, scale, then quantize: W Q is rounded by GPTQ for the tokens that the network attends to most.

    Weights: float, out x in. Calibration: the layer's inputs, samples x in, or their X'X, in x in. Inside a network, which
    :func:`tersor.model.quantize` and ``tersor compress`` work on, the rows of X are scaled by :meth:`token_weights` first; a layer
    alone has no attention, so scale its inputs yourself, or leave them.

    1. **Rotate** (``rotate``). Q is a random Hadamard matrix of the layer's input width, from ``seed``. The paper fuses one Q into
       the residual stream: the layer before writes x Q, this one holds W Q, and (x Q)(W Q)' = x W' is unchanged. Rounding
       sees of this only W Q and the inputs' Gram matrix Q'X'X Q. Here both are made for this layer alone, and decoding gives
       round(W Q) Q', whose product with x is that of the fused layer, round(W Q) applied to x Q. So each layer's codes and errors are those of
       fused rotation; what differs is that no other layer has to know, that the networks' norms stay as they are, and that
       decoding costs one fast rotation. Rotated, all weights of a row are about equally large, and outliers are spread.
    2. **Scale** (``scale="attention"``, section 4, AttnCon). A token's importance is the attention that it gets in its block, summed
       over heads and queries, mapped linearly to ``r_min`` ... 1 over the tokens of a sequence. As in the authors' code
       (ylsung/rsq) the Hessian is the sum of r_i x_i x_i' with the mean of r set to 1, so a token's row is multiplied by sqrt(r_i).
    3. **Quantize**: GPTQ on the rotated weight with the rotated Hessian of scaled tokens. The settings are those of ``gptq``.

    Stored as in ``gptq``: codes and zero points at ``bits`` bits, scales in float16, group indices. The rotation costs nothing:
    its seed is a setting.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1, :class:`tersor.InputError` for NaN and infinity in the
    weights, :class:`tersor.CalibrationError` for calibration data that is missing, of another width, all zero or not finite, and for
    attention that is not batch x heads x queries x keys.
    """

    name = "rsq"
    domains = ("weight",)
    native = "torch"
    calibration = "required"
    bitwise = False  # decoding rotates, which sums floats

    bits: int = field(4, between(2, 8), help="bits per weight")
    group_size: int = field(128, help="weights that share a scale; -1: a whole row")
    rotate: bool = field(True, help="rotate the weight's inputs by a random Hadamard matrix")
    scale: str = field("attention", one_of("attention", "none"), help="importance of tokens: the attention they get, or none")
    r_min: float = field(0.005, between(0, 1), help="importance of the least important token; the most important has 1")
    seed: int = field(0, at_least(0), help="of the rotation")
    sym: bool = field(False, help="symmetric levels, without zero points")
    act_order: bool = field(True, help="round columns of large (rotated) activations first")
    static_groups: bool = field(False, help="grids of the weights before the first is rounded, in their layout")
    clip: bool = field(True, help="search the range of each group for the least squared error")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")
    block_size: int = field(32, at_least(1), help="columns between matrix products; changes speed only")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"rsq: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")

    @classmethod
    def examples(cls) -> list[RSQ]:
        """For the conformance kit."""
        return [cls(group_size=4), cls(bits=3, group_size=-1, sym=True, rotate=False, scale="none", block_size=2)]

    # -- scale

    @property
    def token_weights(self) -> Any:  # type: ignore[override]
        """:meth:`concentration`, or None where tokens are not scaled (the network then need not show its attention)."""
        return self.concentration if self.scale == "attention" else None

    def concentration(self, attention: Tensor, hidden: Tensor) -> Tensor:
        """AttnCon: the factor of every token's row, sqrt(r) with a mean of r of 1. Float32, batch x tokens.

        ``attention``: probabilities, batch x heads x queries x keys. ``hidden``: the block's input, batch x tokens x dim.
        Where all tokens get the same attention all factors are 1.
        """
        if attention.ndim != 4 or hidden.ndim != 3 or attention.shape[::3] != hidden.shape[:2]:
            shapes = f"attention of shape {tuple(attention.shape)} for an input of shape {tuple(hidden.shape)}"
            raise CalibrationError(f"{shapes}; allowed: batch x heads x queries x keys for batch x keys x dim")
        received = attention.float().sum((1, 2))
        if not bool(torch.isfinite(received).all()):
            raise CalibrationError("attention has NaN or infinity; allowed: probabilities")
        low, high = received.aminmax(dim=1, keepdim=True)
        even = high - low <= 1e-5 * high  # but for rounding
        share = torch.where(even, 1.0, (received - low) / (high - low))
        r = self.r_min + (1 - self.r_min) * share
        return (r / r.mean(1, keepdim=True)).sqrt()

    # -- rotate and quantize

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        hessian = gram(calibration, x.shape[1])
        exponent = exponent_of(x) if self.rotate else 0
        weight = normalise(x, exponent)
        if self.rotate:
            q = Rotation(x.shape[1], self.seed)
            weight, hessian = q.forward(weight), q.conjugate(hessian)
        grid, codes = round_columns(
            weight,
            hessian,
            self.bits,
            self.group_size,
            self.sym,
            self.act_order,
            self.static_groups,
            CLIP_RATIOS if self.clip else (),
            self.damp,
            self.block_size,
        )
        parts = store(grid, codes)
        return {**parts, "magnitude": exponent} if exponent else parts

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        grid, codes = self._grid(parts, spec)
        dtype = getattr(torch, spec.dtype)
        if not self.rotate:
            return grid.dequantize(codes, dtype)
        exponent = parts.get("magnitude", 0)
        if type(exponent) is not int or abs(exponent) > 120:
            raise ValueError(f"magnitude: {exponent!r}, where an integer from -120 to 120 fits")
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        values = Rotation(spec.shape[1], self.seed).inverse(grid.dequantize(codes))
        return values.mul_(math.ldexp(1.0, exponent)).clamp_(-limit, limit).to(dtype)

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        if self.rotate:  # the levels are those of the rotated weight, not of the weight
            return None
        grid, codes = self._grid(parts, spec)
        return grid.uniform(codes)

    def _grid(self, parts: dict[str, Any], spec: Spec) -> Any:
        indexed = self.act_order and not self.static_groups and self.group_size != -1
        return load(parts, spec.shape, self.bits, self.group_size, self.sym, indexed)  # type: ignore[arg-type]
