"""SqueezeLLM: Dense-and-Sparse Quantization (https://arxiv.org/abs/2306.07629)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from tersor import Calibration, CalibrationError, ConfigError, Quantizer, Spec, between, field, method
from tersor_kit_weight_quant import exponent_of, gram, load_sparse, normalise, pack, store_sparse, unpack
from tersor_squeezellm.kmeans import kmeans


@method
class SqueezeLLM(Quantizer):
    """Each row has a codebook of its own, found by sensitivity-weighted k-means; a few weights stay in float16, stored sparse.

    Weights: float, out x in. The loss rises by about 1/2 sum F_i (w_i - q_i)^2, F being the diagonal of the Fisher information:
    the mean squared gradient of the loss for each weight (section 4.1). So

    1. the matrix is split into W = D + S (section 4.2): S holds the ``sensitive`` fraction of the weights with the largest F, and of
       the rest the ``outliers`` fraction with the largest magnitude;
    2. the 2^bits values that stand for a row of D minimise sum F_i (w_i - q_i)^2: weighted k-means in one dimension, where the
       clusters are intervals (see :mod:`tersor_squeezellm.kmeans`). Weights of S take no part in it.

    Calibration: ``gradients``, out x in, which the model driver gathers. Where only the layer's inputs or their X'X are known, the
    mean square of a column's inputs stands for the F of all its weights: the loss then is the layer's own output error without the
    correlations between columns. ``weighted=false`` gives every weight the same F, for comparison. A row without any sensitivity
    is clustered unweighted, as the authors do.

    Stored: codes at ``bits`` bits; codebooks in float16, for each row, or for each run of ``group_size`` columns of it; S as in
    compressed sparse rows: how many in each row, their columns in as few bits as the width needs, and values in float16.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1 or fractions outside 0 to 0.5,
    :class:`tersor.InputError` for NaN and infinity in the weights and gradients, :class:`tersor.CalibrationError` for calibration data that is
    missing, of another shape, all zero, negative or not finite.
    """

    name = "squeezellm"
    domains = ("weight",)
    native = "torch"
    calibration = "required"
    wants = ("gradients",)

    bits: int = field(4, between(2, 8), help="bits per code: 2^bits values for each row")
    outliers: float = field(0.004, between(0, 0.5), help="fraction of the weights that stay in float16 for their magnitude")
    sensitive: float = field(0.0005, between(0, 0.5), help="fraction of the weights that stay in float16 for their sensitivity")
    group_size: int = field(-1, help="columns that share a codebook; -1: a whole row, as in the paper")
    weighted: bool = field(True, help="k-means weighted by sensitivity")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(
                f"squeezellm: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row"
            )

    @classmethod
    def examples(cls) -> list[Self]:
        """For the conformance kit."""
        return [cls(), cls(bits=3, group_size=5, outliers=0.1, sensitive=0.05), cls(bits=2, weighted=False, outliers=0.0)]

    @classmethod
    def at_bits(cls, bits: int) -> list[Self]:
        """Codebooks of 2^8 values would cost more than the codes of an ordinary row: nothing stands for 8 bits."""
        return [cls(bits=bits)] if 2 <= bits <= 4 else []

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        exponent = exponent_of(x)
        x = normalise(x, exponent)
        fisher = self._sensitivity(x, calibration)

        kept = self._sparse(x, fisher)
        places = kept.nonzero()
        parts = store_sparse(places[:, 0], places[:, 1], x[kept].half(), x.shape)

        weight = (fisher if self.weighted else torch.ones_like(x)).masked_fill(kept, 0.0)
        books, codes = [], torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        for run in self._groups(x.shape[1]):
            books.append(kmeans(x[:, run], weight[:, run], 2**self.bits).half())
            codes[:, run] = _nearest(x[:, run], books[-1])
        parts |= {"codes": pack(codes, self.bits), "codebooks": torch.stack(books, 1)}
        return parts | ({"exponent": exponent} if exponent else {})

    def _sensitivity(self, x: Tensor, calibration: Calibration | None) -> Tensor:
        """F, out x in: the mean squared gradients, or where there are none the mean square of each column's inputs."""
        given = None if calibration is None else calibration.gradients
        if given is None:
            fisher = gram(calibration, x.shape[1]).diagonal().expand(x.shape)
        else:
            if given.numel() != x.numel() or given.shape[0] != x.shape[0]:
                raise CalibrationError(f"squeezellm: gradients of shape {tuple(given.shape)}; allowed: {tuple(x.shape)}")
            fisher = given.reshape(x.shape).float()
        low, high = (float(v) for v in fisher.aminmax())
        if not 0 <= low <= high < math.inf or not high > 0:
            raise CalibrationError(
                f"squeezellm: sensitivities from {low:g} to {high:g}; allowed: mean squares, not all of them zero"
            )
        return fisher / high

    def _sparse(self, x: Tensor, fisher: Tensor) -> Tensor:
        """Where S holds a weight: the most sensitive ones, and the largest of the others; a boolean matrix."""
        kept = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        for score, fraction in ((fisher, self.sensitive), (x.abs(), self.outliers)):
            count = round(fraction * x.numel())
            kept.view(-1)[score.masked_fill(kept, -1.0).reshape(-1).topk(count).indices] = True
        return kept

    def _groups(self, columns: int) -> Iterator[slice]:
        size = columns if self.group_size == -1 else self.group_size
        return (slice(start, min(start + size, columns)) for start in range(0, columns, max(size, 1)))

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        rows, columns = spec.shape
        codes = unpack(parts["codes"], self.bits, spec.size).view(rows, columns)
        books, exponent = parts["codebooks"], parts.get("exponent", 0)
        groups = list(self._groups(columns))
        if books.dtype != torch.float16 or tuple(books.shape) != (rows, len(groups), 2**self.bits):
            raise ValueError(f"codebooks: {books.dtype} {tuple(books.shape)} for {rows} rows of {len(groups)} groups")
        if type(exponent) is not int or abs(exponent) > 120:
            raise ValueError(f"exponent: {exponent!r}, where an integer from -120 to 120 fits")
        out = torch.empty(rows, columns, device=codes.device)
        for g, run in enumerate(groups):
            out[:, run] = books[:, g].float().gather(1, codes[:, run].long())
        at, column, value = load_sparse(parts, (rows, columns))
        out[at, column] = value.float()
        if not bool(torch.isfinite(out).all()):
            raise ValueError("codebooks or values that are not finite")
        limit = min(torch.finfo(getattr(torch, spec.dtype)).max, torch.finfo(torch.float32).max)
        return out.mul_(math.ldexp(1.0, exponent)).clamp_(-limit, limit)


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    """The number of the nearest value of an ascending codebook, row by row; uint8. ``book``: float16, rows x values."""
    values = book.float()
    middle = (values[:, 1:] + values[:, :-1]) / 2
    return torch.searchsorted(middle, x.contiguous(), out_int32=True).to(torch.uint8)
