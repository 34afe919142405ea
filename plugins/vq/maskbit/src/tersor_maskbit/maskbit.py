"""MaskBit: Embedding-free Image Generation via Bit Tokens (Weber et al., https://arxiv.org/abs/2409.16211)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from tersor import ConfigError, InputError, MissingStateError, StateError, at_least, between, field, method, positive, track
from tersor_kit_vq import (
    BitLayer,
    VectorQuantizer,
    bit_groups,
    codebook_entropy,
    mean_square,
    straight_through,
    token_entropy,
)
from tersor_maskbit.generator import BitGenerator


class MaskBitLayer(BitLayer):
    """Lookup-free quantization (section 3): each of L dimensions of ``project_in`` (z) becomes its sign, and the signs go out by ``project_out``.

    The soft code, softmax over all sign vectors c of 2 z . c / ``temperature``, is a product over the bits, with log odds
    4 z_d / ``temperature``. ``loss``: ``commitment`` times mean (sign(z) - z)^2 plus ``entropy`` times (mean token entropy - ``gamma`` codebook
    entropy), in nats; the codebook entropy is that over all 2^L codes up to L = ``group``. Codes and inversion: see ``BitLayer``.
    """

    def __init__(
        self, bits: int, dim: int, group: int, temperature: float, entropy: float, gamma: float, commitment: float
    ) -> None:
        super().__init__("maskbit", bits, dim, group)
        self.temperature, self.entropy, self.gamma, self.commitment = temperature, entropy, gamma, commitment

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.project_in(x)
        bits = z.detach() > 0
        signs = self.corners(bits)
        odds = z * (4 / self.temperature)
        penalty = token_entropy(odds) - self.gamma * codebook_entropy(odds, self.groups, shared=self.training)
        loss = self.commitment * mean_square(z, signs) + self.entropy * penalty
        return self.project_out(straight_through(z, signs)), self.integers(bits), loss


@method
class MaskBit(VectorQuantizer):
    """Vectors become bits, the signs of ``bits`` dimensions; a masked transformer that takes these bits as its input makes new grids of them.

    Latent: float, ... x ``dim``. Stored: ``bits`` bits a vector. ``fit`` trains the layer on vectors alone, :meth:`with_layer` takes one
    out of a network; then :meth:`fit_generator` learns grids of codes (section 4) and :meth:`sample` draws new ones. Quantizing needs no generator.
    Defaults are the authors' for 14 bits, but for the generator's size (24 blocks of width 1024 there).
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "maskbit"
    beside = ("generator.",)
    bits: int = field(14, between(1, 64), help="bits of a vector")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    group: int = field(18, between(1, 20), help="bits up to which the codebook entropy is over all codes; groups of them beyond")
    entropy: float = field(0.02, between(0, 1e6), help="weight of the entropy loss")
    gamma: float = field(1.0, between(0, 1e6), help="of the codebook entropy against the token entropy")
    temperature: float = field(0.01, positive, help="of the soft codes")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    groups: int = field(2, between(1, 64), help="generator: groups of a token's bits that are masked and predicted apart")
    width: int = field(128, between(1, 1 << 14), help="generator: width of the transformer")
    depth: int = field(4, between(1, 256), help="generator: blocks of the transformer")
    heads: int = field(4, between(1, 256), help="generator: heads of attention")
    classes: int = field(0, between(0, 1 << 20), help="generator: number of labels that condition it")
    embedding: bool = field(False, help="generator: learned embeddings of groups in place of the bits, for comparison")
    steps: int = field(2000, at_least(1), help="training steps (for fit, and for fit_generator)")
    seed: int = field(0, at_least(0), help="of initial weights and of training")

    def __attrs_post_init__(self) -> None:
        if self.groups > self.bits or -(-self.bits // self.groups) > 16:
            raise ConfigError(f"maskbit: groups={self.groups} of bits={self.bits}; allowed: groups of 1 to 16 bits")
        if self.width % self.heads:
            raise ConfigError(f"maskbit: width={self.width} is no multiple of heads={self.heads}")

    def _layer(self) -> MaskBitLayer:
        return MaskBitLayer(self.bits, self.dim, self.group, self.temperature, self.entropy, self.gamma, self.commitment)

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        return [cls(bits=bits, dim=dim)]

    # -- the generator

    def _build(self, places: int) -> BitGenerator:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            runs = bit_groups(self.bits, -(-self.bits // self.groups))
            return BitGenerator(runs, places, self.width, self.depth, self.heads, self.classes, self.embedding)

    def _tokens(self, codes: Tensor) -> Tensor:
        """Grids of codes as bits, bool N x places x L."""
        layer, several = self._trained, not isinstance(self._trained.sizes, int)
        if codes.is_floating_point() or codes.ndim != 3 + several or codes.numel() == 0:
            raise InputError(
                f"maskbit: grids of codes are int64 N x H x W{' x n' if several else ''}; given: {str(codes.dtype)[6:]} of shape "
                f"{tuple(codes.shape)}"
            )
        layer.codes_to_values(codes)  # refuses what is no code
        return layer.code_bits(codes.flatten(0, 2)).view(len(codes), -1, self.bits)

    def _checked(self, labels: Tensor | None, count: int) -> Tensor | None:
        if labels is None:
            return None
        if not self.classes or labels.shape != (count,) or bool(((labels < 0) | (labels >= self.classes)).any()):
            raise InputError(
                f"maskbit: labels are int64 of shape ({count},) below classes={self.classes}; given: {tuple(labels.shape)}"
            )
        return labels.long()

    def fit_generator(
        self, codes: Tensor, labels: Tensor | None = None, batch: int = 32, rate: float = 1e-3, smoothing: float = 0.1
    ) -> Self:
        """A copy whose state has a generator of grids like ``codes`` (int64 N x H x W, or x n), trained by ``steps`` steps of AdamW on the
        masked groups, with label ``smoothing``. ``labels``: int64 N, dropped one time in ten. Raises :class:`tersor.InputError`."""
        tokens, labels = self._tokens(codes), self._checked(labels, len(codes))
        network, generator = self._build(tokens.shape[1]).train(), torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.96), weight_decay=0.045)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            for step in track(range(self.steps), "training the generator of maskbit"):
                for group in optimizer.param_groups:
                    warm = min(1.0, (step + 1) / max(1, self.steps // 20))
                    group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
                chosen = torch.randint(len(tokens), (min(batch, len(tokens)),), generator=generator)
                known = None
                if labels is not None:
                    dropped = torch.rand(len(chosen), generator=generator) < 0.1
                    known = labels[chosen].masked_fill(dropped, self.classes)
                total, count = network.loss(tokens[chosen], generator, smoothing, known)
                optimizer.zero_grad(set_to_none=True)
                (total / count.clamp(min=1)).backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
        state = {k: v for k, v in self.state.items() if not k.startswith(self.beside)}
        state |= {f"generator.{k}": v.detach().clone() for k, v in network.state_dict().items()}
        return self.with_state(state | {"generator.grid": torch.tensor(codes.shape[1:3])})

    @functools.cached_property
    def _generator(self) -> tuple[BitGenerator, tuple[int, int]]:
        weights = {k.removeprefix("generator."): v for k, v in self.state.items() if k.startswith("generator.")}
        if "grid" not in weights:
            raise MissingStateError("maskbit: the state has no generator; use .fit_generator(codes)")
        grid = weights.pop("grid").tolist()
        network = self._build(grid[0] * grid[1]).eval().requires_grad_(False)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise StateError(f"maskbit: {self} has another generator than the state ({error})") from error
        return network, (grid[0], grid[1])

    @torch.no_grad()
    def cross_entropy(self, codes: Tensor, seed: int = 0, rounds: int = 8) -> float:
        """Bits a masked group that the generator needs for grids of codes, their masks drawn by the schedule ``rounds`` times."""
        network, grid = self._generator
        tokens = self._tokens(codes)
        if tuple(codes.shape[1:3]) != grid:
            raise InputError(f"maskbit: the generator makes grids of {grid}; given: {tuple(codes.shape[1:3])}")
        generator, total, count = torch.Generator().manual_seed(seed), 0.0, 0
        for _ in range(rounds):
            for part in tokens.split(64):
                nats, masked = network.loss(part, generator, smoothing=0.0)
                total, count = total + float(nats), count + int(masked)
        return total / max(count, 1) / math.log(2)

    def sample(
        self, shape: Sequence[int], steps: int = 16, seed: int = 0, labels: Tensor | None = None, guidance: float = 0.0,
        randomness: float = 7.8,
    ) -> Tensor:  # fmt: skip
        """New grids of codes: ``shape`` N, H, W gives int64 N x H x W (x n), in ``steps`` steps; ``layer(fitted=True).codes_to_values`` makes latents
        of them. ``guidance``: classifier-free, for ``labels`` (int64 N). The same seed gives the same grids on one machine.
        Raises :class:`tersor.InputError` for a grid that the generator was not trained for."""
        network, grid = self._generator
        if len(shape) != 3 or tuple(shape[1:]) != grid or shape[0] < 0 or steps < 1:
            raise InputError(
                f"maskbit: the generator makes N x {grid[0]} x {grid[1]} in 1 step or more; given: {tuple(shape)}, {steps}"
            )
        generator, labels = torch.Generator().manual_seed(seed), self._checked(labels, shape[0])
        layer = self._trained
        tokens = (
            network.sample(shape[0], steps, generator, labels, guidance, randomness) if shape[0] else torch.zeros(0, self.bits)
        )
        codes = layer.integers(tokens.reshape(-1, self.bits).bool())
        return codes.view(*shape, *codes.shape[1:])

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(bits=4, dim=5, steps=8), cls(bits=40, groups=4, dim=3, steps=2))
