"""Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, https://arxiv.org/abs/1711.00937)."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from tersor import (
    Calibration,
    ConfigError,
    CorruptPayloadError,
    InputError,
    MissingStateError,
    Quantizer,
    Spec,
    StateError,
    at_least,
    between,
    entropy,
    field,
    method,
    one_of,
    track,
)  # fmt: skip
from tersor_kit_vq import (
    FACTOR,
    Autoencoder,
    Codebook,
    CodebookLayer,
    IndexPrior,
    Quantized,
    grid_shape,
    index_bits,
    kmeans,
    nearest,
    pack_indices,
    padded,
    three_channels,
    to_grid,
    train,
    unpack_indices,
)


class VQLayer(CodebookLayer):
    """``forward(z) -> Quantized(values, codes, loss)``: z float ... x dim; equations 1 to 3 of the paper.

    ``values``: the nearest codewords exactly, with the gradient copied straight through to z; ``codes``: int64 of the leading shape;
    ``loss``: ``commitment`` times mean (z - sg[e])^2, and with ``decay`` 0 also mean (sg[z] - e)^2, which moves the codebook in place of
    the moving averages. Training mode starts and moves the codebook; evaluation mode changes nothing. Computes in float32,
    under autocast too. Raises :class:`tersor.InputError` for another dimension, NaN or infinity.
    """

    def __init__(self, codebook: Codebook, commitment: float = 0.25) -> None:
        super().__init__("vq-vae", codebook, commitment)


class _Bitwise:
    """Vectors decode to the same bytes everywhere, since that is a look-up; images go through a network."""

    def __get__(self, instance: VQVAE | None, owner: type) -> bool:
        return instance is not None and instance.encoder == "none"


@method
class VQVAE(Quantizer):
    """Vectors become the number of their nearest codeword (equation 1); an image becomes a grid of vectors by a trained encoder.

    Latent: float, ... x ``dim``. Image: float C x H x W in [0, 1], C of 3 or 1, any size; one index for each 4 x 4 pixels. With
    ``encoder="conv"`` an array of three dimensions, the first of them 1 or 3, is an image unless ``domain="latent"`` is said; with
    ``"none"`` everything is a latent.

    ``fit`` of images trains autoencoder and codebook (moving averages, appendix A.1) and then the prior; of latents it is k-means and the
    prior. The shipped state (512 codes of 64 dimensions, as in the paper) is trained on photographs of scikit-image and scikit-learn,
    without those of ``tersor.data.photographs()``.

    Stored: with ``prior="none"`` ceil(log2 codes) bits an index; ``"order0"`` entropy-coded with their frequencies in training;
    ``"autoregressive"`` with a learned network over the indices before (section 3.3), whose arithmetic is exact, so that the indices
    come back the same on every machine. Latents of two or more leading dimensions are grids (the last two); one is cut into rows
    of 64, as is a grid of more than 16 times as many rows as columns, or the reverse (beyond some 40 rows or 128 columns). Decoding latents is a look-up; an image's pixels may differ in the last bits between machines.

    Departures: the prior is a small causal window network in place of PixelCNN, for exact arithmetic and decoding of whole
    diagonals; 64 hidden units in place of 256; while training on images the first twentieth of the steps goes unquantized, and the codebook then
    starts from k-means. Dead codes are left alone, as in the paper.

    Raises :class:`tersor.InputError` for vectors of another dimension or images of other channels; :class:`tersor.StateError` for a
    state of another shape.
    """

    name = "vq-vae"
    domains = ("latent", "image")
    native = "torch"
    bitwise = _Bitwise()  # type: ignore[assignment]
    fitted = True

    codes: int = field(512, between(1, 1 << 16), help="codewords")
    dim: int = field(64, between(1, 1 << 14), help="dimensions of a vector")
    encoder: str = field("conv", one_of("conv", "none"), help="conv: images too; none: vectors only")
    prior: str = field("autoregressive", one_of("none", "order0", "autoregressive"), help="what indices are stored with")
    decay: float = field(0.99, between(0, 1), help="of the codebook's moving averages; 0: a codebook loss instead")
    commitment: float = field(0.25, between(0, 1e6), help="beta, weight of the commitment loss")
    steps: int = field(6000, at_least(1), help="training steps (for fit)")
    seed: int = field(0, at_least(0), help="of training (for fit)")

    def _default_state(self) -> Path | None:
        shipped = self.codes == 512 and self.dim == 64 and self.encoder == "conv"
        return Path(__file__).parent / "states" / "default.safetensors" if shipped else None

    # -- the layer

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """Codewords by moving averages, vectors alone."""
        return [cls(codes=2**bits, dim=dim, encoder="none", prior="none")]

    def layer(self, start: str = "kmeans", fitted: bool = False) -> VQLayer:
        """The torch layer that trains. ``start``: ``"kmeans"`` (of the first batch) or ``"random"``; ``fitted``: start from the state's
        codebook instead. Raises :class:`tersor.ConfigError` for another start."""
        if start not in ("kmeans", "random"):
            raise ConfigError(f"vq-vae: start={start!r} is not allowed; allowed: 'kmeans' or 'random'")
        codebook = Codebook(self.codes, self.dim, self.decay, start, seed=self.seed)
        if fitted:
            codebook.set(self._codebook, self.state["counts"].float())
        return VQLayer(codebook, self.commitment)

    def with_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> Self:
        """A copy with this codebook (float K x dim) and no networks; ``counts``: of the codes, for ``prior="order0"``."""
        counts = torch.ones(self.codes) if counts is None else counts
        state = {"codebook": codebook.detach().float().clone(), "counts": counts.detach().float().clone()}
        fitted = self.with_state(state)
        fitted._codebook  # noqa: B018  shapes are checked here
        return fitted

    # -- fitting

    def _fit(self, samples: list[Tensor]) -> dict[str, Tensor]:
        images = [three_channels(s, "vq-vae") for s in samples if self._is_image(s)]
        if images and len(images) != len(samples):
            raise InputError(
                f"vq-vae: fit takes images or latents, not both; given: {len(images)} images of {len(samples)} samples"
            )
        if images:
            state = self._fit_autoencoder([padded(i) for i in images])
            # each image also in half its size, and turned over
            views = [v for i in images for v in (i, functional.avg_pool2d(i, 2) if min(i.shape[1:]) > 64 else i)]
            views = [w for v in views for w in (v, v.flip(2), v.transpose(1, 2))]
            fitted = self.with_state(state)
            grids = [fitted._indices_of_image(v) for v in views]
        else:
            vectors = torch.cat([self._flat(s) for s in samples])
            words, _ = kmeans(vectors, self.codes, 20, self.seed)
            state = {"codebook": words}
            grids = [self._grid(nearest(self._flat(s), words), s.shape[:-1]) for s in samples]
        state["counts"] = torch.bincount(torch.cat([g.reshape(-1) for g in grids]), minlength=self.codes).float()
        if self.prior == "autoregressive":
            prior = IndexPrior.fit(
                grids, self.codes, track(range(self.steps), "training the prior of vq-vae"), self.steps, self.seed
            )
            state |= {f"prior.{k}": v for k, v in prior.state.items()}
        return state

    def _fit_autoencoder(self, images: list[Tensor]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            network, layer = Autoencoder(self.dim), self.layer()
            free = self.steps // 20

            def quantize(z: Tensor, taken: Any = iter(range(self.steps))) -> Quantized:  # noqa: B008
                if next(taken) < free:
                    return Quantized(z, torch.empty(0, dtype=torch.int64), z.new_zeros(()))
                return layer(z)  # type: ignore[no-any-return]

            clock = (i / self.steps for i in track(range(self.steps), "training the autoencoder of vq-vae"))
            train(network, quantize, layer.parameters(), images, clock, self.seed)
        weights = {f"network.{k}": v.detach().half() for k, v in network.state_dict().items()}
        return {"codebook": layer.codebook.words.detach().clone(), **weights}

    # -- state

    @functools.cached_property
    def _codebook(self) -> Tensor:
        words = self.state.get("codebook")
        if words is None or tuple(words.shape) != (self.codes, self.dim) or not words.is_floating_point():
            given = None if words is None else tuple(words.shape)
            raise StateError(f"vq-vae: {self} needs a codebook of {self.codes} x {self.dim}; the state has {given}")
        return words.float()

    @functools.cached_property
    def _network(self) -> Autoencoder:
        weights = {k.removeprefix("network."): v.float() for k, v in self.state.items() if k.startswith("network.")}
        if not weights:
            raise MissingStateError("vq-vae: this state was fitted on latents; fit it on images to quantize images")
        try:
            width, inner = weights["encoder.0.weight"].shape[0], weights["encoder.5.first.weight"].shape[0]
            network = Autoencoder(self.dim, width, inner)
            network.load_state_dict(weights)
        except (KeyError, RuntimeError, IndexError) as error:
            raise StateError(f"vq-vae: this is no state of vq-vae ({error})") from error
        return network.eval().requires_grad_(False)

    @functools.cached_property
    def _table(self) -> entropy.Table:
        counts = self.state.get("counts")
        if counts is None or tuple(counts.shape) != (self.codes,):
            raise StateError(f"vq-vae: the state has no frequencies of {self.codes} codes")
        return entropy.Table((counts.double() * 16 + 1).long())

    @functools.cached_property
    def _prior(self) -> IndexPrior:
        weights = {k.removeprefix("prior."): v for k, v in self.state.items() if k.startswith("prior.")}
        if not weights:
            raise MissingStateError('vq-vae: the state has no prior; use .fit(samples), or prior="order0" or "none"')
        prior = IndexPrior(weights)
        if prior.size != self.codes:
            raise StateError(f"vq-vae: {self} needs a prior of {self.codes} codes; the state has one of {prior.size}")
        return prior

    # -- in and out

    def _is_image(self, x: Any) -> bool:
        return self.encoder == "conv" and x.ndim == 3 and x.shape[0] in (1, 3)

    def _enter(self, x: Any, domain: str | None = None) -> tuple[Any, Spec]:
        if domain is None and hasattr(x, "ndim"):
            domain = "image" if self._is_image(x) else "latent"
        return super()._enter(x, domain)

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            hint = "; an image of another number of channels than 1 or 3?" if x.ndim == 3 and self.encoder == "conv" else ""
            raise InputError(f"vq-vae takes vectors of dim={self.dim} dimensions; given: {x.shape[-1]}{hint}")
        return x.reshape(-1, self.dim)

    def _grid(self, indices: Tensor, leading: tuple[int, ...]) -> Tensor:
        """Indices as the grid that the prior goes over; the last one is repeated where the rows of a sequence have room."""
        return to_grid(indices.reshape(-1, 1), leading, (self.codes,))

    @torch.no_grad()
    def _indices_of_image(self, image: Tensor) -> Tensor:
        return nearest(self._network.encode(padded(image)[None]), self._codebook)

    @torch.no_grad()
    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        if spec.domain == "image":
            if self.encoder == "none":
                raise InputError('vq-vae with encoder="none" takes latents; given: an image')
            indices = self._indices_of_image(three_channels(x, "vq-vae"))
        else:
            indices = nearest(self._flat(x), self._codebook)
        if self.prior == "none":
            return {"codes": pack_indices(indices, index_bits(self.codes))}
        if self.prior == "order0":
            return {"codes": entropy.encode(indices, self._table)}
        return {"codes": self._prior.encode(self._grid(indices, self._leading(spec)))}

    def _leading(self, spec: Spec) -> tuple[int, ...]:
        if spec.domain == "image":
            return tuple(-(-n // FACTOR) for n in spec.shape[1:])
        if spec.shape[-1] != self.dim:
            raise CorruptPayloadError(f"vq-vae: shape {spec.shape} has not vectors of {self.dim} dimensions")
        return spec.shape[:-1]

    @torch.no_grad()
    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        leading, words = self._leading(spec), self._codebook
        count = math.prod(leading)
        if self.prior == "none":
            indices = unpack_indices(parts["codes"], index_bits(self.codes), count, self.codes)
        elif self.prior == "order0":
            indices = torch.from_numpy(entropy.decode(parts["codes"], self._table, count)).long()
        else:
            indices = self._prior.decode(parts["codes"], grid_shape(leading)).reshape(-1)[:count]
        values = words[indices]
        if spec.domain == "latent":
            return values.view(spec.shape)
        image = self._network.decode(values.view(1, *leading, self.dim))[0, :, : spec.shape[1], : spec.shape[2]]
        if spec.shape[0] == 1:
            image = image.mean(0, keepdim=True)
        if image.shape[0] != spec.shape[0]:
            raise CorruptPayloadError(f"vq-vae: images of {spec.shape[0]} channels are not made by this method")
        return image.clamp(0, 1).contiguous()

    @classmethod
    def examples(cls) -> list[Self]:
        generator = torch.Generator().manual_seed(0)
        vectors = [torch.randn(5, 40, 3, generator=generator)]
        small = dict(codes=7, dim=3, encoder="none", steps=20)
        photo = functional.interpolate(torch.rand(1, 3, 9, 9, generator=generator), size=(40, 40), mode="bilinear")[0]
        return [
            cls(**small).fit(vectors),
            cls(prior="none", **small).fit(vectors),
            cls(prior="order0", **small).fit(vectors),
            cls(codes=12, dim=4, steps=4).fit([photo]),
        ]

    def example_inputs(self) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        shapes = ((1,), (130,), (2, 5), (2, 3, 4))  # three dimensions, of which the first is 1 or 3, would be an image
        return [torch.randn(*s, self.dim, generator=generator).numpy() for s in shapes]
