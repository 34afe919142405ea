"""WaLLoC: wavelet packets, a linear encoder to few 8-bit latents, entropy coding, a deep decoder."""

from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tersor import Codec, InputError, MissingStateError, Spec, StateError, at_least, between, field, method, track
from tersor_walloc.coder import LatentCoder
from tersor_walloc.network import Network
from tersor_walloc.training import fit_network

AXES = {"image": 2, "audio": 1}
LEVELS = {"image": 3, "audio": 8}  # the paper's depths of the wavelet packet transform
LATENTS = {"image": 12, "audio": 108}  # the paper's latent channels: 192 / 12 = 16x for RGB, 512 / 108 = 4.7x for stereo


@method
class WaLLoC(Codec):
    """Wavelet learned lossy compression of images and audio.

    Encoding: J levels of the CDF 9/7 wavelet packet transform turn C channels into C * 2**(J * axes) bands at one low sampling
    rate; a 1x1 projection keeps `latent_channels` of them; a Gaussian companding curve (8-bit range) and rounding give integers,
    which a range coder writes with integer tables. Decoding: the inverse curve, a residual network, the inverse transform. So
    every input has exactly the same fraction of latents to samples (RGB image: 12/192), whatever its content.

    Takes float32 C x H x W images in [0, 1] and float32 channels x samples audio in [-1, 1], any size from one sample up
    (extended at the borders to a multiple of 2**J, cut back after decoding). C is that of the state (the shipped ones: 3 for
    images, 2 for audio) or 1, which is repeated over the state's channels.

    The latent decodes bit-exactly on every machine; the network's float output may differ in its last bits (`bitwise` is False).

    Raises `tersor.InputError` for another number of channels, `tersor.MissingStateError` for a domain that the state was not
    fitted on, `tersor.StateError` for a state of another configuration.

    Source: Jacobellis and Yadwadkar, "Learned Compression for Compressed Learning", DCC 2025,
    https://arxiv.org/abs/2412.09405 (J, latent channels and the 8-bit companding curve as there). Beyond the paper: a rate term
    and eight trained step sizes (`quality`), so that one state gives eight rates, and a context model in integer arithmetic in
    place of a lossless image file for the latents.
    """

    name = "walloc"
    domains = ("image", "audio")
    native = "torch"
    bitwise = False
    fitted = True

    quality: int = field(6, between(1, 8), help="rate: 1 (fewest bits) to 8, one trained set of step sizes each")
    latent_channels: int | None = field(None, between(1, 1024), help="channels of the latent; none: 12 (image), 108 (audio)")
    levels: int | None = field(None, between(1, 10), help="J, levels of the wavelet packets; none: 3 (image), 8 (audio)")
    width: int = field(96, between(4, 1024), help="channels of the decoder network (for fit)")
    blocks: int = field(4, between(1, 64), help="residual blocks of the decoder network (for fit)")
    steps: int = field(4000, at_least(1), help="training steps (for fit)")

    def _default_state(self) -> Path | None:
        name = {None: "default.safetensors", 48: "image48.safetensors"}.get(self.latent_channels)
        return Path(__file__).parent / "states" / name if name and self.levels is None else None

    def _shape(self, domain: str) -> tuple[int, int]:
        return self.levels or LEVELS[domain], self.latent_channels or LATENTS[domain]

    def _fit(self, samples: list[Tensor]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for domain, axes in AXES.items():
            chosen = [s for s in samples if s.ndim == axes + 1]
            if len(given := sorted({len(s) for s in chosen})) > 1:
                raise InputError(f"walloc: fit takes {domain} samples of one number of channels; given: {given}")
            if chosen:
                clock = (step / self.steps for step in track(range(self.steps), f"training walloc ({domain})"))
                part = fit_network(chosen, *self._shape(domain), self.width, self.blocks, clock)
                state |= {f"{domain}.{key}": value for key, value in part.items()}
        return state

    @cached_property
    def _models(self) -> dict[str, tuple[Network, LatentCoder]]:
        """The network and the entropy coder of each domain that the state knows."""
        models = {}
        for domain, axes in AXES.items():
            part = {k.removeprefix(f"{domain}."): v for k, v in self.state.items() if k.startswith(f"{domain}.")}
            if not part:
                continue
            levels, latents = self._shape(domain)
            weights = {k.removeprefix("net."): v.float() for k, v in part.items() if k.startswith("net.")}
            try:
                kept, bands = weights["project.weight"].shape[:2]
                channels, rest = divmod(bands, 2 ** (levels * axes))
                if rest or kept != latents:
                    raise StateError(
                        f"walloc: the state has {bands} bands and {kept} latent channels for {domain}; "
                        f"this configuration needs a multiple of {2 ** (levels * axes)} bands and {latents} latent channels"
                    )
                blocks = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
                network = Network(axes, channels, levels, latents, len(weights["enter.weight"]), blocks)
                network.load_state_dict(weights)
                models[domain] = network.eval().requires_grad_(False), LatentCoder(part, axes)
            except (KeyError, RuntimeError, IndexError) as error:
                raise StateError(f"walloc: this is no state of walloc for {domain} ({error})") from error
        return models

    def _model(self, spec: Spec) -> tuple[Network, LatentCoder, int, list[int]]:
        """Network, coder, the state's channels, and the extended size of the input."""
        if spec.domain not in self._models:
            raise MissingStateError(
                f"walloc: the state of {self} is fitted on {' and '.join(self._models)}; given: {spec.domain}; "
                f"use .fit(samples) with {spec.domain} samples, or .load(path)"
            )
        network, coder = self._models[spec.domain]
        unit = 2**network.levels
        channels = network.project.weight.shape[1] // unit**network.axes
        if spec.shape[0] not in (1, channels):
            raise InputError(
                f"walloc: {spec.domain} of {spec.shape[0]} channels; allowed with this state: {channels}"
                f"{'' if channels == 1 else ' or 1'}; use .fit(samples) for others"
            )
        return network, coder, channels, [-(-n // unit) * unit for n in spec.shape[1:]]

    @torch.no_grad()
    def latent(self, x: Tensor, domain: str = "image") -> np.ndarray:
        """The integer latent of an array of the domain: int8, channels x height x width (audio: height 1). What compressed-domain
        learning works on."""
        network, _, channels, size = self._model(Spec(domain, tuple(x.shape), "float32"))
        x = x.expand(channels, *x.shape[1:])[None]
        margins = [m for n, full in zip(reversed(x.shape[2:]), reversed(size), strict=True) for m in (0, full - n)]
        y = network.encode(functional.pad(x, margins, mode="replicate"), torch.tensor([self.quality]))[0]
        return torch.round(y).to(torch.int8).reshape(len(y), -1, y.shape[-1]).numpy()

    def _encode(self, x: Tensor, spec: Spec) -> dict[str, Any]:
        return {"latent": self._model(spec)[1].encode(self.latent(x, spec.domain))}

    @torch.no_grad()
    def _decode(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        network, coder, _, size = self._model(spec)
        grid = [n // 2**network.levels for n in size]
        shape = (len(network.project.weight), *([1] * (2 - network.axes)), *grid)
        y = torch.from_numpy(coder.decode(np.asarray(parts["latent"]), shape)).float()
        x = network.decode(y.reshape(1, -1, *grid), torch.tensor([self.quality]))[0]
        for axis, n in enumerate(spec.shape[1:], 1):
            x = x.narrow(axis, 0, n)
        if spec.shape[0] == 1:
            x = x.mean(0, keepdim=True)
        return x.clamp(0.0 if spec.domain == "image" else -1.0, 1.0).contiguous()

    @classmethod
    def examples(cls) -> list[Self]:
        generator = torch.Generator().manual_seed(0)
        photo = functional.interpolate(torch.rand(1, 3, 9, 9, generator=generator), size=(40, 40), mode="bilinear")[0]
        tone = torch.sin(torch.arange(2048) * 0.05) * torch.tensor([[0.5], [0.3]])
        tiny = cls(latent_channels=3, levels=2, width=4, blocks=1, steps=4)
        return [tiny.fit([photo, tone])]
