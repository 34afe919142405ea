"""Training: the rate-distortion loop that `WaLLoC.fit` runs, on the user's own samples.

First two thirds: rounding is replaced by uniform noise, and everything learns to minimise `bits + squared error / lambda` for all
qualities at once (each sample of a batch draws one). Last third: the encoder is frozen and the decoder learns from latents that
are really rounded. Then the integer tables of the entropy coder are fitted to the latents of the samples.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from tersor_walloc.coder import fit_coder
from tersor_walloc.network import QUALITIES, Network, Rate
from tersor_walloc.wavelet import analysis

BATCH, RATE, NOISE_SHARE = 12, 6e-4, 0.67
LAGRANGE = 0.134  # a bit must save 0.134 step**2 of squared error: the trade of the H.264 reference encoder


def patches(samples: list[Tensor], size: int, count: int, generator: np.random.Generator) -> Tensor:
    """`count` random excerpts, of each pair drawn the livelier one; images flipped and turned, audio at a random volume."""
    weights = np.array([min(s[0].numel(), 400_000 if s.ndim == 3 else 10_000_000) for s in samples], float)
    out = []
    for _ in range(count):
        best, most = None, -1.0
        for choice in generator.choice(len(samples), 2, p=weights / weights.sum()):
            x = samples[choice]
            for axis in range(1, x.ndim):
                start = int(generator.integers(max(x.shape[axis] - size, 0) + 1))
                x = x.narrow(axis, start, min(size, x.shape[axis]))
                last = x.shape[axis] - 1
                x = x.index_select(axis, torch.arange(size).clamp_max(last)) if last + 1 < size else x
            life = float(x.diff(dim=1 if x.ndim == 3 else -1).abs().mean())
            if life > most:
                best, most = x, life
        if best.ndim == 3:
            best = best.flip(2) if generator.random() < 0.5 else best
            best = best.transpose(1, 2) if generator.random() < 0.25 else best
        else:
            best = best.flip(0) * float(generator.uniform(0.3, 1.0)) if generator.random() < 0.5 else best
        out.append(best)
    return torch.stack(out)


def fit_network(
    samples: list[Tensor],
    levels: int,
    latents: int,
    width: int,
    blocks: int,
    clock: Iterable[float],
    seed: int = 0,
    start: dict[str, Tensor] | None = None,
    report: Callable[..., None] | None = None,
) -> dict[str, Tensor]:
    """Train on samples of one domain (C x H x W or C x n). `clock` yields the fraction of the training that is over, one value
    for each step; `start` a state whose decoder is to be trained on. Returns the state: float16 weights of the network, integer
    tables of the coder."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    axes, channels = samples[0].ndim - 1, len(samples[0])
    size = (16 if axes == 2 else 64) * 2**levels
    network, rate = Network(axes, channels, levels, latents, width, blocks), Rate(axes, latents)
    centred = patches(samples, size, 150, generator) - (0.5 if axes == 2 else 0.0)
    network.start_linear(analysis(centred, levels).transpose(0, 1).flatten(1).T)
    trade = LAGRANGE * network.log_step.detach()[:, 0].exp().square()
    if start is not None:
        network.load_state_dict({key[4:]: value.float() for key, value in start.items() if key.startswith("net.")})
    weight = (trade / trade[QUALITIES // 2]).sqrt()
    encoder = [*network.project.parameters(), network.log_step, *rate.parameters()]
    groups = [{"params": [network.log_step]}, {"params": rate.parameters()}]
    rates = [2 * RATE, 3 * RATE, RATE]
    groups.append({"params": [p for name, p in network.named_parameters() if name != "log_step"]})
    optimizer = torch.optim.Adam(groups, lr=RATE, betas=(0.9, 0.99))
    for step, over in enumerate(clock):
        noisy = over < NOISE_SHARE and start is None
        for parameter in encoder:
            parameter.requires_grad_(noisy)
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * (min(1.0, 0.01 + 20 * over) * (0.5 + 0.5 * math.cos(math.pi * min(over, 1.0))) + 2e-3)
        x = patches(samples, size, BATCH, generator)
        quality = torch.from_numpy(generator.integers(1, QUALITIES + 1, BATCH))
        y = network.encode(x, quality)
        y = y + torch.rand_like(y) - 0.5 if noisy else torch.round(y)
        error = (network.decode(y, quality) - x).square().flatten(1).sum(1)
        bits = rate(y).flatten(1).sum(1)
        loss = (weight[quality - 1] * (error / trade[quality - 1] + bits * noisy)).mean() / size**axes
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        if report is not None:
            report(step, over, float(loss.detach()), quality, bits.detach() / size**axes, error.detach() / x[0].numel())
    state = {f"net.{key}": value.detach().to(torch.float16) for key, value in network.state_dict().items()}
    network.load_state_dict({key[4:]: value.float() for key, value in state.items()})
    return state | fit_coder(list(_latents(network, samples, generator)), axes, seed=seed)


@torch.no_grad()
def _latents(network: Network, samples: list[Tensor], generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Rounded latents of (excerpts of) the samples at random qualities."""
    unit = 2**network.levels
    largest = 640 if network.axes == 2 else 2**20
    for x in samples:
        for axis in range(1, x.ndim):
            x = x.narrow(axis, 0, min(x.shape[axis] // unit * unit or x.shape[axis], largest))
        if min(x.shape[1:]) < unit:
            continue
        for quality in generator.choice(QUALITIES, 2, replace=False) + 1:
            y = torch.round(network.encode(x[None], torch.tensor([int(quality)])))[0]
            yield y.reshape(len(y), -1, y.shape[-1]).to(torch.int8).numpy()
