"""Discrete Key-Value Bottleneck (Träuble, Goyal, Rahaman, Mozer, Kawaguchi, Bengio, Schölkopf, https://arxiv.org/abs/2207.11240)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from tersor import ConfigError, at_least, between, field, method, one_of
from tersor_kit_vq import (
    Quantized,
    VectorLayer,
    VectorQuantizer,
    add_over_processes,
    check_vectors,
    mean_square,
    nearest,
    together,
)

_SMOOTHING = 1e-5  # of the counts, as in the authors' code


class Keys(nn.Module):
    """C codebooks of K keys. Head c of a vector is a fixed random projection of it; its code is the nearest of codebook c's keys (section 3).

    ``projection``: (C key_dim) x dim, the rows of head c together; ``keys``: C x K x key_dim. Keys are moving averages of the heads assigned
    to them ("keys initialisation", unlabelled data, no gradient): counts n <- decay n + (1 - decay) n', and sums likewise. A key
    with less than ``expire`` of the mean count takes a head of the batch. After ``left`` batches they are frozen for good.
    """

    projection: Tensor
    keys: Tensor
    counts: Tensor
    sums: Tensor
    left: Tensor

    def __init__(
        self,
        name: str,
        dim: int,
        heads: int,
        codes: int,
        key_dim: int,
        projection: str,
        decay: float,
        expire: float,
        batches: int,
    ) -> None:
        super().__init__()
        self.name, self.dim, self.decay, self.expire = name, dim, decay, expire
        rows = torch.randn(heads * key_dim, dim)
        turned = nn.init.orthogonal_(rows.clone()) if projection == "orthogonal" else functional.normalize(rows, dim=1)
        self.register_buffer("projection", turned)
        self.register_buffer("keys", torch.randn(heads, codes, key_dim))
        self.register_buffer("counts", torch.zeros(heads, codes))
        self.register_buffer("sums", torch.zeros(heads, codes, key_dim))
        self.register_buffer("left", torch.tensor(batches))

    def freeze(self) -> None:
        """The keys never move again."""
        self.left.zero_()

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Heads, float32 N x C x key_dim, and their codes, int64 N x C, of vectors N x dim."""
        heads = functional.linear(x, self.projection).view(len(x), len(self.keys), self.keys.shape[2])
        return heads, torch.stack([nearest(heads[:, c], keys) for c, keys in enumerate(self.keys)], 1)

    @torch.no_grad()
    def learn(self, heads: Tensor, codes: Tensor) -> bool:
        """One step of the moving averages over the heads of all processes; whether the keys moved."""
        if int(self.left) == 0:
            return False
        many, size, width = self.keys.shape
        flat = (codes + torch.arange(many, device=codes.device) * size).reshape(-1)
        seen = torch.zeros(many * size, width + 1, device=heads.device)
        seen[:, 0] = torch.bincount(flat, minlength=many * size)
        seen[:, 1:].index_add_(0, flat, heads.reshape(-1, width))
        add_over_processes(seen)
        seen = seen.view(many, size, -1)
        usual = float(seen[0, :, 0].sum()) / size  # vectors of a key, on average
        if usual == 0:
            return False
        self.left -= 1
        self.counts.lerp_(seen[..., 0], 1 - self.decay)
        self.sums.lerp_(seen[..., 1:], 1 - self.decay)
        total = self.counts.sum(1, keepdim=True)
        smoothed = (self.counts + _SMOOTHING) / (total + size * _SMOOTHING) * total
        self.keys.copy_(self.sums / smoothed[..., None])
        self._replace(self.counts < self.expire * usual, heads, self.expire * usual)
        return True

    def _replace(self, dead: Tensor, heads: Tensor, count: float) -> None:
        """Dead keys become heads of the first process's batch, drawn at random."""
        book, place = torch.nonzero(dead, as_tuple=True)
        if len(book) == 0:
            return
        drawn = heads.new_zeros(len(book) * heads.shape[2] + 1)
        if len(heads):
            drawn[0] = 1
            drawn[1:] = heads[torch.randint(len(heads), (len(book),)).to(book.device), book].view(-1)
        if together():
            distributed.broadcast(drawn, 0)
        if drawn[0]:
            self.keys[book, place] = drawn[1:].view(len(book), -1)
            self.counts[book, place] = count
            self.sums[book, place] = self.keys[book, place] * count


def _retrieve(codes: Tensor, values: Tensor, size: int, combine: str, sparse: bool = False) -> Tensor:
    """The values of N x C codes, averaged over the heads or side by side. ``values``: (C size) x width, head by head."""
    places = codes + torch.arange(codes.shape[1], device=codes.device) * size
    if combine == "average":
        return functional.embedding_bag(places, values, mode="mean", sparse=sparse)
    return functional.embedding(places, values, sparse=sparse).flatten(1)


class KeyValueBottleneck(nn.Module):
    """``forward(z) -> Quantized(values, codes, loss)`` between a frozen encoder and a decoder (section 3, figure 1).

    z: float ... x dim; ``values``: ... x ``out`` averaged over heads, or ... x (C ``out``) side by side, as z's type; ``codes``: int64
    ... x C; ``loss``: 0. Only ``values`` (a parameter, (C K) x ``out``, at 0 first) learns, only chosen rows have a gradient, and
    none comes back to z. With ``out`` the number of classes and the average, the output is the logits (no decoder is left to learn).
    ``sparse``: the gradient is a torch sparse tensor, for SGD and SparseAdam. Raises :class:`tersor.InputError` as the layer.
    """

    def __init__(self, keys: Keys, out: int, combine: str, sparse: bool = False) -> None:
        super().__init__()
        self.keys, self.combine, self.sparse = keys, combine, sparse
        self.values = nn.Parameter(torch.zeros(keys.keys.shape[0] * keys.keys.shape[1], out))

    def look_up(self, codes: Tensor) -> Tensor:
        """Values, float32 ... x width, of codes ... x C."""
        found = _retrieve(codes.reshape(-1, codes.shape[-1]), self.values, self.keys.keys.shape[1], self.combine, self.sparse)
        return found.view(*codes.shape[:-1], found.shape[-1])

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            _, codes = self.keys(check_vectors(z, self.keys.dim, self.keys.name).detach())
            codes = codes.view(*z.shape[:-1], codes.shape[1])
            values = self.look_up(codes)
        return Quantized(values.to(z.dtype), codes, values.new_zeros(()))


class DKVBLayer(VectorLayer):
    """The bottleneck with values of the vectors' own dimension: codes ... x C, values ... x dim, and a loss that makes them alike.

    In training mode the keys learn for the first batches, and the values are what the keys say of the vector (the least-squares
    vector of the projections); then the keys are frozen, and the values learn by the gradient of the task and by the loss
    mean (v - sg z)^2 + ``commitment`` mean (z - sg v)^2. z has the straight-through gradient, for an encoder that still learns.

    ``invertible`` is false for an average over several heads: many choices of values may have one average.
    """

    def __init__(self, keys: Keys, combine: str, commitment: float) -> None:
        heads, codes, width = keys.keys.shape
        super().__init__("dkvb", keys.dim, [codes] * heads)
        self.keys, self.combine, self.commitment = keys, combine, commitment
        self.invertible = combine == "concat" or heads == 1
        whole = combine == "average"
        projection = keys.projection.view(1 if whole else heads, -1, keys.dim)
        back = torch.linalg.pinv(projection, rtol=0.1)  # weak directions of the projections say little
        back = back.transpose(1, 2).reshape(heads, width, keys.dim)
        # the mean over C heads is the sum of what each of them says; side by side, each says its own part
        parts = back * heads if whole else torch.stack([b.chunk(heads, 1)[c] for c, b in enumerate(back)])
        self.register_buffer("back", parts.contiguous())
        self.values = nn.Parameter(torch.zeros(heads * codes, parts.shape[2]))
        self._say()

    back: Tensor

    @torch.no_grad()
    def _say(self) -> None:
        torch.bmm(self.keys.keys, self.back, out=self.values.data.view(*self.keys.keys.shape[:2], -1))

    def bottleneck(self, out: int, sparse: bool = False) -> KeyValueBottleneck:
        """A bottleneck to ``out`` dimensions with these keys, which are frozen from now on."""
        self.keys.freeze()
        return KeyValueBottleneck(self.keys, out, self.combine, sparse)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, codes = self.keys(x.detach())
        if self.training and self.keys.learn(heads, codes):
            self._say()
        values = self._values(codes)
        loss = mean_square(values, x.detach()) + self.commitment * mean_square(x, values.detach())
        return values + (x - x.detach()), codes, loss

    def _values(self, codes: Tensor) -> Tensor:
        return _retrieve(codes, self.values, self.sizes[0], self.combine)  # type: ignore[index]

    def _codes(self, values: Tensor) -> Tensor:
        if not self.invertible:
            return super()._codes(values)
        books = self.values.view(len(self.keys.keys), -1, self.values.shape[1])
        return torch.stack([nearest(v, b) for v, b in zip(values.chunk(len(books), 1), books, strict=True)], 1)


@method
class DKVB(VectorQuantizer):
    """Vectors become the numbers of the nearest frozen keys, one for each random projection; each number stands for a learned value.

    Latent: float, ... x ``dim``. ``layer().bottleneck(out)`` is the paper's: between a frozen encoder and a decoder or classes.
    :meth:`layer` itself gives vectors of ``dim`` dimensions, as all quantizers here. ``fit`` trains it on vectors: keys first, then values. Stored:
    ``heads`` indices, together log2 codes^heads bits. The paper has 256 heads, 4096 pairs, keys of 12 to 14 dimensions, decay 0.95 and ``expire`` 0.1. Raises
    :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape,
    :class:`tersor.ConfigError` where dimensions side by side are no multiple of the heads.
    """

    name = "dkvb"
    codes: int = field(64, between(1, 1 << 20), help="keys of a head")
    heads: int = field(2, between(1, 1 << 10), help="projections, each with its codebook")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    key_dim: int = field(0, between(0, 1 << 14), help="dimensions of a key; 0: dim / heads, rounded up")
    projection: str = field(
        "gaussian", one_of("gaussian", "orthogonal"), help="random rows of unit length, or at right angles too"
    )
    combine: str = field("average", one_of("average", "concat"), help="of the heads' values")
    decay: float = field(0.95, between(0, 1), help="of the keys' moving averages")
    expire: float = field(0.1, between(0, 1), help="share of the mean count below which a key is replaced")
    key_steps: int = field(500, at_least(1), help="training batches after which the keys are frozen")
    commitment: float = field(0.25, between(0, 1e6), help="weight of the commitment loss of the layer")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the projections and of training")

    def __attrs_post_init__(self) -> None:
        if self.combine == "concat" and self.dim % self.heads:
            raise ConfigError(f"dkvb: combine='concat' takes a dim that is a multiple of heads={self.heads}; given: {self.dim}")

    def _layer(self) -> DKVBLayer:
        width = self.key_dim or -(-self.dim // self.heads)
        keys = Keys(self.name, self.dim, self.heads, self.codes, width, self.projection, self.decay, self.expire, self.key_steps)
        return DKVBLayer(keys, self.combine, self.commitment)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """One head, and two (with the nearest number of codes)."""
        return [cls(codes=round(2 ** (bits / c)), heads=c, dim=dim, projection="orthogonal") for c in (1, 2)]

    @classmethod
    def examples(cls) -> list[Self]:
        side = cls(codes=5, heads=2, dim=4, combine="concat", projection="orthogonal", key_steps=4, steps=8)
        return cls._fitted(cls(codes=6, heads=3, dim=4, key_steps=4, steps=8), side)
