"""Vector quantization of weights under the layer-wise quadratic model (see ``hessian``).

Several columns that are rounded together need the recursion in blocks: with A D A' = H and A_bb the part of A within block b, the
blocks of ``A blockdiag(A_bb)^-1`` have identities on the diagonal, so that within a block nothing is fed back, and what an error e
of the block costs once all later columns make up for it is e M_b e' with the block's *metric* M_b = A_bb D_b A_bb'.

Codebooks are batched: ``groups`` of weights have a codebook each, all with the same number of entries. Vectors lie along the last
axis but one (groups x dim x number), which is how the columns of a transposed matrix give them without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor_kit_weight_quant.sparse import pack_wide, unpack_wide

_CHUNK = 1 << 19  # distances worked on at a time: they stay in the cache


def block_factor(factor: Tensor, pivots: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What :func:`tersor_kit_weight_quant.feedback` needs for steps of ``dim`` columns, and what errors in a step cost.

    ``factor``, ``pivots``: from :func:`tersor_kit_weight_quant.ldl`, n x n and n; ``dim`` divides n.
    Returns the block-unit factor, n x n, and the metrics, (n / dim) x dim x dim, both float32.
    """
    if dim == 1:
        return factor, pivots[:, None, None]
    n = factor.shape[0]
    own = torch.stack([factor.view(n // dim, dim, n // dim, dim)[i, :, i] for i in range(n // dim)])
    metric = (own * pivots.view(-1, 1, dim)) @ own.transpose(1, 2)
    eye = torch.eye(dim, device=factor.device).expand_as(own)
    inverse = torch.linalg.solve_triangular(own, eye, upper=True, unitriangular=True)
    blocks = torch.bmm(factor.view(n, -1, dim).transpose(0, 1), inverse).transpose(0, 1).reshape(n, n)
    for i in range(n // dim):
        blocks[i * dim : (i + 1) * dim, i * dim : (i + 1) * dim] = eye[0]
    return blocks, metric


def nearest(vectors: Tensor, codebook: Tensor, metric: Tensor | None = None) -> Tensor:
    """The entry of its group's codebook that is nearest to each vector: int64, groups x number.

    ``vectors``: groups x dim x number. ``codebook``: groups x entries x dim. ``metric``: what squared distances are measured with,
    dim x dim, symmetric; None: the identity. Ties go to the lower entry.
    """
    scaled = codebook if metric is None or codebook.shape[2] == 1 else codebook @ metric
    constant = (scaled * codebook).sum(2, keepdim=True)
    step = max(1, _CHUNK // codebook.shape[1])
    if vectors.shape[0] * vectors.shape[2] <= step:
        return torch.baddbmm(constant, scaled, vectors, alpha=-2).min(1).indices
    out = torch.empty(vectors.shape[0], vectors.shape[2], dtype=torch.int64, device=vectors.device)
    groups = max(1, step // vectors.shape[2])
    for g in range(0, vectors.shape[0], groups):
        some = slice(g, g + groups)
        for i in range(0, vectors.shape[2], step):
            part = vectors[some, :, i : i + step]
            out[some, i : i + step] = torch.baddbmm(constant[some], scaled[some], part, alpha=-2).min(1).indices
    return out


def mahalanobis_seeds(vectors: Tensor, entries: int, known: Tensor | None = None) -> Tensor:
    """Entries of each group's codebook to start from: vectors at equal steps in the order of their Mahalanobis distance from the
    mean (arXiv 2402.15319, section 4.3). ``vectors``: groups x dim x number. ``known``: groups x number, False where padding.
    Returns groups x entries x dim.
    """
    groups, dim, number = vectors.shape
    if known is None:
        known = torch.ones(groups, number, dtype=torch.bool, device=vectors.device)
    count = known.sum(1).clamp_(min=1)
    centred = vectors - ((vectors * known[:, None]).sum(2) / count[:, None])[:, :, None]
    centred *= known[:, None]
    spread = centred @ centred.transpose(1, 2)
    # a group whose vectors lie in a subspace has no inverse: a little of each variance is added
    variance = spread.diagonal(dim1=1, dim2=2)
    spread = spread + torch.diag_embed(1e-4 * variance + 1e-10 * variance.mean(1, keepdim=True) + 1e-30)
    distance = (torch.linalg.solve(spread, centred) * centred).sum(1)
    order = distance.masked_fill_(~known, torch.inf).argsort(stable=True, dim=1)
    at = (torch.linspace(0, 1, entries, device=vectors.device) * (count - 1)[:, None]).round().long()
    chosen = order.gather(1, at)
    return vectors.gather(2, chosen[:, None].expand(-1, dim, -1)).transpose(1, 2).contiguous()


def kmeans(vectors: Tensor, weights: Tensor, seeds: Tensor, steps: int) -> Tensor:
    """Weighted k-means (EM with hard assignments) of many groups at once.

    Minimised is the sum of weights * (vector - entry)^2. ``vectors`` and ``weights``: groups x dim x number, weights not negative.
    ``seeds``: groups x entries x dim. An entry without vectors stays. Returns the entries, groups x entries x dim.
    """
    codebook = seeds.clone()
    groups, entries, dim = codebook.shape
    number = vectors.shape[2]
    some = max(1, _CHUNK // max(1, entries * number))
    part = max(1, min(number, _CHUNK // entries))
    for g in range(0, groups, some):
        x, h, c = vectors[g : g + some], weights[g : g + some], codebook[g : g + some]
        features = torch.cat([x * h, h], 1)
        distance = torch.empty(c.shape[0], entries, part, device=c.device)
        for _ in range(steps):
            rule = torch.cat([-2 * c, c * c], 2)
            sums = torch.zeros(c.shape[0], 2 * dim, entries, device=c.device)
            for i in range(0, number, part):
                f = features[:, :, i : i + part]
                d = torch.bmm(rule, f, out=distance) if f.shape[2] == part else torch.bmm(rule, f)
                torch.eq(d, d.amin(1, keepdim=True), out=d)
                sums.baddbmm_(f, d.transpose(1, 2))
            total, mass = sums.transpose(1, 2).split(dim, 2)
            new = torch.where(mass > 0, total / mass, c)
            if torch.equal(new, c):
                break
            c.copy_(new)
    return codebook


def fit_codebooks(
    weight: Tensor, hessian: Tensor, start: Tensor, value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor],
    curvature: Tensor, steps: int, bands: int = 1,
) -> Tensor:  # fmt: skip
    """Codebooks for assignments that stay: the least squares tr((W - Q) H (W - Q)') over what Q depends on linearly.

    Solved by conjugate gradients with a diagonal preconditioner, at most ``steps`` products with H, which never end above where
    they started. ``weight``: in x out. ``hessian``: in x in. ``start``: the parameters, with ``bands`` parts along axis 1 that
    belong to different rows of the matrix, and thus do not depend on each other. ``value(parameters)``: Q, in x out, linear.
    ``slope(error)``: its adjoint, in x out to parameters. ``curvature``: the diagonal of ``slope(H value(.))``, or near it.
    Returns the parameters.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        total = (a * b).transpose(0, 1).reshape(bands, -1).sum(1)
        return total.view(1, -1, *[1] * (a.dim() - 2))

    book = start.clone()
    inverse = torch.where(curvature > 0, 1 / curvature, 0.0)
    residual = slope(hessian @ (weight - value(book)))
    direction = inverse * residual
    size = dot(residual, direction)
    first = size.clone()
    for _ in range(steps):
        change = slope(hessian @ value(direction))
        bend = dot(direction, change)
        length = torch.where(bend > 0, size / bend, 0.0)
        book += length * direction
        residual -= length * change
        ready = inverse * residual
        new = dot(residual, ready)
        if bool((new <= 1e-6 * first).all()):
            break
        direction = ready + torch.where(size > 0, new / size, 0.0) * direction
        size = new
    return book


def lookup(book: Tensor, index: Tensor) -> Tensor:
    """Elements of ``book`` (any shape, read flat) at ``index`` (int64), in the shape of ``index``."""
    return book.reshape(-1).index_select(0, index.reshape(-1)).view(index.shape)


def collect(values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """The adjoint of :func:`lookup`: the sums of ``values`` over equal ``index``, in ``shape``."""
    out = torch.zeros(math.prod(shape), device=values.device)
    return out.scatter_add_(0, index.reshape(-1), values.reshape(-1)).view(*shape)


def to_int8(book: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Codebooks in 8 bits: int8, and a scale in float16 for all that lies along the axes from ``axis`` on."""
    flat = book.flatten(axis)
    scale = (flat.abs().amax(-1, keepdim=True) / 127).clamp_(max=65504.0).half()
    step = scale.float()
    codes = (flat * torch.where(step > 0, 1 / step, 0.0)).round_().clamp_(-127, 127).to(torch.int8)
    return codes.view(book.shape), scale.squeeze(-1)


def from_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The codebooks that :func:`to_int8` made codes of."""
    step = scale.float()
    return codes.float() * step.view(*scale.shape, *[1] * (codes.dim() - scale.dim()))


def exponent_of_codebook(weight: Tensor) -> int:
    """The power of two that brings the largest magnitude of ``weight`` to [8, 16), where float16 holds codebooks and scales well."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    return max(-120, min(120, math.frexp(largest)[1] - 4)) if largest > 0 else 0


def pack_order(order: Tensor) -> Tensor:
    """A permutation, bit-packed."""
    return pack_wide(order, max(order.numel() - 1, 1).bit_length())


def unpack_order(packed: Tensor, count: int) -> Tensor:
    """The inverse of :func:`pack_order`. Raises ValueError for what is no permutation of ``count`` elements."""
    order = unpack_wide(packed, max(count - 1, 1).bit_length(), count)
    if not torch.equal(order.sort().values, torch.arange(count, device=order.device)):
        raise ValueError(f"order: not a permutation of {count}")
    return order
