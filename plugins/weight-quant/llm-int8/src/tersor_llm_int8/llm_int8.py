"""LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale (https://arxiv.org/abs/2208.07339)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor import Calibration, Quantizer, Spec, Uniform, at_least, field, method, one_of
from tersor_kit_weight_quant.int8 import Int8Linear, absmax


@method
class LLMInt8(Quantizer):
    """Int8 products of rows of X and W with a scale each; input features with outliers are multiplied in floating point (section 3).

    Weights: float, out x in. No data is needed: the weights are rounded once, the activations whenever the layer runs.

    - Vector-wise quantization (section 3.1): every row of the activations X and every output's row of W (a column of the paper's
      in x out matrix) has its own scale c = max|.| / 127, so that the int32 sums are scaled back by the outer product c_x c_w'.
    - Mixed-precision decomposition (section 3.2): a feature dimension in which any |x| reaches ``threshold`` (6.0 in the paper)
      is taken out of the int8 product, and of the scales, and goes through a float32 product with the values that the int8
      weights stand for. Which features these are is seen anew in each call, over all rows of the call.

        X W'  ~  c_x c_w' * (X8 W8')  +  X_outliers W_outliers'

    ``threshold`` 0 turns the decomposition off. ``granularity="tensor"`` is what the paper compares with: one scale for the whole of X
    and one for the whole of W.

    What quantizes the activations is the layer that ``module()`` and :func:`tersor.model.compress_layers` give; dequantizing
    gives the rounded weights alone. Layers that are no linear ones (convolutions) decode their weights when they are called.

    Stored: int8 codes, and the scales in float32. Raises :class:`tersor.ConfigError`, and :class:`tersor.InputError` for NaN and
    infinity in the weights.
    """

    name = "llm-int8"
    domains = ("weight",)
    native = "torch"

    threshold: float = field(
        6.0, at_least(0.0), help="features with a magnitude of at least this stay in floating point; 0: none"
    )
    granularity: str = field("vector", one_of("vector", "tensor"), help="what has a scale of its own: each row, or all together")

    @classmethod
    def examples(cls) -> list[LLMInt8]:
        """For the conformance kit."""
        return [cls(), cls(granularity="tensor", threshold=0.0)]

    @classmethod
    def at_bits(cls, bits: int) -> list[LLMInt8]:
        """The default at 8 bits, none otherwise."""
        return [cls()] if bits == 8 else []

    def bound(self, x: Any) -> float | None:
        """Half a step of the largest possible grid."""
        x = torch.as_tensor(x)
        return float(x.abs().max()) * (0.501 / 127 + torch.finfo(x.dtype).eps) + 1e-38 if x.numel() else None

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        codes, scale = absmax(x, self.granularity == "tensor")
        return {"codes": codes, "scale": scale[:, 0]}

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        codes, scale = self._load(parts, spec)
        limit = min(torch.finfo(getattr(torch, spec.dtype)).max, torch.finfo(torch.float32).max)
        return (codes.float() * scale[:, None]).clamp_(-limit, limit)

    def _load(self, parts: dict[str, Any], spec: Spec) -> tuple[Tensor, Tensor]:
        """Codes (int8, out x in) and one scale for each row."""
        codes, scale = parts["codes"], parts["scale"]
        rows = 1 if self.granularity == "tensor" else spec.shape[0]
        if codes.dtype != torch.int8 or tuple(codes.shape) != spec.shape:
            raise ValueError(f"codes: {codes.dtype} {tuple(codes.shape)}, where int8 {spec.shape} fits")
        if scale.dtype != torch.float32 or tuple(scale.shape) != (rows,) or not bool((scale.isfinite() & (scale >= 0)).all()):
            raise ValueError(f"scale: not {rows} finite positive numbers of float32")
        return codes, scale.expand(spec.shape[0])

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform:
        codes, scale = self._load(parts, spec)
        unsigned = codes.contiguous().view(torch.uint8).bitwise_xor(128)  # + 128
        return Uniform(unsigned, scale[:, None].contiguous(), None, 8, spec.shape[1])

    def _module(self, parts: dict[str, Any], spec: Spec, bias: Tensor | None, layer: nn.Module) -> nn.Module | None:
        if not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            return None
        codes, scale = self._load(parts, spec)
        return LLMInt8Linear(codes, scale.contiguous(), bias, self.threshold, self.granularity == "tensor")


class LLMInt8Linear(Int8Linear):
    """A linear layer that computes as LLM.int8(). Buffers: ``codes`` (int8, out x in), ``scale`` (float32, out).

    Input: float, ... x in; output: the same type, ... x out. Gradients pass through to the input.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, threshold: float = 6.0, whole: bool = False) -> None:
        super().__init__(scale, bias, whole)
        self.threshold = threshold
        self.register_buffer("codes", codes)

    def matrix(self) -> Tensor:
        return self.codes

    def outliers(self, rows: Tensor) -> Tensor:
        """Numbers of the features (columns of ``rows``) that go through the float product, int64."""
        if not self.threshold or not rows.shape[0]:
            return torch.zeros(0, dtype=torch.int64, device=rows.device)
        return (rows.abs().amax(0) >= self.threshold).nonzero()[:, 0]

    def compute(self, x: Tensor) -> Tensor:
        found = self.outliers(x)
        if not found.numel():
            return super().compute(x)
        y = super().compute(x.index_fill(1, found, 0.0))
        weight = self.codes.index_select(1, found).float().mul_(self.scale[:, None])
        return y.addmm_(x.index_select(1, found), weight.T)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}"
