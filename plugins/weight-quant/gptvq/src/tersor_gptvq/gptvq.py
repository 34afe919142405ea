"""GPTVQ: The Blessing of Dimensionality for LLM Quantization (https://arxiv.org/abs/2402.15319)."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from torch import Tensor

from tersor import Calibration, ConfigError, Quantizer, Spec, at_least, between, field, method, one_of
from tersor_kit_weight_quant import (
    block_factor,
    collect,
    exponent_of_codebook,
    feedback,
    fit_codebooks,
    from_int8,
    gram,
    kmeans,
    ldl,
    lookup,
    mahalanobis_seeds,
    nearest,
    normalise,
    pack,
    pack_order,
    to_int8,
    unpack,
    unpack_order,
)

_COLUMNS = 256  # the most columns in a group (section 4.1)
_SCALE_BITS = 4  # of a block's scale (section 4.2)
_UPDATES = 10  # products with the Hessian in a codebook update


@attrs.frozen
class _Layout:
    """Groups of weights that share a codebook: ``blocks`` runs of ``width`` columns times ``groups`` runs of ``height`` rows.

    ``columns`` is the width of the matrix, made up to whole steps of ``dim`` columns.
    """

    columns: int
    blocks: int
    width: int
    groups: int
    height: int

    @property
    def rows(self) -> int:
        return self.groups * self.height

    def rows_first(self, columns: Tensor, dim: int) -> Tensor:
        """Columns (in x out) as the vectors of each row group: groups x dim x number."""
        steps = columns.shape[0] // dim
        return columns.view(steps, dim, self.groups, self.height).permute(2, 1, 0, 3).reshape(self.groups, dim, -1)


@method
class GPTVQ(Quantizer):
    """``dim`` consecutive columns are rounded together to entries of a codebook, and what is lost is fed back (section 4, algorithm 1).

    Weights: float, out x in. Calibration: the layer's inputs, samples x in, or their X'X, in x in. Minimised is
    tr((W - Q) H (W - Q)') with H = X'X + damping.

    - **Groups.** A group of weights, at most 256 columns wide, has a codebook of 2^(bits * dim) entries. It has as many rows as
      make all codebooks together cost at most ``overhead`` bits a weight (section 4.1; the scales of the codebooks are counted).
    - **Block-wise normalisation** (``scale_block`` above 0, section 4.2): the weights of a row in a block of that many columns
      are divided by the largest of them, a scale of 4 bits on a logarithmic grid for each block of columns.
    - **EM initialisation** (section 4.3): before the first column of a group is rounded, its current values are clustered by
      k-means weighted with the Hessian, from vectors at equal steps of their Mahalanobis distance. (A sample of the vectors
      would be quicker, and misses the few columns of large activations on which everything hangs.)
    - **Quantization**: a step of columns goes to the entry with the least (w - c) M (w - c)', M being what errors in these columns
      cost once all later columns make up for them. The paper takes the diagonal of M; all of it costs the same here.
    - **Codebook update** (``update``, section 4.4): with assignments fixed, the codebooks that minimise the layer's error, by
      conjugate gradients where the paper takes 25 steps of gradient descent.
    - **Codebook compression** (``codebook``, section 4.4): ``"int8"`` with a scale in float16 for each; ``"float16"``: none;
      ``"svd"`` (``dim`` 1): codebooks are sorted, stacked, reduced to half their rank, both factors updated, the first kept in int8.
    - ``act_order`` (GPTQ's, not in the paper): columns of large activations first. The order is stored, about 10 bits a column.

    Stored: codes at ``bits * dim`` bits for ``dim`` weights, codebooks, scales. Columns that were never active become about 0.

    Raises :class:`tersor.ConfigError` for codes above 8 bits, a scale block that ``dim`` does not divide, or ``"svd"`` with ``dim``
    above 1; :class:`tersor.InputError` for NaN and infinity in the weights; :class:`tersor.CalibrationError` for calibration data
    that is missing, of another width, all zero, not finite, or not positive definite at the highest damping.
    """

    name = "gptvq"
    domains = ("weight",)
    native = "torch"
    calibration = "required"

    bits: int = field(2, between(1, 8), help="bits per weight; codes have bits * dim, at most 8")
    dim: int = field(2, one_of(1, 2, 4), help="columns that are rounded together")
    overhead: float = field(0.125, between(0.001, 8), help="bits per weight that codebooks may cost")
    codebook: str = field("int8", one_of("int8", "float16", "svd"), help="how codebooks are kept")
    scale_block: int = field(0, at_least(0), help="weights of a row that share a 4-bit scale; 0: none")
    update: bool = field(True, help="fit the codebooks to the layer's error once all columns are rounded")
    act_order: bool = field(True, help="round columns of large activations first")
    iterations: int = field(10, at_least(0), help="steps of EM")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")

    def __attrs_post_init__(self) -> None:
        if self.bits * self.dim > 8:
            raise ConfigError(f"gptvq: bits={self.bits} with dim={self.dim} is not allowed; allowed: bits * dim of at most 8")
        if self.scale_block % self.dim:
            raise ConfigError(f"gptvq: scale_block={self.scale_block} is not allowed; allowed: multiples of dim={self.dim}, or 0")
        if self.codebook == "svd" and self.dim > 1:
            raise ConfigError(f"gptvq: codebook='svd' with dim={self.dim} is not allowed; allowed: dim=1")

    @classmethod
    def examples(cls) -> list[GPTVQ]:
        """For the conformance kit."""
        return [
            cls(iterations=5),
            cls(dim=1, codebook="svd", scale_block=4, iterations=5),
            cls(bits=1, dim=4, codebook="float16", update=False, act_order=False, iterations=5),
        ]

    @classmethod
    def at_bits(cls, bits: int) -> list[GPTVQ]:
        """Two columns at a time at 2 to 4 bits, one at 8."""
        return [cls(bits=bits, dim=1 if bits > 4 else 2, overhead=1.0 if bits > 4 else 0.125)]

    @property
    def _entries(self) -> int:
        return 2 ** (self.bits * self.dim)

    @property
    def _rank(self) -> int:
        """Numbers kept for each codebook of one dimension under ``"svd"``."""
        return max(1, self._entries // 2)

    def _layout(self, rows: int, n: int) -> _Layout:
        columns = -(-n // self.dim) * self.dim
        values = self._entries * self.dim
        cost = {"int8": 8 * values + 16, "float16": 16 * values, "svd": 8 * self._rank}[self.codebook]
        affordable = max(1, int(rows * n * self.overhead / cost))
        blocks = max(min(-(-n // _COLUMNS), affordable), affordable // rows)
        unit = self.scale_block or self.dim
        width = -(-columns // (blocks * unit)) * unit
        blocks = -(-columns // width)
        height = -(-rows // max(1, min(rows, affordable // blocks)))
        return _Layout(columns, blocks, width, -(-rows // height), height)

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        (rows, n), dim = x.shape, self.dim
        at = self._layout(rows, n)
        hessian = gram(calibration, n)
        order = torch.arange(n, device=x.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)
        factor, pivots = ldl(hessian, order, self.damp)
        factor, metric = block_factor(_eye_around(factor, at.columns), _padded(pivots / pivots.max(), at.columns), dim)

        exponent = exponent_of_codebook(x)
        target = torch.zeros(at.columns, at.rows, device=x.device)
        target[:n, :rows] = normalise(x, exponent).T[order]
        target[:n][hessian.diagonal()[order] == 0] = 0.0
        real = (torch.arange(at.rows, device=x.device) < rows).view(at.groups, at.height)  # not there to fill up a row group

        books = torch.zeros(at.blocks, at.groups, self._entries, dim, device=x.device)
        codes = torch.empty(at.columns // dim, at.groups, at.height, dtype=torch.int64, device=x.device)
        scale = torch.ones(at.columns // dim, at.rows, device=x.device)
        scales: list[dict[str, Tensor]] = []

        def enter(start: int, group: Tensor) -> None:
            """Scales and codebooks of a block of columns, from its values given everything rounded before."""
            steps = slice(start // dim, (start + group.shape[0]) // dim)
            if self.scale_block:
                scales.append(_fit_scales(group, self.scale_block))
                scale[steps] = _scales_of(scales[-1]).repeat_interleave(self.scale_block // dim, 0)[: group.shape[0] // dim]
            vectors = at.rows_first((group.view(-1, dim, at.rows) / scale[steps, None]).view_as(group), dim)
            cost = metric[steps].diagonal(dim1=1, dim2=2)[:, :, None] * scale[steps, None].square()
            cost = at.rows_first(cost.reshape(-1, at.rows), dim)
            known = real[:, None].expand(-1, group.shape[0] // dim, -1).reshape(at.groups, -1)
            seeds = mahalanobis_seeds(vectors, self._entries, known)
            books[start // at.width] = self._kept(kmeans(vectors, cost * known[:, None], seeds, self.iterations))

        def round_(k: int, w: Tensor, error: Tensor) -> None:
            """Algorithm 1, line 15 on: the entries for one step of columns."""
            step, own = k // dim, books[k // at.width]
            w = (w / scale[step]).view(dim, at.groups, at.height).transpose(0, 1)
            codes[step] = nearest(w, own, metric[step])
            value = own.gather(1, codes[step, :, :, None].expand(-1, -1, dim)).view(at.rows, dim).T * scale[step]
            error -= value.view_as(error)

        feedback(target.clone(), factor, at.width, enter, round_, step=dim)
        scale = scale * real.view(-1)  # what is not there has no part in what follows
        parts: dict[str, Any] = {}
        seen = torch.zeros(at.columns, at.columns, device=x.device)
        seen[:n, :n] = hessian[order][:, order]
        seen /= seen.diagonal().max()
        seen.diagonal().add_(self.damp * seen.diagonal().sum() / n)
        if self.codebook == "svd":
            parts |= self._compress(books, codes, target, scale, seen, at)
        else:
            if self.update:
                books = self._update(books, codes, target, scale, seen, at)
            parts |= self._store(books)
        parts["codes"] = pack(codes.view(-1, at.rows)[:, :rows].to(torch.uint8), self.bits * dim)
        if self.scale_block:
            parts |= {k: torch.cat([s[k] for s in scales]) for k in ("low", "ratio")}
            parts["scales"] = pack(torch.cat([s["scales"] for s in scales])[:, :rows], _SCALE_BITS)
        if self.act_order:
            parts["order"] = pack_order(order)
        return parts | {"exponent": exponent}

    def _kept(self, books: Tensor) -> Tensor:
        """Codebooks as they will be decoded."""
        return from_int8(*to_int8(books, books.dim() - 2)) if self.codebook == "int8" else books.half().float()

    def _store(self, books: Tensor) -> dict[str, Tensor]:
        if self.codebook == "float16":
            return {"books": books.half()}
        books, scale = to_int8(books, 2)
        return {"books": books, "book_scale": scale}

    def _index(self, codes: Tensor, at: _Layout, books: tuple[int, ...]) -> Tensor:
        """Where in the codebooks (blocks x groups x entries x dim, flat) each weight has its value: int64, in x out."""
        place = torch.arange(math.prod(books[:2]), device=codes.device).view(books[:2]) * books[2]
        block = torch.arange(at.columns // self.dim, device=codes.device) * self.dim // at.width
        entry = (codes + place[block][:, :, None]).view(-1, 1, at.rows) * self.dim
        return (entry + torch.arange(self.dim, device=codes.device)[:, None]).view(at.columns, at.rows)

    def _update(self, books: Tensor, codes: Tensor, target: Tensor, scale: Tensor, hessian: Tensor, at: _Layout) -> Tensor:
        """Codebook update: the least squares over all codebooks."""
        index = self._index(codes, at, tuple(books.shape))
        scale = scale.repeat_interleave(self.dim, 0)
        return fit_codebooks(
            target,
            hessian,
            books,
            lambda b: lookup(b, index).mul_(scale),
            lambda e: collect(e.mul_(scale), index, books.shape),
            collect(scale.square() * hessian.diagonal()[:, None], index, books.shape),
            _UPDATES,
            at.groups,
        )

    def _compress(
        self, books: Tensor, codes: Tensor, target: Tensor, scale: Tensor, hessian: Tensor, at: _Layout
    ) -> dict[str, Tensor]:
        """Codebooks of one dimension as a product of low rank, each factor fitted to the layer's error; ``codes`` are rewritten."""
        shape = tuple(books.shape)
        books, order = books.sort(2)
        codes.copy_(lookup(order.argsort(dim=2), self._index(codes, at, shape)).view_as(codes))
        index = self._index(codes, at, shape)
        u, s, v = torch.linalg.svd(books.view(-1, shape[2]), full_matrices=False)
        left, right = (u * s)[:, : self._rank].reshape(*shape[:2], -1), v[: self._rank]
        bend = collect(scale.square() * hessian.diagonal()[:, None], index, shape[:3])

        def slope(e: Tensor) -> Tensor:
            return collect(e.mul_(scale), index, shape[:3])

        def fit_right(left: Tensor, right: Tensor) -> Tensor:
            wide = left.reshape(-1, left.shape[2])
            return fit_codebooks(
                target,
                hessian,
                right,
                lambda v: lookup(_product(left, v), index).mul_(scale),
                lambda e: wide.T @ slope(e).view(-1, shape[2]),
                wide.square().T @ bend.view(-1, shape[2]),
                _UPDATES,
            )

        if self.update:
            left = fit_codebooks(
                target,
                hessian,
                left,
                lambda u: lookup(_product(u, right), index).mul_(scale),
                lambda e: slope(e) @ right.T,
                bend @ right.square().T,
                _UPDATES,
                at.groups,
            )
        peak = left.abs().amax((0, 1)).clamp_(min=1e-30) / 127  # of a component; its inverse goes into the other factor
        kept, right = (left / peak).round_().to(torch.int8), right * peak[:, None]
        if self.update:
            right = fit_right(kept.float(), right)
        return {"books": kept, "basis": right.half()}

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        rows, n = spec.shape
        at = self._layout(rows, n)
        shape = (at.blocks, at.groups, self._entries, self.dim)
        rank = min(self._rank, at.blocks * at.groups)
        stored = (at.blocks, at.groups, rank) if self.codebook == "svd" else shape
        kind = torch.float16 if self.codebook == "float16" else torch.int8
        books = parts["books"]
        if books.dtype != kind or tuple(books.shape) != stored:
            raise ValueError(f"books: {books.dtype} {tuple(books.shape)}, where {kind} {stored} fits")
        if self.codebook == "svd":
            books = _product(books.float(), _checked(parts["basis"], (rank, self._entries))).view(shape)
        elif self.codebook == "int8":
            books = from_int8(books, _checked(parts["book_scale"], shape[:2]))
        codes = unpack(parts["codes"], self.bits * self.dim, at.columns // self.dim * rows).long().view(-1, rows)
        codes = torch.nn.functional.pad(codes, (0, at.rows - rows)).view(-1, at.groups, at.height)
        out = lookup(books.float(), self._index(codes, at, shape))[:n, :rows]
        if self.scale_block:
            blocks = -(-at.columns // self.scale_block)
            table = {k: _checked(parts[k], (blocks,)) for k in ("low", "ratio")}
            table["scales"] = unpack(parts["scales"], _SCALE_BITS, blocks * rows).view(blocks, rows)
            out = out * _scales_of(table).repeat_interleave(self.scale_block, 0)[:n]
        limit = min(torch.finfo(getattr(torch, spec.dtype)).max, torch.finfo(torch.float32).max)
        out = (out * math.ldexp(1.0, _exponent(parts["exponent"]))).clamp_(-limit, limit)
        if self.act_order:
            out = torch.empty_like(out).index_copy_(0, unpack_order(parts["order"], n), out)
        return out.T


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Codebooks from their factors, blocks x groups x rank and rank x entries: sums in one order on every machine."""
    out = left[:, :, :1] * right[0]
    for i in range(1, right.shape[0]):
        out = out + left[:, :, i : i + 1] * right[i]
    return out


def _fit_scales(columns: Tensor, size: int) -> dict[str, Tensor]:
    """Block-wise normalisation: largest magnitudes of each row in ``size`` columns, on a grid of 16 powers of one ratio.

    ``columns``: in x out. Returns ``scales`` (uint8, blocks x out), ``low`` and ``ratio`` (float16, a value for each block).
    """
    blocks = torch.nn.functional.pad(columns, (0, 0, 0, -columns.shape[0] % size)).view(-1, size, columns.shape[1])
    largest = blocks.abs().amax(1)
    top = largest.amax(1).clamp_(min=1e-4)
    low = torch.where(largest > 0, largest, top[:, None]).amin(1)
    low = torch.maximum(low, top * 2.0**-8).half()  # a block of almost nothing is not to spoil the grid of all
    ratio = (top / low).clamp_(min=1.0).pow(1 / (2**_SCALE_BITS - 1)).half()
    codes = torch.log(largest.clamp_(min=1e-30) / low[:, None]) / torch.log(ratio.float())[:, None].clamp_(min=1e-6)
    return {"scales": codes.round_().clamp_(0, 2**_SCALE_BITS - 1).to(torch.uint8), "low": low, "ratio": ratio}


def _scales_of(table: dict[str, Tensor]) -> Tensor:
    """The scales that :func:`_fit_scales` chose, float32, blocks x out: products of ratios, the same on every machine."""
    grid = [table["low"].float()]
    for _ in range(2**_SCALE_BITS - 1):
        grid.append(grid[-1] * table["ratio"].float())
    return torch.stack(grid, 1).gather(1, table["scales"].long())


def _padded(diagonal: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(diagonal, (0, n - diagonal.shape[0]))


def _eye_around(factor: Tensor, n: int) -> Tensor:
    """A unit factor with columns after its own that have nothing to do with them."""
    if factor.shape[0] == n:
        return factor
    out = torch.eye(n, device=factor.device)
    out[: factor.shape[0], : factor.shape[0]] = factor
    return out


def _checked(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.dtype != torch.float16 or tuple(values.shape) != shape or not bool(torch.isfinite(values).all()):
        raise ValueError(f"{values.dtype} {tuple(values.shape)}, where finite float16 {shape} fits")
    return values


def _exponent(value: Any) -> int:
    if type(value) is not int or abs(value) > 120:
        raise ValueError(f"exponent: {value!r}, where an integer from -120 to 120 fits")
    return value
