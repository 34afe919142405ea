"""VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models (https://arxiv.org/abs/2409.17066)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor import Calibration, ConfigError, Quantizer, Spec, at_least, between, field, method, one_of
from tersor_kit_weight_quant import (
    collect,
    exponent_of_codebook,
    feedback,
    fit_codebooks,
    gram,
    kmeans,
    lookup,
    mahalanobis_seeds,
    nearest,
    normalise,
    pack_order,
    pack_wide,
    unit_factor,
    unpack_order,
    unpack_wide,
)

_OUTLIER_VECTOR = 2  # values in a vector of an outlier column
_MOST_BITS = 14  # of one index
_UPDATES = 10  # products with the Hessian in a codebook update


@method
class VPTQ(Quantizer):
    """Vectors of ``vector`` values along the outputs of one column become entries of a codebook of the matrix (section 3).

    Weights: float, out x in. Calibration: the layer's inputs, samples x in, or their X'X, in x in. Minimised is
    tr((W - Q) H (W - Q)') with H = X'X + damping. Columns are taken in the order of their activations, largest first.

    - **Hessian-weighted centroid initialisation** (section 3.2): k-means over the vectors of all columns, each weighted with the
      diagonal of H at its column.
    - **Channel-independent second-order optimisation** (section 3.1): all vectors of a column go to their nearest entries, which
      is optimal as one weight of H is common to them, and what the column loses is fed back into the columns still to come.
    - **Residual quantization** (``residual`` above 0 bits, section 3.3): a second codebook, clustered from what a first pass
      leaves, for the difference to the first entry. An index of ``bits * vector`` bits is split into two.
    - **Outliers** (``outliers``, section 3.3): this fraction of the columns, those of the largest activations, has a codebook of
      its own, of pairs of values and 2^(2 * outlier_bits) entries.
    - **Normalisation** (``norm``, the authors' code): each column less its least value, over its range, both in float16.
    - **Codebook update** (``update``): with assignments fixed, the entries that minimise the layer's error, by conjugate
      gradients. It stands for the paper's fine-tuning of centroids by gradients, and takes no training.

    Stored: indices, codebooks in float16, the order of the columns, ranges. A codebook of k entries costs 16 k vector bits: over
    a matrix of 576 x 576 0.05 bits a weight at 2^8 entries of 4 values, 0.8 at 2^12. On large matrices longer indices pay.

    Raises :class:`tersor.ConfigError` for indices above 14 bits and a residual that leaves the first index nothing;
    :class:`tersor.InputError` for NaN and infinity in the weights; :class:`tersor.CalibrationError` for calibration data that is
    missing, of another width, all zero, not finite, or not positive definite at the highest damping.
    """

    name = "vptq"
    domains = ("weight",)
    native = "torch"
    calibration = "required"

    bits: int = field(2, between(1, 8), help="bits per weight: an index has bits * vector")
    vector: int = field(4, between(1, 16), help="values in a vector")
    residual: int = field(0, at_least(0), help="bits of the index that go to a second, residual codebook; 0: none")
    outliers: float = field(0.01, between(0, 1), help="fraction of columns with a codebook of their own")
    outlier_bits: int = field(4, between(1, 7), help="bits per weight in these columns")
    norm: str = field("none", one_of("none", "column"), help="what is normalised to its range")
    update: bool = field(True, help="fit the codebooks to the layer's error once all columns are rounded")
    iterations: int = field(10, at_least(0), help="steps of k-means")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")

    def __attrs_post_init__(self) -> None:
        total = self.bits * self.vector
        if self.residual >= total or total - self.residual > _MOST_BITS or self.residual > _MOST_BITS:
            raise ConfigError(
                f"vptq: an index of bits * vector = {total} bits with residual={self.residual} is not allowed; "
                f"allowed: 1 to {_MOST_BITS} bits in the first stage and at most {_MOST_BITS} in the second"
            )

    @classmethod
    def examples(cls) -> list[VPTQ]:
        """For the conformance kit."""
        return [
            cls(iterations=3, outlier_bits=2),
            cls(bits=3, vector=2, residual=2, outliers=0.3, outlier_bits=2, norm="column", iterations=3),
            cls(bits=1, vector=5, outliers=0.0, update=False, iterations=3),
        ]

    @classmethod
    def at_bits(cls, bits: int) -> list[VPTQ]:
        """Vectors of 4 values at 2 bits, of 2 at 3; above that with a residual stage."""
        known = {2: {}, 3: {"vector": 2}, 4: {"residual": 8}, 8: {"vector": 2, "residual": 8, "outlier_bits": 7}}
        return [cls(bits=bits, **known[bits])] if bits in known else []

    def _sizes(self, rows: int, n: int) -> tuple[int, int]:
        """Rows made up to whole vectors, and the number of outlier columns."""
        whole = math.lcm(self.vector, _OUTLIER_VECTOR if self.outliers else 1)
        return -(-rows // whole) * whole, math.ceil(self.outliers * n)

    @property
    def _stages(self) -> dict[str, tuple[int, int]]:
        """Codebooks by name: bits of an index, values in a vector."""
        out = {"book": (self.bits * self.vector - self.residual, self.vector)}
        if self.residual:
            out["residual_book"] = (self.residual, self.vector)
        if self.outliers:
            out["outlier_book"] = (self.outlier_bits * _OUTLIER_VECTOR, _OUTLIER_VECTOR)
        return out

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        rows, n = x.shape
        height, outliers = self._sizes(rows, n)
        hessian = gram(calibration, n)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        factor = unit_factor(hessian, order, self.damp)
        hessian = hessian[order][:, order]
        dead = hessian.diagonal() == 0
        hessian /= hessian.diagonal().max()

        exponent = exponent_of_codebook(x)
        weight = torch.zeros(n, height, device=x.device)
        weight[:, :rows] = normalise(x, exponent).T[order]
        weight[dead] = 0.0
        norm = self._ranges(weight[:, :rows])
        scale, bias = norm.float().unbind(1)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        weight[:, :rows] -= bias[:, None]  # of the unit that the codebooks have, times the scale

        # Hessian-weighted centroid initialisation
        real = (torch.arange(height, device=x.device) < rows).float()  # not there to fill up a vector
        cost = (hessian.diagonal() * scale.square())[:, None] * real
        unit = weight * inverse[:, None]
        books = {}
        if outliers:
            books["outlier_book"] = self._centroids("outlier_book", unit[:outliers], cost[:outliers])
        if outliers < n:
            books["book"] = self._centroids("book", unit[outliers:], cost[outliers:])

        # channel-independent second-order optimisation
        left = torch.zeros_like(weight)
        codes: dict[str, Tensor] = {}

        def assign() -> None:
            for name in books:
                wide = outliers if name == "outlier_book" else n - outliers
                codes[name] = torch.empty(wide, height // self._stages[name][1], dtype=torch.int64, device=x.device)

            def round_(k: int, w: Tensor, error: Tensor) -> None:
                rest = w * inverse[k]
                for name, book in books.items():
                    if (name == "outlier_book") == (k < outliers):
                        vectors = rest.view(-1, book.shape[1])
                        found = nearest(vectors.T[None], book[None])[0]
                        codes[name][k if k < outliers else k - outliers] = found
                        rest = (vectors - book[found]).view(-1)
                left[k] = rest
                error.sub_(w).add_(rest, alpha=float(scale[k]))

            feedback(weight.clone(), factor, n, lambda start, group: None, round_)

        assign()
        if self.residual and outliers < n:
            books["residual_book"] = self._centroids("residual_book", left[outliers:], cost[outliers:])
            assign()

        if self.update:
            damped = hessian + self.damp * hessian.diagonal().mean() * torch.eye(n, device=x.device)
            books = self._update(books, codes, weight, scale[:, None] * real, damped, outliers)
        parts: dict[str, Any] = {"order": pack_order(order), "exponent": exponent}
        for name, book in books.items():
            bits, vector = self._stages[name]
            parts[name] = book.half()
            parts[name.replace("book", "codes")] = pack_wide(codes[name][:, : -(-rows // vector)], bits)
        if self.norm == "column":
            parts["norm"] = norm
        return parts

    def _ranges(self, weight: Tensor) -> Tensor:
        """Range and least value of each column, float16, n x 2; without normalisation 1 and 0."""
        if self.norm == "none":
            return torch.tensor([1.0, 0.0], dtype=torch.float16, device=weight.device).expand(weight.shape[0], 2)
        low, high = weight.aminmax(dim=1)
        return torch.stack([high - low, low], 1).half()

    def _centroids(self, name: str, unit: Tensor, cost: Tensor) -> Tensor:
        """Hessian-weighted k-means of the vectors of these columns (n x rows): entries x vector."""
        bits, vector = self._stages[name]
        vectors, weights = (t.reshape(-1, vector).T[None].contiguous() for t in (unit, cost))
        seeds = mahalanobis_seeds(vectors, 2**bits, (weights > 0).any(1))
        return kmeans(vectors, weights, seeds, self.iterations)[0].half().float()

    def _update(
        self, books: dict[str, Tensor], codes: dict[str, Tensor], weight: Tensor, scale: Tensor, hessian: Tensor, outliers: int
    ) -> dict[str, Tensor]:
        """The least squares over all codebooks at once."""
        starts, index = 0, {}
        for name, book in books.items():
            inner = torch.arange(book.shape[1], device=book.device)
            index[name] = (starts + codes[name][:, :, None] * book.shape[1] + inner).view(len(codes[name]), -1)
            starts += book.numel()
        rows_of = {name: slice(0, outliers) if name == "outlier_book" else slice(outliers, None) for name in books}

        def value(book: Tensor) -> Tensor:
            out = torch.zeros_like(weight)
            for name, places in index.items():
                out[rows_of[name]] += lookup(book, places)
            return out.mul_(scale)

        def slope(error: Tensor) -> Tensor:
            error = error.mul_(scale)
            return torch.stack([collect(error[rows_of[name]], places, (1, starts)) for name, places in index.items()]).sum(0)

        bend = scale.square() * hessian.diagonal()[:, None]
        curvature = sum(collect(bend[rows_of[name]].contiguous(), places, (1, starts)) for name, places in index.items())
        start = torch.cat([b.reshape(1, -1) for b in books.values()], 1)
        found = fit_codebooks(weight, hessian, start, value, slope, curvature, _UPDATES)
        return {
            name: part.view_as(b)
            for (name, b), part in zip(books.items(), found.split([b.numel() for b in books.values()], 1), strict=True)
        }

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        rows, n = spec.shape
        outliers = self._sizes(rows, n)[1]
        out = torch.zeros(n, rows)
        for name, (bits, vector) in self._stages.items():
            places = slice(0, outliers) if name == "outlier_book" else slice(outliers, n)
            wide = places.stop - places.start
            if not wide:
                continue
            book, count = _checked(parts[name], (2**bits, vector)), -(-rows // vector)
            codes = unpack_wide(parts[name.replace("book", "codes")], bits, wide * count)
            out[places] += book.float()[codes].view(wide, -1)[:, :rows]
        if self.norm == "column":
            scale, bias = _checked(parts["norm"], (n, 2)).float().unbind(1)
            out = out * scale[:, None] + bias[:, None]
        exponent = parts["exponent"]
        if type(exponent) is not int or abs(exponent) > 120:
            raise ValueError(f"exponent: {exponent!r}, where an integer from -120 to 120 fits")
        limit = min(torch.finfo(getattr(torch, spec.dtype)).max, torch.finfo(torch.float32).max)
        out = (out * math.ldexp(1.0, exponent)).clamp_(-limit, limit)
        return torch.empty_like(out).index_copy_(0, unpack_order(parts["order"], n), out).T


def _checked(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.dtype != torch.float16 or tuple(values.shape) != shape or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{values.dtype} {tuple(values.shape)}, where finite float16 {shape} fits")
    return values
