"""A token pruner over a real transformer: fewer tokens from layer to layer."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Self

from tersor.api import as_method
from tersor.errors import ConfigError, InputError
from tersor.model.driver import find_blocks
from tersor.model.statistics import additive_mask
from tersor.results import Calibration
from tersor.tokens import Kept, TokenPruner

#: Models whose code reshapes the last hidden state to the input's length.
_FIXED = {"gpt2"}


class TokenReduction:
    """Runs a transformers model with a token pruner between its blocks, as a context manager.

    ``model``: a transformers model whose blocks take the hidden states first (Llama-like decoders, BERT-like encoders);
    ``pruner``: a token pruner of the domain ``embedding``, or its string. ``protect``: bool, tokens or batch x tokens: these
    stay (an instruction, a class token). Within the ``with`` block, the model's own forward merges and drops tokens; so does
    the prompt's pass of ``generate``, and each layer's cache keeps only what that layer saw. Tokens that merge before the first
    block leave the rest with consecutive positions.

    After a forward: ``positions`` (int64 batch x kept: where in the input the tokens of the last hidden state stood),
    ``counts`` (tokens that each block saw), ``flops`` and ``full_flops`` of the blocks (two for each multiplication, of linear
    layers and attention; the pruner's own work is not counted).

    Raises :class:`tersor.ConfigError` for another kind of method or model, :class:`tersor.InputError` for padded batches.
    """

    def __init__(self, model: Any, pruner: Any, protect: Any = None) -> None:
        import torch

        method = as_method(pruner)
        if not isinstance(method, TokenPruner) or "embedding" not in method.domains:
            raise ConfigError(f"a token pruner of embeddings is needed; given: {method.kind} {method}")
        self.model, self.pruner = model, method
        name, self.blocks = find_blocks(model)
        if not name or not hasattr(model, "config"):
            raise ConfigError(f"a transformers model with a list of blocks is needed; given: {type(model).__name__}")
        if getattr(model.config, "model_type", "") in _FIXED:
            raise ConfigError(f"{type(model).__name__} gives its output the length of its input, so that no token can leave")
        self.protect = None if protect is None else torch.as_tensor(protect, dtype=torch.bool)
        linears = [m for m in self.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
        self._linear = sum(m.weight.numel() for m in linears)
        self._width = int(model.config.hidden_size)
        self._handles: list[Any] = []
        self._usual = ""
        self._attention: Any = None
        self._origin: Any = None  # batch x tokens, of those that are left now: where they are among those of the first block
        self._start: Any = None  # batch x tokens after the input stage: where they are in the input, if any went there
        self._guard: Any = None
        self.positions: Any = None
        self.counts: list[int] = []
        self.tokens = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the blocks in the last forward, for one sequence."""
        return sum(self._cost(n) for n in self.counts)

    @property
    def full_flops(self) -> int:
        """What :attr:`flops` would be without a pruner."""
        return len(self.blocks) * self._cost(self.tokens)

    def _cost(self, tokens: int) -> int:
        return 2 * self._linear * tokens + 4 * tokens * tokens * self._width

    def __enter__(self) -> Self:
        if self._handles:
            raise InputError("this token reduction is in use already")
        self._usual = str(self.model.config._attn_implementation)
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            for number, block in enumerate(self.blocks):
                self._handles.append(block.register_forward_pre_hook(self._before(number), with_kwargs=True))
                self._handles.append(block.register_forward_hook(self._after(number)))
                for part in block.modules():
                    if part is not block and any(True for _ in part.children()):
                        self._handles.append(part.register_forward_hook(self._listen))
            undo.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.model.config._attn_implementation = self._usual
        self._attention = None

    def _listen(self, module: Any, args: Any, out: Any) -> None:
        """Keeps the attention weights that an eager attention layer gives beside its output."""
        if isinstance(out, tuple) and len(out) > 1 and getattr(out[1], "ndim", 0) == 4:
            self._attention = out[1]

    def _before(self, number: int) -> Any:
        places = tuple(inspect.signature(self.blocks[number].forward).parameters)

        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, given = args[0], dict(kwargs)
            names = places[1 : len(args)]  # what is given by position, such as BERT's mask
            given.update(zip(names, args[1:]))
            cache = given.get("past_key_values")
            self.model.config._attn_implementation = self._usual
            if cache is not None and hidden.shape[1] and cache.get_seq_length(number) > 0:
                self._guard = None
                mask = given.get("attention_mask")
                if mask is not None:  # it was made for the first layer's cache; this layer's may be shorter
                    given["attention_mask"] = mask[..., -(cache.get_seq_length(number) + hidden.shape[1]) :]
                return self._arguments(given, hidden, names)
            if number == 0:
                hidden = self._begin(hidden, given)
            self.counts.append(int(hidden.shape[1]))
            self._guard = hidden
            if hidden.shape[1] < self.tokens:
                self._narrow(given)
            if self.pruner.attends(number, len(self.blocks)):
                self.model.config._attn_implementation = "eager"
                given["attention_mask"] = additive_mask(block, hidden, given.get("attention_mask"))
            return self._arguments(given, hidden, names)

        return hook

    @staticmethod
    def _arguments(given: dict[str, Any], hidden: Any, names: tuple[str, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (hidden, *(given.pop(n) for n in names)), given

    def _begin(self, hidden: Any, given: dict[str, Any]) -> Any:
        """The input stage: what merges or goes before the first block."""
        import torch

        batch, self.tokens = int(hidden.shape[0]), int(hidden.shape[1])
        mask = given.get("attention_mask")
        seen = None if mask is None else mask[..., -1, :] if mask.dtype == torch.bool else mask[..., -1, :] == 0
        if seen is not None and not bool(seen.all()):
            raise InputError("a batch with padding; allowed: sequences of one length, without padding")
        if self.protect is not None and tuple(self.protect.shape) not in ((self.tokens,), (1, self.tokens), (batch, self.tokens)):
            raise InputError(
                f"protect has shape {tuple(self.protect.shape)}; allowed for this batch: {self.tokens} or {batch} x {self.tokens} tokens"
            )
        self.counts, self._start = [], None
        self._origin = self.positions = torch.arange(self.tokens).expand(batch, -1)
        if not self.pruner.attends(-1, len(self.blocks)):
            return hidden
        kept = self._decide(hidden, -1)
        if kept.indices.shape[-1] == self.tokens:
            return hidden
        self._start = self.positions = kept.indices
        self._origin = torch.arange(kept.indices.shape[-1]).expand(batch, -1)
        return kept.merge(hidden)

    def _decide(self, hidden: Any, layer: int) -> Kept:
        protect = None
        if self.protect is not None:
            protect = self.protect.expand(hidden.shape[0], -1).gather(1, self.positions)
        first = self.tokens if not self.counts else self.counts[0]
        extra = {
            "layer": layer, "layers": len(self.blocks), "attention": self._attention, "protect": protect, "tokens": first,
        }  # fmt: skip
        return self.pruner.prune(hidden, Calibration(extra=extra), domain="embedding")

    def _narrow(self, given: dict[str, Any]) -> None:
        """Masks and positions, which the model made for all tokens, for those that are left."""
        import torch

        where = self._origin
        rows = where if self._start is None else self._start.gather(1, where)

        def entries(x: Any) -> Any:  # batch x tokens x ...: positions are consecutive after the input stage
            x = x.expand(where.shape[0], *x.shape[1:])
            return x.gather(1, where.reshape(*where.shape, *(1,) * (x.ndim - 2)).expand(*where.shape, *x.shape[2:]))

        for key, value in given.items():
            if key == "position_embeddings":
                given[key] = tuple(entries(v) for v in value)
            elif key in ("position_ids", "cache_position") and isinstance(value, torch.Tensor):
                given[key] = entries(value if value.ndim == 2 else value[None])
            elif key == "attention_mask" and value is not None:
                value = value.expand(where.shape[0], *value.shape[1:])
                value = value.gather(2, rows[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3]))
                given[key] = value.gather(3, rows[:, None, None, :].expand(-1, value.shape[1], value.shape[2], -1))

    def _after(self, number: int) -> Any:
        def hook(block: Any, args: tuple[Any, ...], out: Any) -> Any:
            self.model.config._attn_implementation = self._usual
            hidden = out[0] if isinstance(out, tuple) else out
            last = number == len(self.blocks) - 1
            if self._guard is None or last or not self.pruner.attends(number, len(self.blocks)):
                self._attention = None
                return out
            kept = self._decide(hidden, number)
            self._attention = None
            if kept.indices.shape[-1] == hidden.shape[1]:
                return out
            self._origin, self.positions = self._origin.gather(1, kept.indices), self.positions.gather(1, kept.indices)
            hidden = kept.merge(hidden)
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        return hook
