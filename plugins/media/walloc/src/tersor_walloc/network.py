"""The asymmetric autoencoder: one 1x1 projection and a companding curve to encode, a residual network to decode."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor_walloc.wavelet import analysis, synthesis

LIMIT = 127  # latents are 8-bit integers in -127..127
HALF = LIMIT + 0.5 - 1e-3  # the companding curve ends just short of the next integer
SPREAD = LIMIT / 1.85  # standard deviation of the Gaussian whose distribution function is the curve
QUALITIES, RATIO = 8, 0.78  # qualities 1..8; the quantization step shrinks by RATIO from one to the next


def compress(z: Tensor) -> Tensor:
    """The companding curve: the Gaussian distribution function, stretched to (-HALF, HALF). Slope 1.48 at zero."""
    return HALF * torch.erf(z * (1 / (SPREAD * 2**0.5)))


def expand(y: Tensor) -> Tensor:
    """The inverse of `compress` (its argument clipped just inside the open interval)."""
    return SPREAD * 2**0.5 * torch.erfinv((y * (1 / HALF)).clamp(-0.9998, 0.9998))


class Residual(nn.Module):
    def __init__(self, width: int, conv: type[nn.Module]) -> None:
        super().__init__()
        self.first = conv(width, width, 3, padding=1)
        self.second = conv(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.silu(self.first(functional.silu(x))))


class Network(nn.Module):
    """samples <-> integer latents, both directions differentiable.

    `axes` is 2 for images and 1 for audio, `bands = channels * 2**(levels * axes)` the number of wavelet packet coefficients at
    one latent position. `log_step` holds one row of step sizes for each quality, so one network serves eight rates.
    """

    def __init__(self, axes: int, channels: int, levels: int, latents: int, width: int, blocks: int) -> None:
        super().__init__()
        conv = nn.Conv2d if axes == 2 else nn.Conv1d
        self.levels, self.axes = levels, axes
        bands = channels * 2 ** (levels * axes)
        self.project = conv(bands, latents, 1)
        self.log_step = nn.Parameter((math.log(RATIO) * torch.arange(QUALITIES, dtype=torch.float32))[:, None].repeat(1, latents))
        self.register_buffer("deviation", torch.ones(latents))
        self.linear = conv(latents, bands, 1)
        self.enter = conv(latents + 1, width, 1)
        self.blocks = nn.Sequential(*(Residual(width, conv) for _ in range(blocks)))
        self.leave = conv(width, bands, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def _steps(self, quality: Tensor) -> Tensor:
        """The step of each latent channel: batch x latents x 1 (x 1), for a batch of qualities 1..8."""
        return self.log_step[quality - 1].exp().reshape(len(quality), -1, *(1,) * self.axes)

    def encode(self, x: Tensor, quality: Tensor) -> Tensor:
        """Real-valued latents before rounding; everything here is linear except the companding curve."""
        return compress(self.project(analysis(x - 0.5 if self.axes == 2 else x, self.levels)) / self._steps(quality))

    def decode(self, y: Tensor, quality: Tensor) -> Tensor:
        z = expand(y) * self._steps(quality)
        hint = ((quality - 4.5) / 4).to(z.dtype).reshape(-1, 1, *(1,) * self.axes).expand(-1, 1, *z.shape[2:])
        deep = self.enter(torch.cat((z / self.deviation.reshape(-1, *(1,) * self.axes), hint), 1))
        x = synthesis(self.linear(z) + self.leave(self.blocks(deep)), self.levels)
        return x + 0.5 if self.axes == 2 else x

    @torch.no_grad()
    def start_linear(self, coefficients: Tensor) -> None:
        """Begin as a linear transform codec: project on the principal components of the coefficients (samples x bands), with
        steps that leave quality 1 little more than the strongest components."""
        mean = coefficients.mean(0)
        _, _, basis = torch.linalg.svd(coefficients[torch.randperm(len(coefficients))[:20000]] - mean, full_matrices=False)
        basis = basis[: self.project.weight.shape[0]]
        self.project.weight.copy_(basis.reshape(self.project.weight.shape))
        self.project.bias.copy_(-basis @ mean)
        self.linear.weight.copy_(basis.T.reshape(self.linear.weight.shape))
        self.linear.bias.copy_(mean)
        self.deviation.copy_(((coefficients - mean) @ basis.T).std(0).clamp_min(1e-4))
        power = (coefficients - mean).square().mean().sqrt().clamp_min(1e-4)
        self.log_step += torch.log(1.1 * power * (basis.shape[1] / basis.shape[0]) ** 0.5)


class Rate(nn.Module):
    """A differentiable stand-in for the entropy coder, used in training only: each latent is logistic around a linear prediction
    from its direct neighbours and from the earlier channels at its own position, with a scale predicted from their magnitudes."""

    def __init__(self, axes: int, latents: int) -> None:
        super().__init__()
        conv = nn.Conv2d if axes == 2 else nn.Conv1d
        self.mean = conv(2 * axes * latents, latents, 1, bias=False)
        self.scale = conv(2 * axes * latents, latents, 1)
        self.mean_before = nn.Parameter(torch.zeros(latents, latents))
        self.scale_before = nn.Parameter(torch.zeros(latents, latents))
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.scale.weight)
        with torch.no_grad():
            for axis in range(2 * axes):  # start: own channel's neighbours
                block = self.scale.weight[:, axis * latents : (axis + 1) * latents].flatten(1)
                block.add_(0.5 / (2 * axes) * torch.eye(latents))
        nn.init.constant_(self.scale.bias, 0.3)

    def forward(self, y: Tensor) -> Tensor:
        """bits of each latent (same shape)."""
        axes = y.ndim - 2
        padded = functional.pad(y, (1, 1) * axes, mode="replicate")
        near = []
        for axis in range(2, y.ndim):
            for offset in (0, 2):
                view = padded
                for other in range(2, y.ndim):
                    view = view.narrow(other, offset if other == axis else 1, y.shape[other])
                near.append(view)
        neighbours = torch.cat(near, 1)
        mean = self.mean(neighbours) + torch.einsum("ij,bj...->bi...", self.mean_before.tril(-1), y)
        scale = self.scale(neighbours.abs()) + torch.einsum("ij,bj...->bi...", self.scale_before.tril(-1), y.abs())
        scale = functional.softplus(scale * 4) / 4 + 0.05
        distance = (y - mean).abs()
        mass = torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale)
        return -torch.log2(mass.clamp_min(1e-9)) + 0.01 * torch.relu(distance / scale - 20)
