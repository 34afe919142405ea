"""The convolutional autoencoder that image quantizers are trained in, and its training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor import InputError
from tersor_kit_vq.codebook import Quantized

FACTOR = 4  # pixels of a latent vector's side


class Residual(nn.Module):
    """x + conv 1x1 (relu (conv 3x3 (relu x)))."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.relu(self.first(functional.relu(x))))


class Autoencoder(nn.Module):
    """Two convolutions 4 x 4 of stride 2 and two residual blocks in, the mirror image out (van den Oord et al.,
    https://arxiv.org/abs/1711.00937, section 4.1); the paper has 256 hidden units, ``width`` here.

    Images: float N x 3 x H x W in [0, 1], H and W multiples of 4; latents: N x H/4 x W/4 x dim.
    """

    def __init__(self, dim: int = 64, width: int = 64, inner: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1),
            Residual(width, inner), Residual(width, inner), nn.ReLU(), nn.Conv2d(width, dim, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, 1, 1), Residual(width, inner), Residual(width, inner), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1),
        )  # fmt: skip

    def encode(self, images: Tensor) -> Tensor:
        """Latents, N x H/4 x W/4 x dim."""
        return self.encoder(images - 0.5).movedim(1, -1)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Images, N x 3 x H x W, not cut to [0, 1]."""
        return self.decoder(latents.movedim(-1, 1)) + 0.5  # type: ignore[no-any-return]


def three_channels(image: Tensor, who: str) -> Tensor:
    """An image of 1 or 3 channels as one of 3. Raises :class:`tersor.InputError` for other numbers of channels."""
    if image.shape[0] not in (1, 3):
        raise InputError(f"{who} takes images of 1 or 3 channels; given: {image.shape[0]}")
    return image.expand(3, *image.shape[1:])


def padded(image: Tensor) -> Tensor:
    """3 x H x W with the last row and column repeated up to multiples of 4."""
    height, width = image.shape[1:]
    return functional.pad(image[None], (0, -width % FACTOR, 0, -height % FACTOR), mode="replicate")[0]


def crops(images: Sequence[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """``count`` random squares, N x 3 x size x size, of images 3 x H x W, each chosen in proportion to its area; turned over, some
    with their channels exchanged, one in four taken from twice the side. Smaller images are repeated at the border."""

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    # none counts for more than 512 x 512
    areas = torch.tensor([float(i.shape[1] * i.shape[2]) for i in images]).clamp(max=2.0**18)
    out = torch.empty(count, 3, size, size)
    for n in range(count):
        image = images[int(torch.multinomial(areas, 1, generator=generator))]
        side = 2 * size if draw(4) == 0 and min(image.shape[1:]) >= 2 * size else size
        if min(image.shape[1:]) < side:
            image = functional.pad(
                image[None], (0, max(0, side - image.shape[2]), 0, max(0, side - image.shape[1])), mode="replicate"
            )[0]
        y, x = draw(image.shape[1] - side + 1), draw(image.shape[2] - side + 1)
        part = image[:, y : y + side, x : x + side]
        if side != size:
            part = functional.avg_pool2d(part, 2)
        if draw(2):
            part = part.flip(2)
        if draw(2):
            part = part.transpose(1, 2)
        if draw(4) == 0:
            part = part[torch.randperm(3, generator=generator)]
        out[n] = part
    return out


def train(
    network: Autoencoder,
    quantize: Callable[[Tensor], Quantized],
    parameters: Iterable[nn.Parameter],
    images: Sequence[Tensor],
    steps: Iterable[float],
    seed: int = 0,
    batch: int = 16,
    size: int = 64,
    rate: float = 1e-3,
) -> list[float]:
    """Train autoencoder and quantizer together: mean squared error divided by the variance of the
    images (as the authors' code does), plus the quantizer's loss. ``steps``: the fraction of training done, 0 to 1, one for each step; the learning
    rate falls to nothing by half a cosine. Gives the squared error of each step.
    """
    generator = torch.Generator().manual_seed(seed)
    variance = float(torch.cat([i.reshape(-1) for i in images]).var()) or 1.0
    chosen = [*network.parameters(), *parameters]
    optimizer = torch.optim.Adam(chosen, rate, betas=(0.9, 0.99))
    errors = []
    for done in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate * float(0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * done)))
        x = crops(images, batch, size, generator)
        quantized = quantize(network.encode(x))
        error = functional.mse_loss(network.decode(quantized.values), x)
        optimizer.zero_grad(set_to_none=True)
        (error / variance + quantized.loss).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        errors.append(float(error.detach()))
    return errors
