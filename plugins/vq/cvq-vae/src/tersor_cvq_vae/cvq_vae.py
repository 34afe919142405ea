"""Online Clustered Codebook (Zheng, Vedaldi, https://arxiv.org/abs/2307.15139)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from tersor import at_least, between, field, method, one_of
from tersor_cvq_vae.anchors import by_probability, closest, refill, scores, search
from tersor_kit_vq import (
    VectorLayer,
    VectorQuantizer,
    add_over_processes,
    mean_square,
    nearest,
    straight_through,
    together,
)

_SLACK = 1e-3  # the paper's epsilon, in the exponent
_NONE = 1e-9  # a share of an anchor that float32 does not see
_HEAT = 0.07  # temperature of the contrastive loss
_ROWS = 64  # vectors whose distances are taken without a product at a time
_TILE = 1 << 20  # scores worked on at a time: 4 MB


class _Contrast(torch.autograd.Function):
    """For each codeword the cross entropy of its nearest features against the farthest half of all; mean over the codewords."""

    @staticmethod
    def forward(ctx: Any, words: Tensor, x: Tensor, distance: str) -> Tensor:  # type: ignore[override]
        size, count = len(words), len(x)
        near, total, grads = max(1, count // size), words.new_zeros(()), torch.zeros_like(words)
        rows = max(1, _TILE // max(count, 1))
        for start in range(0, size if count > 1 else 0, rows):
            with torch.enable_grad():
                part = words[start : start + rows].detach().requires_grad_()
                score = scores(part, x, distance)
                pull = score.topk(near, 1, sorted=False).values.mean(1, keepdim=True)
                push = score.topk(count // 2, 1, largest=False, sorted=False).values
                logits = torch.cat([pull, push], 1) / _HEAT
                loss = (logits.logsumexp(1) - logits[:, 0]).sum() / size
            (grads[start : start + rows],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad, None, None


class CVQLayer(VectorLayer):
    """VQ-VAE's layer with a codebook that learns by gradient, and after every batch in training (section 3.2) for each codeword e_k:

    N_k <- gamma N_k + (1 - gamma) n_k / n, the running average of its share of the vectors (equation 4); a_k = exp(-10 K N_k / (1 - gamma) -
    0.001), near 1 for a codeword that is not used and 0 for one that is (equation 5); e_k <- (1 - a_k) e_k + a_k z_k with z_k its anchor,
    one of the batch's vectors (equation 6). Shares and anchors are those of all processes.
    """

    words: nn.Parameter
    usage: Tensor

    def __init__(self, method: CVQVAE) -> None:
        super().__init__("cvq-vae", method.dim, method.codes)
        self.method, shape = method, (method.codes, method.dim)
        self.centred = method.distance == "l2"  # angles are about 0
        self.words = nn.Parameter((torch.rand(shape) * 2 - 1) / method.codes)
        self.register_buffer("usage", torch.zeros(method.codes))
        if method.anchor == "random":
            self.register_buffer("pool", (torch.rand(shape) * 2 - 1) / method.codes)
            self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def move(self, scale: Tensor, offset: Tensor) -> None:
        """All codewords, and the pool of anchors, times ``scale`` plus ``offset``, scalars."""
        for words in (self.words.data, self.pool) if self.method.anchor == "random" else (self.words.data,):
            words.mul_(scale).add_(offset)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = search(x.detach(), self.words.detach(), self.method.distance)
        values = functional.embedding(codes, self.words)
        loss = self.method.commitment * mean_square(x, values.detach()) + mean_square(values, x.detach())
        if self.training and self.method.contrastive:
            loss = loss + _Contrast.apply(self.words, x.detach(), self.method.distance)
        out = straight_through(x, values.detach())
        if self.training:
            self._cluster(x.detach(), codes)
        return out, codes, loss

    @torch.no_grad()
    def _cluster(self, x: Tensor, codes: Tensor) -> None:
        settings, size = self.method, len(self.words)
        counts = torch.bincount(codes, minlength=size).double()
        total = float(add_over_processes(counts).sum())
        if total == 0:
            return
        self.usage.lerp_((counts / total).float(), 1 - settings.decay)
        share = torch.exp(-self.usage * (size * 10 / (1 - settings.decay)) - _SLACK)
        seldom = torch.nonzero(share > _NONE)[:, 0]
        anchors = self._anchors(x, seldom)
        self.words[seldom] = torch.lerp(self.words[seldom], anchors, share[seldom, None])

    def _anchors(self, x: Tensor, seldom: Tensor) -> Tensor:
        """A feature for each of these codewords, M x dim."""
        if self.method.anchor == "random":
            counts = torch.zeros(distributed.get_world_size() if together() else 1, dtype=torch.int64, device=x.device)
            counts[distributed.get_rank() if together() else 0] = len(x)
            self.filled.fill_(refill(self.pool, int(self.filled), x, add_over_processes(counts)))
            return self.pool[seldom]
        choose = closest if self.method.anchor == "closest" else by_probability
        return choose(self.words[seldom], x, self.method.distance)

    def _values(self, codes: Tensor) -> Tensor:
        return functional.embedding(codes, self.words)

    def _codes(self, values: Tensor) -> Tensor:
        # by distance with "cos" too: two codewords may have one direction; and those of one anchor are close to each other
        codes = nearest(values, self.words)
        for rows in torch.nonzero((self.words[codes] != values).any(1))[:, 0].split(_ROWS):
            codes[rows] = torch.cdist(values[rows], self.words, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        return codes


@method
class CVQVAE(VectorQuantizer):
    """Vectors become the number of their nearest codeword; codewords that are little used are moved to vectors that are.

    Latent: float, ... x ``dim``. :meth:`layer` learns by gradient and by re-anchoring; ``fit`` trains it on vectors. Stored: ceil(log2 codes) bits a
    vector. Decoding is a look-up. ``distance="l2"`` is that of the paper's equation 1, ``"cos"`` that of the authors' experiments; it finds the
    codeword of the least angle, whose length is then not the vector's. Raises :class:`tersor.InputError` for vectors of another
    dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "cvq-vae"
    bitwise = True
    codes: int = field(1024, between(1, 1 << 20), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    anchor: str = field("random", one_of("closest", "random", "probrandom"), help="which vectors codewords move to")
    distance: str = field("l2", one_of("l2", "cos"), help="l2: Euclidean; cos: the angle")
    contrastive: bool = field(False, help="also pull codewords to near vectors, away from far ones")
    decay: float = field(0.99, between(0, 0.99999), help="gamma, of the running average of usage")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    steps: int = field(1000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the codebook and of training")

    def _layer(self) -> CVQLayer:
        return CVQLayer(self)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(codes=2**bits, dim=dim)]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(
            cls(codes=12, dim=4, steps=8),
            cls(codes=250, dim=3, anchor="closest", contrastive=True, steps=4),
            cls(codes=5, dim=4, anchor="probrandom", distance="cos", steps=4),
        )
