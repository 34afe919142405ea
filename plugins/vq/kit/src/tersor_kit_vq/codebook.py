"""What vector-quantizing layers are made of: the result, the straight-through gradient, codebooks that learn."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from tersor import InputError
from tersor_kit_vq.search import kmeans, sums_by_code


class Quantized(NamedTuple):
    """What a quantizing layer gives.

    ``values``: as the input, ... x dim, exactly what the codes stand for (in the input's element type); ``codes``: int64 of the
    leading shape; ``loss``: scalar float32, to be added to the training loss (0 where a method has none).
    """

    values: Tensor
    codes: Tensor
    loss: Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor) -> Tensor:  # type: ignore[override]
        return values.to(z.dtype).view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def straight_through(z: Tensor, values: Tensor) -> Tensor:
    """``values`` exactly, in the element type of ``z``; the gradient goes to ``z`` as it comes."""
    return _StraightThrough.apply(z, values)  # type: ignore[no-any-return]


def check_vectors(z: Tensor, dim: int, who: str) -> Tensor:
    """``z`` as float32 N x dim. Raises :class:`tersor.InputError` for another dimension or type, NaN or infinity."""
    if not z.is_floating_point() or z.ndim < 1 or z.shape[-1] != dim:
        raise InputError(f"{who} takes float vectors of {dim} dimensions; given: {str(z.dtype)[6:]} of shape {tuple(z.shape)}")
    flat = z.reshape(math.prod(z.shape[:-1]), dim).float()
    # a sum is the cheapest look at all of them; large ones that are finite may sum to infinity
    if not math.isfinite(float(flat.detach().sum())) and not bool(torch.isfinite(flat.detach()).all()):
        raise InputError(f"{who} takes vectors without NaN or infinity")
    return flat


def together() -> bool:
    """Whether several processes train together, under torch.distributed."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Codebook(nn.Module):
    """A codebook, K x dim, that starts from the first batch and learns by moving averages or by gradient.

    ``decay`` above 0: codewords are moving averages of the vectors assigned to them (van den Oord et al., https://arxiv.org/abs/1711.00937,
    appendix A.1): N <- decay N + (1 - decay) n, m <- decay m + (1 - decay) sum z, e = m / N, the counts N smoothed by Laplace's
    rule with ``epsilon`` as the authors' code does. ``decay`` 0: a parameter, for the gradient of a codebook loss.
    ``start``: "kmeans" on the first batch in training mode, or "random": uniform in [-1/K, 1/K].
    Under torch.distributed the sums of all processes are added, so that all keep the same codebook.
    """

    counts: Tensor
    sums: Tensor
    started: Tensor

    def __init__(
        self, size: int, dim: int, decay: float = 0.99, start: str = "kmeans", epsilon: float = 1e-5, seed: int = 0
    ) -> None:
        super().__init__()
        self.size, self.dim, self.decay, self.epsilon, self.seed = size, dim, decay, epsilon, seed
        words = (torch.rand(size, dim, generator=torch.Generator().manual_seed(seed)) * 2 - 1) / size
        if decay > 0:
            self.register_buffer("words", words)
            self.register_buffer("counts", torch.ones(size))
            self.register_buffer("sums", words.clone())
        else:
            self.words = nn.Parameter(words)
        self.register_buffer("started", torch.tensor(start != "kmeans"))
        self._started = start != "kmeans"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._started = bool(self.started)

    def forward(self, codes: Tensor) -> Tensor:
        """The codewords, float32 ... x dim, of indices 0 to K - 1."""
        return nn.functional.embedding(codes, self.words)

    @torch.no_grad()
    def set(self, words: Tensor, counts: Tensor | None = None) -> None:
        """Start from these codewords (K x dim), each with the weight of ``counts`` vectors. Raises :class:`tersor.InputError`."""
        if tuple(words.shape) != (self.size, self.dim):
            raise InputError(f"the codebook is {self.size} x {self.dim}; given: {tuple(words.shape)}")
        self.words.copy_(words)
        if self.decay > 0:
            self.counts.copy_(torch.ones_like(self.counts) if counts is None else counts.clamp(min=self.epsilon))
            self.sums.copy_(self.words * self.counts[:, None])
        self.started.fill_(True)
        self._started = True

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Start from ``x`` (N x dim) by k-means, where that has not been done; the first process decides for all."""
        if self._started or (len(x) == 0 and not together()):
            return
        if not together():
            self.set(*kmeans(x, self.size, 10, self.seed))
            return
        ready = torch.tensor(len(x) > 0, device=x.device).int()
        if distributed.get_rank() == 0 and len(x):
            self.set(*kmeans(x, self.size, 10, self.seed))
        distributed.broadcast(ready, 0)
        if ready:
            counts = self.counts if self.decay > 0 else x.new_ones(self.size)
            for tensor in (self.words.data, counts):
                distributed.broadcast(tensor, 0)
            self.set(self.words.data.clone(), counts.clone())

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor) -> None:
        """One step of the moving averages: ``x`` N x dim, assigned to ``codes`` (int64 N). Nothing with ``decay`` 0."""
        if self.decay <= 0:
            return
        counts, sums = sums_by_code(x, codes, self.size)
        if together():
            both = torch.cat([counts[:, None], sums], 1)
            distributed.all_reduce(both)
            counts, sums = both[:, 0], both[:, 1:]
        total = float(counts.sum())
        if total == 0:
            return
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total_average = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total_average + self.size * self.epsilon) * total_average
        torch.div(self.sums, smoothed[:, None], out=self.words)

    @torch.no_grad()
    def restart(self, x: Tensor, below: float = 1.0) -> int:
        """Codewords whose averaged count is under ``below`` become random ones of ``x`` (N x dim), with a count of 1; gives their number.
        The first process decides for all; nothing happens with ``decay`` 0 or where it has no vectors."""
        if self.decay <= 0:
            return 0
        dead = torch.nonzero(self.counts < below)[:, 0]
        if not len(dead) or (len(x) == 0 and not together()):
            return 0
        drawn, ready = x.new_zeros(len(dead), self.dim), torch.tensor(len(x), device=x.device)
        if len(x):
            # without replacement as far as they go
            order = torch.cat([torch.randperm(len(x), device=x.device) for _ in range(-(-len(dead) // len(x)))])
            drawn = x[order[: len(dead)]].clone()
        if together():
            distributed.broadcast(ready, 0)
            distributed.broadcast(drawn, 0)
        if not int(ready):
            return 0
        self.words[dead], self.sums[dead] = drawn, drawn
        self.counts[dead] = 1.0
        return len(dead)
