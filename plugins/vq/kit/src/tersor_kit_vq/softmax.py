"""Softmax over a codebook, forward and backward, without the whole matrix of probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor import InputError

_TILE = 1 << 20  # logits of a tile: 4 MB of float32, about a cache
_BLOCK = 16


class Posterior(NamedTuple):
    """What :func:`posterior` gives.

    ``values``: float32 N x e; ``codes``: the likeliest codeword, int64 N; ``sample_entropy``: mean entropy of the probabilities of a
    vector, scalar, in nats; ``mean_entropy``: entropy of the mean probabilities, scalar, in nats. Both are 0 where not asked for.
    """

    values: Tensor
    codes: Tensor
    sample_entropy: Tensor
    mean_entropy: Tensor


def _tiles(x: Tensor, turned: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits, x . ``turned`` (d x K) + bias, which are overwritten by the next."""
    size = turned.shape[1]
    rows = min(max(16, _TILE // size), max(len(x), 1))
    buffer = x.new_empty(rows, size)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        logits = buffer[: len(part)]
        if bias is None:
            torch.mm(part, turned, out=logits)
        else:
            torch.addmm(bias, part, turned, out=logits)
        yield slice(start, start + len(part)), logits


def _largest(logits: Tensor) -> Tensor:
    """The column of a largest logit in each row; by blocks first, as torch's argmax is many times slower than its amax."""
    rows, size = logits.shape
    if size % _BLOCK or size < _BLOCK * _BLOCK:
        return logits.argmax(1)
    blocks = logits.view(rows, _BLOCK, size // _BLOCK)
    inner = blocks.amax(1).argmax(1)
    outer = blocks.gather(2, inner[:, None, None].expand(-1, _BLOCK, 1))[:, :, 0].argmax(1)
    return outer * (size // _BLOCK) + inner


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, keys: Tensor, words: Tensor, bias: Tensor | None, hard: bool, sharpness: float, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, size = len(x), len(keys)
        codes = torch.empty(count, dtype=torch.int64, device=x.device)
        values = x.new_empty(0 if hard else count, words.shape[1])
        sample, mean = x.new_zeros(()), x.new_zeros(size)
        weights = None
        for rows, logits in _tiles(x, keys.T.contiguous(), bias):
            codes[rows] = chosen = _largest(logits)
            if sharpness or not hard:
                weights = torch.empty_like(logits) if weights is None else weights[: len(logits)]
            if not hard:
                torch.mm(torch.softmax(logits, 1, out=weights), words, out=values[rows])
            if sharpness:
                largest = logits.gather(1, chosen[:, None])
                sharp = logits.sub_(largest).mul_(sharpness)
                probabilities = torch.softmax(sharp, 1, out=weights)
                mean += probabilities.sum(0)
                # -log q = log sum exp(s) - s, and the likeliest has s = 0
                sample -= probabilities.gather(1, chosen[:, None]).log().sum()
                sample -= sharp.mul_(probabilities).sum()
        if hard:
            values = words[codes]
        mean /= max(count, 1)
        ctx.save_for_backward(x, keys, words, bias, codes, mean)
        ctx.options = hard, sharpness, epsilon
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return values, codes, sample / max(count, 1), -(mean * (mean + epsilon).log()).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: Any, of_values: Tensor | None, _: Any, of_sample: Tensor | None, of_mean: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, keys, words, bias, codes, mean = ctx.saved_tensors
        hard, sharpness, epsilon = ctx.options
        entropies = bool(sharpness) and (of_sample is not None or of_mean is not None)
        on_x, on_keys, on_words, on_bias = ctx.needs_input_grad[:4]
        for_x = torch.zeros_like(x) if on_x else None
        # of few dimensions, the products with d rows are several times as fast as those with d columns
        turned = keys.T.contiguous()
        for_keys = keys.new_zeros(turned.shape).T if on_keys else None
        for_words = words.new_zeros(words.shape[::-1]).T if on_words else None
        for_bias = torch.zeros_like(bias) if on_bias and bias is not None else None
        if for_words is not None and hard and of_values is not None:
            for_words.index_add_(0, codes, of_values)
        through = on_x or on_keys or on_bias
        if not through and (hard or of_values is None):
            return for_x, for_keys, for_words, for_bias, None, None, None
        of_sample = x.new_zeros(()) if of_sample is None else of_sample
        # d(-sum m log(m + eps)) / dm, for each code
        slope = None if of_mean is None else -of_mean * ((mean + epsilon).log() + mean / (mean + epsilon))
        weights = change = None
        for rows, logits in _tiles(x, turned, bias):
            weights = torch.empty_like(logits) if weights is None else weights[: len(logits)]
            change = torch.empty_like(logits) if change is None else change[: len(logits)]
            if of_values is not None:
                torch.softmax(logits, 1, out=weights)
                if for_words is not None and not hard:
                    for_words.T.addmm_(of_values[rows].T, weights)
                torch.mm(of_values[rows], words.T, out=change).mul_(weights)
                change.addcmul_(weights, change.sum(1, keepdim=True), value=-1)
            else:
                change.zero_()
            if entropies:
                largest = logits.gather(1, codes[rows, None])
                sharp = logits.sub_(largest).mul_(sharpness)
                torch.softmax(sharp, 1, out=weights)
                sharp.mul_(-of_sample)
                if slope is not None:
                    sharp.add_(slope)
                sharp.mul_(weights)
                sharp.addcmul_(weights, sharp.sum(1, keepdim=True), value=-1)
                change.add_(sharp, alpha=sharpness / len(x))
            if for_x is not None:
                torch.mm(change, turned.T, out=for_x[rows])
            if for_keys is not None:
                for_keys.T.addmm_(x[rows].T, change)
            if for_bias is not None:
                for_bias += change.sum(0)
        return for_x, for_keys, for_words, for_bias, None, None, None


def _check(x: Tensor, keys: Tensor, words: Tensor, bias: Tensor | None) -> None:
    sizes = [*x.shape[1:], len(keys)] if x.ndim == 2 and keys.ndim == 2 else None
    right = sizes is not None and sizes[1] > 0 and keys.shape[1] == sizes[0] and words.ndim == 2 and len(words) == sizes[1]
    if not right or (bias is not None and tuple(bias.shape) != (len(keys),)):
        given = ", ".join(str(tuple(t.shape)) for t in (x, keys, words, bias) if t is not None)
        raise InputError(
            f"a posterior takes vectors N x d, keys K x d, words K x e and a bias of K, K of 1 or more; given: {given}"
        )


def posterior(
    x: Tensor, keys: Tensor, words: Tensor, bias: Tensor | None = None, *, hard: bool = False, sharpness: float = 0.0,
    epsilon: float = 1e-5,
) -> Posterior:  # fmt: skip
    """Probabilities p = softmax(x . keys' + bias) of K codewords, and what they make of ``words``; differentiable once, in all tensors.

    ``x``: float32 N x d; ``keys``: float32 K x d; ``words``: float32 K x e; ``bias``: float32 K. ``hard`` False: values are p . words.
    ``hard``: values are the words of the likeliest codes, exactly, with the gradient of (onehot + p - sg[p]) . words: straight through the
    categorical, so that all keys get one. ``sharpness`` above 0: both entropies too, of softmax(sharpness (x . keys' + bias)), the mean
    one as -sum m log(m + ``epsilon``).

    Tiles of a million probabilities are made, and made again in the backward pass; N x K is never whole. Entropies are those of this process.
    Raises :class:`tersor.InputError` for shapes that do not fit, or no codewords.
    """
    _check(x, keys, words, bias)
    return Posterior(*_Posterior.apply(x, keys, words, bias, hard, sharpness, epsilon))


@torch.no_grad()
def likeliest(x: Tensor, keys: Tensor, bias: Tensor | None = None, kept: int = 1) -> tuple[Tensor, Tensor]:
    """The ``kept`` codewords of the largest x . keys' + bias, likeliest first: int64 N x kept, and their probabilities relative to the first's,
    float32 N x kept. Tiled as :func:`posterior`. Raises :class:`tersor.InputError` as it does, or for fewer codewords than kept."""
    _check(x, keys, keys, bias)
    if not 1 <= kept <= len(keys):
        raise InputError(f"of {len(keys)} codewords 1 to {len(keys)} can be kept; given: {kept}")
    codes = torch.empty(len(x), kept, dtype=torch.int64, device=x.device)
    ratios = x.new_ones(len(x), kept)
    for rows, logits in _tiles(x, keys.T.contiguous(), bias):
        if kept == 1:
            codes[rows, 0] = _largest(logits)
        else:
            top = logits.topk(kept, 1)
            codes[rows] = top.indices
            ratios[rows] = (top.values - top.values[:, :1]).exp()
    return codes, ratios
