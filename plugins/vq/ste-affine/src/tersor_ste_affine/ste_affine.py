"""Straightening Out the Straight-Through Estimator: Overcoming Optimization Challenges in Vector Quantized Networks (Huh, Cheung, Agrawal,
Isola, https://arxiv.org/abs/2305.08842)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import ConfigError, at_least, between, field, method, one_of
from tersor_kit_vq import (
    Codebook,
    VectorLayer,
    VectorQuantizer,
    add_over_processes,
    mean_square,
    nearest,
    straight_through,
    sums_by_code,
)

_MOMENTUM = 0.1  # of the running statistics, as in the authors' code
_LARGEST = 10.0  # scale of the running statistics, at most


class Affine(nn.Module):
    """c = scale * e + bias, with scale and bias (each groups x dim) shared by all codes of a group (section 4.1).

    A step on the shared numbers moves every code, chosen or not, so that the codebook follows the vectors as a whole. ``kind``:
    "learned": scale = 1 + ``rate`` s, bias = ``rate`` b, with parameters s and b that start at 0; "running": moments of the vectors and of
    each group's codes, as moving averages, are matched: scale = deviation of z / deviation of e (at most 10), bias = mean z - scale mean e.
    """

    means: Tensor
    variances: Tensor
    started: Tensor

    def __init__(self, size: int, dim: int, kind: str, groups: int, rate: float) -> None:
        super().__init__()
        self.kind, self.rate, self.groups = kind, rate, groups
        self.register_buffer("group", torch.arange(size) * groups // size, persistent=False)
        if kind == "learned":
            self.scale, self.bias = (nn.Parameter(torch.zeros(groups, dim)) for _ in range(2))
        else:
            # of the vectors in the first row, of the groups in the others
            self.register_buffer("means", torch.zeros(1 + groups, dim))
            self.register_buffer("variances", torch.ones(1 + groups, dim))
            self.register_buffer("started", torch.tensor(False))

    group: Tensor

    def numbers(self) -> tuple[Tensor, Tensor]:
        """Scale and bias, each groups x dim."""
        if self.kind == "learned":
            return 1 + self.rate * self.scale, self.rate * self.bias
        scale = ((self.variances[:1] + 1e-8) / (self.variances[1:] + 1e-8)).sqrt().clamp(max=_LARGEST)
        return scale, self.means[:1] - scale * self.means[1:]

    @torch.no_grad()
    def move(self, words: Tensor, scale: Tensor, offset: Tensor) -> None:
        """Codes of codewords (K x dim, changed in place) become scale times what they were plus offset."""
        if self.kind == "learned":
            words.mul_(scale).add_(offset / self.numbers()[0][self.group])
            self.bias.mul_(scale)
            return
        words.mul_(scale)
        self.means.mul_(scale)
        self.means[0] += offset
        self.variances.mul_(scale.square())

    def forward(self, words: Tensor) -> Tensor:
        """The codes, K x dim, of codewords K x dim."""
        scale, bias = self.numbers()
        return scale[self.group] * words + bias[self.group]

    @torch.no_grad()
    def follow(self, x: Tensor, words: Tensor) -> None:
        """Moments of the vectors of all processes and of the codewords, where they are running statistics."""
        if self.kind == "learned":
            return
        rows = x.double()
        total = add_over_processes(
            torch.cat([rows.new_full((1, x.shape[1]), len(x)), rows.sum(0)[None], rows.square().sum(0)[None]])
        )
        if float(total[0, 0]) == 0:
            return
        mean = total[1] / total[0]
        variance = (total[2] / total[0] - mean.square()).clamp(min=0)
        counts, sums = sums_by_code(words, self.group, self.groups)
        group_means = sums / counts[:, None]
        squares = sums_by_code((words - group_means[self.group]).square(), self.group, self.groups)[1]
        means = torch.cat([mean.float()[None], group_means])
        variances = torch.cat([variance.float()[None], squares / counts[:, None]])
        step = _MOMENTUM if bool(self.started) else 1.0
        self.means.lerp_(means, step)
        self.variances.lerp_(variances, step)
        self.started.fill_(True)


class STEAffineLayer(VectorLayer):
    """``alpha`` ((1 - ``beta``) mean (z - sg c)^2 + ``beta`` mean (sg z - c)^2), with three changes, each of which can be left out.

    Affine codes (section 4.1): c = :class:`Affine` (e). Alternated optimisation (4.2): in training mode e first takes ``inner`` steps of SGD
    towards the vectors, held fixed, and the second term then has a gradient for scale and bias alone.
    Synchronised (4.3): the task's gradient also goes to the codes, times ``nu``: z + sg (c - z) + nu (c - sg c).
    """

    def __init__(
        self, codebook: Codebook, affine: Affine | None, alpha: float, beta: float, inner: int, rate: float, nu: float
    ) -> None:
        super().__init__("ste-affine", codebook.dim, codebook.size)
        self.book, self.affine = codebook, affine
        self.alpha, self.beta, self.inner, self.rate, self.nu = alpha, beta, inner, rate, nu
        if inner:
            # nothing else moves the codewords unless the task does
            codebook.words.requires_grad_(nu > 0)

    @property
    def codebook(self) -> Tensor:
        """All codes as they are now, K x dim."""
        return self.book.words if self.affine is None else self.affine(self.book.words)

    @torch.no_grad()
    def move(self, scale: Tensor, offset: Tensor) -> None:
        """All codes times ``scale`` plus ``offset``, scalars."""
        if self.affine is None:
            self.book.words.mul_(scale).add_(offset)
        else:
            self.affine.move(self.book.words.data, scale, offset)

    @torch.no_grad()
    def _alternate(self, x: Tensor, codes: Tensor) -> None:
        """``inner`` steps of SGD on mean (z - c)^2 over the vectors of all processes, their codes held, as the authors' code does.

        d/de_k = 2 scale (n_k c_k - sum z) / (N dim). No step goes past the mean of a code's vectors.
        """
        counts, sums = sums_by_code(x, codes, self.book.size)
        both = add_over_processes(torch.cat([counts[:, None], sums], 1))
        counts, sums = both[:, :1], both[:, 1:]
        total = float(counts.sum())
        if total == 0:
            return
        scale = x.new_ones(1) if self.affine is None else self.affine.numbers()[0][self.affine.group]
        share = 2 * self.rate * counts / (total * self.dim)
        factor = share * scale / (share * scale.square()).clamp(min=1)
        means = sums / counts.clamp(min=1)
        for _ in range(self.inner):
            self.book.words.add_(factor * (means - self.codebook))

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fixed = x.detach()
        if self.training:
            self.book.prepare(fixed)
            if self.affine is not None:
                self.affine.follow(fixed, self.book.words.detach())
        codes = nearest(fixed, self.codebook.detach())
        if self.training and self.inner:
            self._alternate(fixed, codes)
        chosen = functional.embedding(codes, self.codebook)
        loss = self.alpha * (1 - self.beta) * mean_square(x, chosen.detach())
        pulled = chosen
        if self.inner and self.affine is not None:
            pulled = functional.embedding(codes, self.affine(self.book.words.detach()))
        elif self.inner:
            pulled = chosen.detach()
        loss = loss + self.alpha * self.beta * mean_square(fixed, pulled)
        values = straight_through(x, chosen.detach())
        if self.nu > 0:
            values = values + self.nu * (chosen - chosen.detach())
        return values, codes, loss

    def _values(self, codes: Tensor) -> Tensor:
        return functional.embedding(codes, self.codebook)

    def _codes(self, values: Tensor) -> Tensor:
        return nearest(values, self.codebook)


@method
class STEAffine(VectorQuantizer):
    """Vectors become the number of their nearest code; the codebook keeps up with the encoder by three changes to its training.

    Latent: float, ... x ``dim``. Stored: ceil(log2 codes) bits a vector. ``alpha`` and ``beta`` are the paper's (appendix A: 5, or 2 with affine
    codes; 0.9 to 0.995), ``affine_rate`` and ``nu`` those of the authors' autoencoder, ``inner_rate`` is 50 / (1 - 0.9): rate and momentum of their
    example of alternated optimisation. The codebook starts by k-means of the first batch, as there. Raises :class:`tersor.InputError` for vectors of another
    dimension, :class:`tersor.StateError` for a state of another shape, :class:`tersor.ConfigError` for more groups than codes.
    """

    name = "ste-affine"
    codes: int = field(1024, between(1, 1 << 20), help="codes")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    affine: str = field(
        "learned", one_of("learned", "running", "none"), help="shared scale and bias: parameters, moments, or none"
    )
    groups: int = field(1, between(1, 1 << 16), help="of codes, each with its own scale and bias")
    affine_rate: float = field(2.0, between(0, 1e6), help="factor of the learning rate of scale and bias")
    inner: int = field(1, between(0, 1 << 10), help="steps of the codebook before each of the network; 0: none")
    inner_rate: float = field(500.0, between(0, 1e9), help="learning rate of these steps")
    nu: float = field(2.0, between(0, 1e6), help="weight of the task's gradient for the codes; 0: none")
    alpha: float = field(2.0, between(0, 1e6), help="weight of both terms of the loss")
    beta: float = field(0.9, between(0, 1), help="share of the term that moves the codes; the rest moves the vectors")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the codebook and of training")

    def __attrs_post_init__(self) -> None:
        if self.groups > self.codes:
            raise ConfigError(f"ste-affine: groups={self.groups} of codes={self.codes}; allowed: at most one group for each code")

    def _layer(self) -> STEAffineLayer:
        affine = None if self.affine == "none" else Affine(self.codes, self.dim, self.affine, self.groups, self.affine_rate)
        book = Codebook(self.codes, self.dim, 0.0, seed=self.seed)
        return STEAffineLayer(book, affine, self.alpha, self.beta, self.inner, self.inner_rate, self.nu)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(codes=2**bits, dim=dim)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, steps=8), cls(codes=7, dim=3, affine="running", groups=2, inner=2, steps=8))
