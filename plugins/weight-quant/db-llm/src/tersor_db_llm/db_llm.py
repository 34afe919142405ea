"""DB-LLM: Accurate Dual-Binarization for Efficient LLMs (https://arxiv.org/abs/2402.11960)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from tersor import (
    Calibration,
    CalibrationError,
    ConfigError,
    Quantizer,
    Spec,
    at_least,
    between,
    entropy,
    field,
    method,
    one_of,
    track,
)
from tersor_db_llm.planes import dense, initialise, planes, refit
from tersor_kit_weight_quant import exponent_of, gram, group_count, normalise, pack, unpack


@method
class DBLLM(Quantizer):
    """2-bit weights as two planes of bits with a scale each, whose scales the whole network trains by distillation.

    Weights: float, out x in. Calibration: the layer's inputs, samples x in, or their X'X, in x in; in a network its batches.

    1. **Flexible dual binarization** (section 3.2). A group's weights are a1 b1 + a2 b2 with b1, b2 in {0, 1}. The scales start at
       a1 = 2 s and a2 = -s, the levels -s, 0, s, 2 s of two bits (here s may be negative too: 2 s then lies on the other side);
       the planes are b1 = [w > (a1 + a2) / 2] and b2 = [w - a1 b1 < a2 / 2]. The 2-bit quantization that training starts from is
       a calibrated one: the columns are binarized in order and their errors fed back (GPTQ's loop), so w above is the weight
       corrected for the columns before. Then the scales are fitted to the layer's output by least squares.
    2. **Deviation-aware distillation** (section 3.3). All scales of the network are trained end to end, ``steps`` steps of Adam, the
       planes being fixed. The unquantized network is the teacher: each token costs the cross entropy of the student's prediction with the
       teacher's, and with ``distill="deviation"`` that is weighted by (H_t H_s)^``focus``, H_t and H_s the entropies of the
       teacher's and the student's prediction, relative to the mean of the step: uncertain tokens, on which a 2-bit network
       deviates most, count more. ``distill="plain"`` weighs all tokens alike.

    A matrix alone gets the first part. In a network each step sees ``window`` tokens of one batch; the paper trains on
    generated text for far longer. A step on SmolLM2-135M takes about 6 seconds on one thread.

    Stored: codes 2 b1 + b2 at two bits, or entropy-coded where that is smaller (most bits of both planes are 0), and the two scales
    of a group in float16, one power of two set apart for weights of unusual size.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1, :class:`tersor.InputError` for NaN and infinity in the
    weights, :class:`tersor.CalibrationError` for calibration data that is missing, of another width, all zero or not finite, and for
    networks whose output has no logits.
    """

    name = "db-llm"
    domains = ("weight",)
    native = "torch"
    calibration = "required"
    wants = ()  # the network is studied as a whole
    studies = "network"

    group_size: int = field(64, help="weights that share two scales; -1: a whole row")
    steps: int = field(32, at_least(0), help="steps of distillation in a network; 0: none")
    window: int = field(256, at_least(2), help="tokens in a step")
    distill: str = field("deviation", one_of("deviation", "plain"), help="weigh tokens by their uncertainty, or all alike")
    focus: float = field(1.0, between(0, 4), help="the power of the entropies that weigh a token")
    rate: float = field(0.004, between(0, 1), help="step of training, as a fraction of a scale; falls to 0 linearly")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"db-llm: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")

    @classmethod
    def examples(cls) -> list[DBLLM]:
        """For the conformance kit."""
        return [cls(group_size=4), cls(group_size=-1, steps=0)]

    @classmethod
    def at_bits(cls, bits: int) -> list[DBLLM]:
        """Two planes are 2 bits."""
        return [cls()] if bits == 2 else []

    # -- one matrix

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        size = self._size(x.shape[1])
        exponent = exponent_of(x)
        told = {} if calibration is None else calibration.extra
        if "alpha" in told:  # trained with the whole network
            codes, alpha = told["codes"], told["alpha"] * math.ldexp(1.0, -exponent)
        else:
            hessian, weight = gram(calibration, x.shape[1]), normalise(x, exponent).contiguous()
            codes, alpha = initialise(weight, hessian, size, self.damp)
            alpha = refit(weight, codes, alpha, hessian, size, self.damp)
        plain = pack(codes, 2)
        coded = entropy.pack(codes)
        parts = {"coded": coded} if len(coded) < plain.numel() else {"codes": plain}
        parts["alpha"] = alpha.clamp(-65504.0, 65504.0).half()
        return {**parts, "exponent": exponent} if exponent else parts

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        codes, alpha = self._load(parts, spec)
        dtype = getattr(torch, spec.dtype)
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return dense(planes(codes, self._size(spec.shape[1])), alpha, spec.shape[1]).clamp_(-limit, limit).to(dtype)

    def _load(self, parts: dict[str, Any], spec: Spec) -> tuple[Tensor, Tensor]:
        rows, n = spec.shape
        if "coded" in parts:
            levels = torch.from_numpy(entropy.unpack(parts["coded"], (rows, n)))
            if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) <= 3:
                raise ValueError("codes: not 0 to 3")
            codes = levels.to(torch.uint8)
        else:
            codes = unpack(parts["codes"], 2, rows * n).view(rows, n)
        alpha, exponent = parts["alpha"], parts.get("exponent", 0)
        shape = (2, rows, group_count(n, self.group_size))
        if alpha.dtype != torch.float16 or tuple(alpha.shape) != shape or not bool(torch.isfinite(alpha).all()):
            raise ValueError(f"alpha: {alpha.dtype} {tuple(alpha.shape)}, where finite float16 {shape} fits")
        if type(exponent) is not int or abs(exponent) > 120:
            raise ValueError(f"exponent: {exponent!r}, where an integer from -120 to 120 fits")
        return codes.to(alpha.device), alpha.float() * math.ldexp(1.0, exponent)

    def _size(self, columns: int) -> int:
        return max(columns, 1) if self.group_size == -1 else min(self.group_size, max(columns, 1))

    # -- a network

    def _study(self, view: Any) -> dict[str, dict[str, Any]]:
        from tersor.model import quantize

        student = copy.deepcopy(view.module)
        alone = _Alone(**{name: getattr(self, name) for name in self.settings()})
        matrices = [name for name, p in student.named_parameters() if p.ndim >= 2]
        recipe = [(_pattern(name), alone if name in view.layers else None) for name in matrices]
        payloads = quantize(student, alone, view.inputs, recipe)
        layers = {}
        for name, payload in payloads.items():
            _, parts, spec = alone._unpack(payload, None)
            codes, alpha = self._load(parts, attrs.evolve(spec, shape=(spec.shape[0], math.prod(spec.shape[1:]))))
            layers[name] = _Layer(student.get_submodule(name.rpartition(".")[0]), codes, alpha, self._size(codes.shape[1]))
        if self.steps:
            self._distill(view.module, student, list(layers.values()), view.inputs)
        return {name: {"codes": layer.codes, "alpha": layer.alpha} for name, layer in layers.items()}

    def _distill(self, teacher: Any, student: Any, layers: list[_Layer], batches: list[Any]) -> None:
        """Train the scales of ``layers``, which belong to ``student``."""
        from tersor.model.statistics import call

        for p in student.parameters():
            p.requires_grad_(False)
        for layer in layers:
            layer.listen()
        pieces = list(_pieces(batches, self.window))
        adam = torch.optim.Adam([layer.change for layer in layers], lr=self.rate, betas=(0.9, 0.95))
        for step in track(range(self.steps), "distillation"):
            piece = pieces[step * max(len(pieces) // self.steps, 1) % len(pieces)]
            for group in adam.param_groups:
                group["lr"] = self.rate * (1 - step / self.steps)
            with torch.no_grad():
                told = _logits(call(teacher, piece))
            self.loss(_logits(call(student, piece)), told).backward()
            adam.step()
            for layer in layers:
                layer.place()

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Deviation-aware distillation of logits, tokens x classes: the mean over tokens, a number."""
        log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        p_t = log_t.exp()
        lost = -(p_t * log_s).sum(-1)
        if self.distill == "plain":
            return lost.mean()
        with torch.no_grad():
            h_t, h_s = -(p_t * log_t).sum(-1), -(log_s.exp() * log_s).sum(-1)
            weight = (h_t * h_s).clamp_(min=1e-6) ** self.focus
            weight /= weight.mean()
        return (weight * lost).mean()


class _Alone(DBLLM):
    """The first part, for each layer of a network after those before it are quantized."""

    wants = ("gram",)
    studies = "layer"


class _Layer:
    """A layer of the student whose weight is made of planes; ``change`` is what trains: alpha = start (1 + change)."""

    def __init__(self, module: Any, codes: Tensor, alpha: Tensor, size: int) -> None:
        from tersor.model.statistics import transposed

        self.weight, self.turned = module.weight, transposed(module)
        self.codes, self.start = codes, alpha
        self.planes = planes(codes, size)
        self.change = torch.zeros_like(alpha, requires_grad=True)

    @property
    def alpha(self) -> Tensor:
        return (self.start * (1 + self.change)).detach()

    def matrix(self, x: Tensor) -> Tensor:
        """A weight or its gradient as out x in."""
        return x.T if self.turned else x.flatten(1)

    def place(self) -> None:
        with torch.no_grad():
            self.matrix(self.weight).copy_(dense(self.planes, self.alpha, self.codes.shape[1]))

    def listen(self) -> None:
        """From now on a gradient of the weight becomes one of the scales, and is forgotten."""
        self.weight.requires_grad_(True)
        self.weight.register_post_accumulate_grad_hook(self._take)

    def _take(self, weight: Tensor) -> None:
        rows, groups, size = self.planes.shape[1:]
        grad = self.matrix(weight.grad).float()
        grad = torch.nn.functional.pad(grad, (0, groups * size - grad.shape[1])).view(rows, groups, size)
        self.change.grad = torch.stack([(grad * b).sum(2) for b in self.planes]) * self.start
        weight.grad = None


def _pieces(batches: list[Any], window: int) -> Iterator[Any]:
    """Batches of token numbers (batch x tokens) cut into rows of at most ``window`` tokens; others as they are."""
    for batch in batches:
        if isinstance(batch, Tensor) and batch.ndim == 2 and not batch.is_floating_point():
            for row in batch.split(1):
                yield from (piece for piece in row.split(window, 1) if piece.shape[1] > 1)
        else:
            yield batch


def _logits(out: Any) -> Tensor:
    """Predictions of a network's output, tokens x classes."""
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise CalibrationError(
            f"distillation needs a network that gives logits; given: {type(out).__name__}; allowed: also steps=0"
        )
    return logits.flatten(0, -2)


def _pattern(name: str) -> str:
    """A shell pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
