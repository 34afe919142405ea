"""The layer and the method that vector quantizers derive from: a paper's part is how vectors become codes, and codes values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from tersor import Calibration, CorruptPayloadError, InputError, Quantizer, Spec, StateError, track
from tersor_kit_vq.codebook import Quantized, check_vectors, together
from tersor_kit_vq.packing import pack_mixed, unpack_mixed
from tersor_kit_vq.standard import standard


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (a - b)^2 over all elements, 0 of none; scalar."""
    return (a - b).square().sum() / max(a.numel(), 1)


def add_over_processes(x: Tensor) -> Tensor:
    """``x`` summed over the processes of torch.distributed, in place; ``x`` as it is where there is one."""
    if together():
        distributed.all_reduce(x)
    return x


def bridge(here: int, there: int) -> nn.Module:
    """The linear map between vectors of ``here`` and ``there`` dimensions; none where they are equal."""
    return nn.Linear(here, there) if here != there else nn.Identity()


def unbridge(module: nn.Module, x: Tensor) -> Tensor:
    """The vectors, float32 N x there, that ``module``, a :func:`bridge` to as many dimensions or more, took to ``x``: least squares."""
    if isinstance(module, nn.Identity):
        return x
    solved = torch.linalg.lstsq(module.weight.double(), (x.double() - module.bias.double()).T)  # type: ignore[operator]
    return solved.solution.T.float()  # type: ignore[no-any-return]


@torch.no_grad()
def move_bridges(enter: nn.Linear, leave: nn.Linear, scale: Tensor, offset: Tensor) -> None:
    """Linear maps in and out of a layer that then does to scale z + offset (scalars) what it did to z."""
    enter.bias.sub_(enter.weight.sum(1) * (offset / scale))
    enter.weight.div_(scale)
    leave.weight.mul_(scale)
    leave.bias.mul_(scale).add_(offset)


class VectorLayer(nn.Module):
    """A quantizing layer: ``forward(z) -> Quantized(values, codes, loss)`` for z float ... x ``dim`` of any leading shape.

    ``values``: as z, exactly what the codes stand for; ``codes``: int64, of the leading shape where ``sizes`` is a number, else leading
    x n with one index below each of the n ``sizes``; ``loss``: scalar, what the method adds to the training loss. Everything is
    computed in float32, under autocast too. In evaluation mode nothing changes and nothing is random.

    A method gives :meth:`_quantize` and :meth:`_values`, and :meth:`_codes` where the nearest codes are not found by quantizing.
    Where codebooks are moved by other means than gradients, sums over all vectors pass through :func:`add_over_processes`.
    Raises :class:`tersor.InputError` for another dimension or element type, NaN or infinity.
    """

    #: Whether :meth:`move` takes an offset too.
    centred = True

    def __init__(self, name: str, dim: int, sizes: int | Sequence[int]) -> None:
        super().__init__()
        self.name, self.dim = name, dim
        self.sizes: int | tuple[int, ...] = sizes if isinstance(sizes, int) else tuple(sizes)

    @property
    def bits(self) -> float:
        """log2 of the number of different codes of a vector."""
        return sum(math.log2(n) for n in ((self.sizes,) if isinstance(self.sizes, int) else self.sizes))

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (float32 N x dim, with the gradient that the method gives ``x``), codes (int64 N or N x n), loss; N may be 0."""
        raise NotImplementedError(f"{type(self).__name__}._quantize")

    def _values(self, codes: Tensor) -> Tensor:
        """What codes (int64 N or N x n) stand for, float32 N x dim."""
        raise NotImplementedError(f"{type(self).__name__}._values")

    def _codes(self, values: Tensor) -> Tensor:
        """Codes of what :meth:`_values` gave."""
        return self._quantize(values)[1]

    def move(self, scale: Tensor, offset: Tensor) -> None:
        """Do from now on to scale z + offset (scalars) what was done to z: given by layers that learn by steps of a fixed size, which
        are then fitted to plain vectors of mean 0 and deviation 1, and moved to where these came from."""
        raise NotImplementedError(f"{type(self).__name__}.move")

    def forward(self, z: Tensor) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            x = check_vectors(z, self.dim, self.name)
            values, codes, loss = self._quantize(x)
        return Quantized(values.to(z.dtype).view(z.shape), codes.view(z.shape[:-1] + codes.shape[1:]), loss)

    @torch.no_grad()
    def codes_to_values(self, codes: Tensor) -> Tensor:
        """Values, float32 ... x dim, of codes as :meth:`forward` gives them. Raises :class:`tersor.InputError` for what is no code."""
        sizes, single = self.sizes, isinstance(self.sizes, int)
        if codes.is_floating_point() or (not single and codes.shape[-1:] != (len(sizes),)):  # type: ignore[arg-type]
            shape = "int64 of any shape" if single else f"int64 ... x {len(sizes)}"  # type: ignore[arg-type]
            raise InputError(
                f"{self.name} has codes that are {shape}; given: {str(codes.dtype)[6:]} of shape {tuple(codes.shape)}"
            )
        limit = torch.tensor(sizes, device=codes.device)
        if codes.numel() and (int(codes.min()) < 0 or bool((codes >= limit).any())):
            raise InputError(f"{self.name} has codes below {sizes}; given: {int(codes.min())} to {int(codes.max())}")
        leading = codes.shape if single else codes.shape[:-1]
        flat = codes.reshape(-1) if single else codes.reshape(-1, codes.shape[-1])
        with torch.autocast(codes.device.type, enabled=False):
            return self._values(flat.long()).view((*leading, self.dim))

    @torch.no_grad()
    def values_to_codes(self, values: Tensor) -> Tensor:
        """The codes of values that :meth:`codes_to_values` gave. Raises :class:`tersor.InputError` as :meth:`forward`."""
        with torch.autocast(values.device.type, enabled=False):
            x = check_vectors(values, self.dim, self.name)
            training = self.training
            try:
                codes = self.eval()._codes(x)
            finally:
                self.train(training)
        return codes.view(values.shape[:-1] + codes.shape[1:])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Raises :class:`tersor.StateError` for names or shapes of another layer; nothing is loaded then."""
        own = {k: tuple(v.shape) for k, v in self.state_dict().items()}
        given = {k: tuple(v.shape) for k, v in state_dict.items()}
        wrong = [f"{k}: {given.get(k, 'missing')}, not {own.get(k, 'known')}" for k in sorted(own.keys() | given.keys())
                 if own.get(k) != given.get(k) and (strict or (k in own and k in given))]  # fmt: skip
        if wrong:
            raise StateError(f"{self.name}: this is no state of this layer ({'; '.join(wrong[:3])})")
        return super().load_state_dict(state_dict, strict, assign)


def fit_layer(
    layer: VectorLayer, vectors: Tensor, steps: int, seed: int = 0, batch: int = 1024, rate: float = 1e-2
) -> VectorLayer:
    """Train a layer on fixed vectors (float N x dim): mean squared error of its values plus its loss, by Adam, the learning rate
    falling to nothing by half a cosine. Gives the layer in evaluation mode. Raises :class:`tersor.InputError` as the layer."""
    vectors = check_vectors(vectors, layer.dim, layer.name)
    if len(vectors) == 0:
        raise InputError(f"{layer.name}: fit needs at least one vector")
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99)) if parameters else None
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        layer.train()
        for step in track(range(steps), f"fitting {layer.name}"):
            order = torch.randint(len(vectors), (min(batch, len(vectors)),), generator=generator)
            x = vectors if len(vectors) <= batch else vectors[order]
            out = layer(x)
            loss = mean_square(out.values, x) + out.loss
            if optimizer is not None and loss.requires_grad:
                for group in optimizer.param_groups:
                    group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return layer.eval()


def layer_state(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of a layer's state, as that of a method."""
    return {k: v.detach().clone() for k, v in layer.state_dict().items()}


class VectorQuantizer(Quantizer):
    """A method that is a :class:`VectorLayer` and stores its codes, in as many bits as their number needs.

    A method has the fields ``dim``, ``steps`` and ``seed``, gives :meth:`_layer`, and :meth:`at_code_bits` to be compared. Its
    state is that of the layer, which :meth:`fit` trains on vectors alone; what it has beside that, as a prior, has names that begin with
    one of ``beside``.
    """

    domains = ("latent",)
    native = "torch"
    fitted = True
    beside: tuple[str, ...] = ()

    dim: int
    steps: int
    seed: int

    def _layer(self) -> VectorLayer:
        """The layer before any training."""
        raise NotImplementedError(f"{type(self).__name__}._layer")

    def layer(self, fitted: bool = False) -> Any:
        """The torch layer that trains. ``fitted``: with the method's state, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layer = self._layer()
        if fitted:
            layer.load_state_dict({k: v for k, v in self.state.items() if not k.startswith(self.beside)})
            layer.eval()
        return layer

    def with_layer(self, layer: VectorLayer) -> Self:
        """A copy with a layer trained elsewhere, and nothing beside it. Raises :class:`tersor.StateError` for a layer of another shape."""
        fitted = self.with_state(layer_state(layer))
        fitted._trained  # noqa: B018  shapes are checked here
        return fitted

    @classmethod
    def at_code_bits(cls, bits: int, dim: int) -> list[Self]:
        """The instances for vectors of ``dim`` dimensions and about ``bits`` bits a vector that stand for the method where methods
        are compared; none where there are none."""
        return []

    def _fit(self, samples: list[Tensor]) -> dict[str, Tensor]:
        vectors, layer = torch.cat([self._flat(s) for s in samples]), self.layer()
        if type(layer).move is VectorLayer.move:
            fit_layer(layer, vectors, self.steps, self.seed)
        else:
            near, scale, offset = standard(check_vectors(vectors, self.dim, self.name), layer.centred)
            fit_layer(layer, near, self.steps, self.seed).move(scale, offset)
        return layer_state(layer)

    @functools.cached_property
    def _trained(self) -> VectorLayer:
        return self.layer(fitted=True).requires_grad_(False)

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise InputError(f"{self.name} takes vectors of dim={self.dim} dimensions; given: shape {tuple(x.shape)}")
        return x.reshape(-1, self.dim)

    @torch.no_grad()
    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        layer = self._trained
        return {"codes": pack_mixed(layer(self._flat(x).float()).codes, layer.sizes)}

    @torch.no_grad()
    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        if spec.shape[-1:] != (self.dim,):
            raise CorruptPayloadError(f"{self.name}: shape {spec.shape} has not vectors of {self.dim} dimensions")
        layer = self._trained
        return layer.codes_to_values(unpack_mixed(parts["codes"], layer.sizes, math.prod(spec.shape[:-1]))).view(spec.shape)

    def example_inputs(self) -> list[Any]:
        generator = torch.Generator().manual_seed(1)
        shapes = ((1,), (130,), (2, 5), (2, 3, 4))
        return [torch.randn(*s, self.dim, generator=generator).numpy() for s in shapes]

    @classmethod
    def _fitted(cls, *methods: Self) -> list[Self]:
        """These, fitted on a few normal vectors: for ``examples``."""
        generator = torch.Generator().manual_seed(0)
        return [m.fit([torch.randn(5, 40, m.dim, generator=generator)]) for m in methods]
