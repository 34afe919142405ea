"""SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer (Chen et al., https://arxiv.org/abs/2412.10958)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import ConfigError, at_least, between, field, method, positive
from tersor_kit_vq import VectorLayer, VectorQuantizer, check_vectors, likeliest, nearest, posterior


class SoftVQLayer(VectorLayer):
    """In training the values are p C, an average of all codewords by the probabilities p = softmax(-|z - C|^2 / tau), the paper's soft
    categorical posterior; in evaluation they are what is stored: the ``kept`` likeliest codewords, averaged by rounded weights.

    Codes: int64 N for ``kept`` 1, else N x (2 kept - 1): the codewords, likeliest first, then for each but the first its probability
    relative to the first's, in steps of 1 / (2^weight_bits - 1).

    ``invertible`` is False for ``kept`` above 1: different codewords with different weights have the same average, or nearly, so that
    values do not tell their codes.
    """

    def __init__(self, codes: int, dim: int, kept: int, weight_bits: int, temperature: float, sharpness: float, normalize: bool,
                 entropy: float) -> None:  # fmt: skip
        super().__init__("softvq", dim, codes if kept == 1 else (codes,) * kept + (2**weight_bits,) * (kept - 1))
        self.kept, self.levels, self.invertible = kept, 2**weight_bits - 1, kept == 1
        self.temperature, self.sharpness, self.normalize, self.entropy = temperature, sharpness, normalize, entropy
        self.codebook = nn.Parameter((torch.rand(codes, dim) * 2 - 1) / codes)

    @property
    def words(self) -> Tensor:
        """The codewords as they are averaged, K x dim: of length 1 with ``normalize``."""
        return functional.normalize(self.codebook, dim=1) if self.normalize else self.codebook

    def _logits(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Vectors, keys and bias with -|z - C|^2 / tau as product and sum, up to a constant of each vector; of unit vectors the authors'
        code has the cosine, half of that. No gradient goes to the keys, as in the authors' code: codewords learn as what is averaged."""
        keys = words.detach()
        if self.normalize:
            return functional.normalize(x, dim=1) / self.temperature, keys, None
        return x * (2 / self.temperature), keys, keys.square().sum(1) / -self.temperature

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        words = self.words
        z, keys, bias = self._logits(x, words)
        if not self.training:
            codes = self._kept(z, keys, bias)
            return self._values(codes), codes, x.new_zeros(())
        q = posterior(z, keys, words, bias, sharpness=self.sharpness if self.entropy else 0.0, epsilon=1e-6)
        codes = q.codes if self.kept == 1 else self._kept(z, keys, bias)
        # the divergence of p from a uniform prior: sharp for each vector, uniform over all of them
        return q.values, codes, self.entropy * (q.sample_entropy - q.mean_entropy)

    def _kept(self, z: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
        chosen, ratios = likeliest(z.detach(), keys, bias, self.kept)
        return torch.cat([chosen, (ratios[:, 1:] * self.levels).round().long()], 1) if self.kept > 1 else chosen[:, 0]

    def _values(self, codes: Tensor) -> Tensor:
        words = self.words
        if self.kept == 1:
            return words[codes]
        weights = codes[:, self.kept :].float() / self.levels
        total = words[codes[:, 0]]
        for i in range(1, self.kept):
            total = total + weights[:, i - 1, None] * words[codes[:, i]]
        return total / (1 + weights.sum(1, keepdim=True))

    def _codes(self, values: Tensor) -> Tensor:
        return nearest(values, self.words) if self.kept == 1 else super()._codes(values)

    @torch.no_grad()
    def soft(self, z: Tensor) -> Tensor:
        """The whole average p C, float32 of the shape of ``z``: the continuous token of which nothing was left out. Raises as forward."""
        words = self.words
        x, keys, bias = self._logits(check_vectors(z, self.dim, self.name), words)
        return posterior(x, keys, words, bias).values.view(z.shape)


@method
class SoftVQ(VectorQuantizer):
    """Vectors become averages of codewords, weighted by a softmax of how near they are; stored are the likeliest few and their weights.

    Latent: float, ... x ``dim``. :meth:`layer` trains with the whole average, which is differentiable as it is, by gradients alone;
    ``fit`` trains it on vectors. Stored: ``kept`` codewords a vector and ``weight_bits`` bits for each but the first; the paper's tokens
    stay continuous and are never stored. Cosines, ``temperature`` 0.07, the start from a uniform distribution and the weight 0.01 of the entropies,
    whose own temperature is 0.01, are those of the authors' code; ``normalize`` = False has the paper's distances instead.
    Probabilities are made in tiles and again in the backward pass: memory does not grow with vectors x codes. Entropies are those of each process.
    Raises :class:`tersor.InputError` for vectors of another dimension, :class:`tersor.StateError` for a state of another shape.
    """

    name = "softvq"
    codes: int = field(1024, between(2, 1 << 20), help="codewords; the average of one would not depend on the vector")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    kept: int = field(4, between(1, 64), help="codewords that are stored for a vector")
    weight_bits: int = field(4, between(1, 16), help="bits of a stored weight")
    temperature: float = field(0.07, positive, help="tau, of the softmax")
    normalize: bool = field(True, help="vectors and codewords have length 1")
    entropy: float = field(0.01, between(0, 1e6), help="weight of the divergence from a uniform prior; 0: none")
    entropy_temperature: float = field(0.01, positive, help="of the probabilities in the divergence")
    steps: int = field(2000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of the codebook and of training")

    def __attrs_post_init__(self) -> None:
        if self.kept > self.codes:
            raise ConfigError(f"softvq: kept is at most codes={self.codes}; given: {self.kept}")

    def _layer(self) -> SoftVQLayer:
        sharpness = self.temperature / self.entropy_temperature
        return SoftVQLayer(self.codes, self.dim, self.kept, self.weight_bits, self.temperature, sharpness, self.normalize,
                           self.entropy)  # fmt: skip

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """One codeword a vector, and, of 4 bits or more, two of a smaller codebook with a weight."""
        small = (bits - 2) // 2
        pair = [cls(codes=2**small, dim=dim, kept=2, weight_bits=bits - 2 * small)] if small >= 1 else []
        return [cls(codes=2**bits, dim=dim, kept=1), *pair]

    @classmethod
    def examples(cls) -> list[Self]:
        return cls._fitted(cls(codes=12, dim=4, kept=3, steps=8), cls(codes=2, dim=3, kept=1, steps=2),
                           cls(codes=9, dim=3, kept=1, normalize=False, steps=4))  # fmt: skip
