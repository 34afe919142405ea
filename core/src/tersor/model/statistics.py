"""What the layers of a network see while calibration data passes through it, and views of a network for methods that study it."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from tersor.errors import CalibrationError
from tersor.progress import track
from tersor.results import Calibration

#: Rows of inputs that a method which wants inputs gets for a layer, at most.
ROWS = 2048


def thin_layers() -> tuple[type, ...]:
    """Layers that are a matrix product over the last dimension: torch's, and that of transformers' GPT-2."""
    import torch

    known = sys.modules.get("transformers.pytorch_utils")
    return (torch.nn.Linear, *([known.Conv1D] if known is not None else []))


def layers() -> tuple[type, ...]:
    """Layers whose inputs are known as rows that the weight, out x in, is multiplied with."""
    import torch

    return (*thin_layers(), torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def transposed(module: Any) -> bool:
    """Whether a layer keeps its weight as in x out (transformers' Conv1D)."""
    import torch

    return isinstance(module, thin_layers()) and not isinstance(module, torch.nn.Linear)


def call(model: Any, batch: Any) -> Any:
    """The model's output for a batch: a tensor, a tuple of arguments, or a dict of them."""
    return model(**batch) if isinstance(batch, Mapping) else model(*batch) if isinstance(batch, tuple) else model(batch)


def by_name(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, all but the first by name where the module's forward has names for them."""
    known = list(inspect.signature(module.forward).parameters.values())
    named = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) < 2 or len(named) < len(args):
        return args, dict(kwargs)
    return args[:1], {**dict(zip(named[1 : len(args)], args[1:])), **kwargs}


@attrs.define
class View:
    """A block, or the whole of a network, as a method that studies it sees it (``studies``, ``_study``).

    ``module``: the block or the network, its weights as they were. ``layers``: names of the weights that this method gets, in
    order, to the layers that hold them. ``inputs``: for a block the (args, kwargs) that it is called with, all blocks before it being
    compressed already; for a network the batches.
    """

    module: Any
    layers: dict[str, Any]
    inputs: list[Any]
    block: bool

    def __len__(self) -> int:
        return len(self.inputs)

    def run(self, i: int) -> Any:
        """What the module gives for its i-th input: a block's hidden states, a network's output."""
        if not self.block:
            return call(self.module, self.inputs[i])
        args, kwargs = self.inputs[i]
        out = self.module(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def loss(self, i: int) -> Any:
        """A network's loss on its i-th batch: the model's own where it gives one, else a language model's mean cross entropy of the
        next token. Raises :class:`tersor.CalibrationError` for other networks."""
        return loss(self.module, self.inputs[i])


def loss(model: Any, batch: Any) -> Any:
    """See :meth:`View.loss`."""
    import torch

    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple) and batch else batch
    out = call(model, batch)
    own, logits = getattr(out, "loss", None), getattr(out, "logits", None)
    if own is not None:
        return own
    if logits is None or not isinstance(ids, torch.Tensor) or ids.is_floating_point() or logits.shape[:-1] != ids.shape:
        raise CalibrationError(
            f"{type(model).__name__} gives no loss for this batch; allowed: a causal language model and its token numbers, or a "
            f"batch with labels, for which a model gives .loss"
        )
    if ids.shape[-1] < 2:
        raise CalibrationError("a language model's loss needs two tokens or more in a batch")
    return torch.nn.functional.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), ids[..., 1:].flatten())


def squared_gradients(model: Any, parameters: Mapping[str, Any], batches: list[Any]) -> dict[str, Any]:
    """For each of the named parameters the mean over the batches of the squared gradient of the loss: the Fisher diagonal.

    Holds one float32 for each weight, and one weight's gradient at a time.
    """
    import torch

    found = {name: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for name, p in parameters.items()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    handles = []

    def taker(name: str) -> Callable[[Any], None]:
        def take(p: Any) -> None:
            found[name].addcmul_(p.grad.float(), p.grad.float(), value=1 / len(batches))
            p.grad = None

        return take

    held = {id(p): p.grad for p in parameters.values()}
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for name, p in parameters.items():
            p.grad = None
            p.requires_grad_(True)
            handles.append(p.register_post_accumulate_grad_hook(taker(name)))
        with torch.enable_grad():
            for batch in track(batches, "gradients"):
                loss(model, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in flags:
            p.requires_grad_(flag)
        for p in parameters.values():
            p.grad = held[id(p)]
    return found


@attrs.define
class Moments:
    """X^T X of a layer's inputs, their sum, and their number; and some of them as they are."""

    gram: Any
    total: Any
    count: int
    rows: list[Any] = attrs.field(factory=list)

    def add(self, other: Moments) -> None:
        if other.gram is not None:
            self.gram.add_(other.gram)
            self.total.add_(other.total)
        self.count += other.count
        self.rows += other.rows

    def calibration(self, layer: str) -> Calibration:
        import torch

        extra = {} if self.total is None else {"mean": self.total / max(self.count, 1)}
        rows = torch.cat(self.rows) if self.rows else None
        if rows is not None and len(rows) > ROWS:
            rows = rows[torch.arange(ROWS, device=rows.device) * len(rows) // ROWS]
        return Calibration(inputs=rows, gram=self.gram, count=self.count, layer=layer, extra=extra)


@attrs.frozen
class Wish:
    """What one layer's method wants of its inputs. ``weigh``: the method's token weights; ``rows``: inputs from each call."""

    module: Any
    gram: bool = True
    rows: int = 0
    weigh: Any = None


def moments(module: Any, x: Any, wish: Wish | None = None, weight: Any = None) -> Moments:
    """Of one input of a layer. ``weight``: one for each of its tokens."""
    import torch

    flat = columns(module, x)
    if weight is not None:
        if weight.numel() != flat.shape[0]:
            raise CalibrationError(f"{weight.numel()} token weights for {flat.shape[0]} inputs of a {type(module).__name__}")
        flat = flat * weight.reshape(-1, 1).to(flat)
    rows = []
    if wish is not None and wish.rows:
        take = min(wish.rows, len(flat))
        rows = [flat[torch.arange(take, device=flat.device) * len(flat) // max(take, 1)].clone()]
    if wish is not None and not wish.gram:
        return Moments(None, None, int(flat.shape[0]), rows)
    return Moments(flat.T @ flat, flat.sum(0), int(flat.shape[0]), rows)


def gather(model: Any, wishes: Mapping[str, Wish], runs: Callable[[], Iterator[Any]], network: Any = None) -> dict[str, Moments]:
    """For each layer the moments of all inputs that it sees.

    ``runs`` calls ``model`` on one input of the calibration after another, yielding after each. ``network``: the whole, whose attention is
    computed openly where a method weighs tokens.
    """
    import torch

    found: dict[str, Moments] = {}
    by_module: dict[int, list[str]] = {}
    for name, wish in wishes.items():
        by_module.setdefault(id(wish.module), []).append(name)
    weighed = {id(w.weigh.__self__): w.weigh for w in wishes.values() if w.weigh is not None}
    seen: list[tuple[Any, Any]] = []  # inputs of the call at hand, kept until its attention is known
    latest: list[Any] = []  # the latest input, its version, and its moments
    held: dict[str, Any] = {}
    handles = []

    def add(name: str, new: Moments, shared: bool) -> None:
        if name in found:
            found[name].add(new)
        else:
            gram = new.gram.clone() if shared and new.gram is not None else new.gram
            total = new.total.clone() if shared and new.total is not None else new.total
            found[name] = Moments(gram, total, new.count, list(new.rows))

    def take(module: Any, x: Any, weights: Mapping[int, Any]) -> None:
        thin = isinstance(module, thin_layers())
        for name in by_module[id(module)]:
            wish = wishes[name]
            key = (wish.gram, wish.rows, None if wish.weigh is None else id(wish.weigh.__self__))
            # linear layers that share an input (query, key, value) share its moments, unless it was changed in between
            if thin and latest and latest[0] is x and latest[1] == x._version and key in latest[2]:
                add(name, latest[2][key], True)
                continue
            new = moments(module, x, wish, None if wish.weigh is None else weights[key[2]])  # type: ignore[index]
            if thin and not (latest and latest[0] is x and latest[1] == x._version):
                latest[:] = [x, x._version, {}]
            if thin:
                latest[2][key] = new
            else:
                latest.clear()
            add(name, new, thin)

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        if weighed:
            seen.append((module, args[0]))
        else:
            take(module, args[0], {})

    def attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # torch's attention never calls its output layer: with the identity in its place it gives that layer's inputs
        output = module.out_proj
        width = output.in_features
        module._modules["out_proj"] = same = torch.nn.Linear(width, width, bias=False, device="meta")
        same.weight = torch.nn.Parameter(torch.eye(width, dtype=output.weight.dtype, device=output.weight.device))
        try:
            hook(output, (module.forward(*args, **kwargs)[0],))
        finally:
            module._modules["out_proj"] = output

    def listen(module: Any, args: Any, out: Any) -> None:
        # the attention probabilities that an eager attention layer gives beside its output
        if isinstance(out, tuple) and len(out) > 1 and getattr(out[1], "ndim", 0) == 4:
            held["attention"] = out[1]

    def begin(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = by_name(block, args, kwargs)
        if not args or not getattr(args[0], "is_floating_point", lambda: False)():
            raise CalibrationError(
                f"tokens are weighed in repeated blocks, whose input is hidden states; {type(block).__name__} gets something else"
            )
        held["hidden"] = args[0]
        if "attention_mask" in inspect.signature(block.forward).parameters:
            kwargs["attention_mask"] = additive_mask(block, args[0], kwargs.get("attention_mask"))
        return args, kwargs

    for module in {id(w.module): w.module for w in wishes.values()}.values():
        handles.append(module.register_forward_pre_hook(hook))
    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention) and id(module.out_proj) in by_module:
            handles.append(module.register_forward_pre_hook(attention, with_kwargs=True))
        if weighed and module is not model and any(True for _ in module.children()):
            handles.append(module.register_forward_hook(listen))
    if weighed:
        handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
    try:
        with _eager(network) if weighed else contextlib.nullcontext():
            for _ in runs():
                weights = {}
                if weighed and "attention" not in held:
                    raise CalibrationError(
                        f"{type(model).__name__} shows no attention probabilities to weigh tokens by; allowed: blocks of transformers "
                        f"models with eager attention"
                    )
                for number, weigh in weighed.items():
                    weights[number] = weigh(held["attention"], held["hidden"])
                for module, x in seen:
                    take(module, x, weights)
                seen.clear()
                held.clear()
                latest.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def additive_mask(block: Any, hidden: Any, mask: Any) -> Any:
    """The attention mask of a block as eager attention takes it: added to the logits. None stands for causal attention where the
    block's is causal, as the fused kernels have it."""
    import torch

    lowest = torch.finfo(hidden.dtype).min
    if mask is None:
        if not any(getattr(m, "is_causal", False) for m in block.modules()):
            return None
        return torch.full((1, 1, hidden.shape[1], hidden.shape[1]), lowest, dtype=hidden.dtype).triu_(1)
    return torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill_(~mask, lowest) if mask.dtype == torch.bool else mask


@contextlib.contextmanager
def _eager(network: Any) -> Iterator[None]:
    """The network computes attention probabilities openly."""
    config = getattr(network, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        yield
        return
    usual = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = usual


def columns(module: Any, x: Any) -> Any:
    """The inputs of a layer as the rows that its weight, out x in, is multiplied with.

    A convolution's rows are its patches, padded as it pads. With groups every group has patches of its own and all filters the
    same width, so the rows of all groups come one after another: what is gathered is the sum of the groups' X^T X.
    """
    import torch

    if not isinstance(module, torch.nn.modules.conv._ConvNd):
        return x.reshape(-1, x.shape[-1]).float()
    dimensions = len(module.kernel_size)
    x = x if x.ndim == dimensions + 2 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = torch.nn.functional.pad(x.float(), module._reversed_padding_repeated_twice, mode=mode)
    for i, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    batch, channels, *places = x.shape[: 2 + dimensions]
    x = x.reshape(batch, module.groups, channels // module.groups, *places, *module.kernel_size)
    moved = [0, 1, *range(3, 3 + dimensions), 2, *range(3 + dimensions, 3 + 2 * dimensions)]
    return x.permute(moved).reshape(-1, module.weight[0].numel()).float()
