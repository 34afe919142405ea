"""A weight method over a whole network, block by block, with calibration.

The network is split into its repeated blocks. For each block the calibration data passes through once to gather what every
linear layer sees (the Gram matrix of its inputs), the layers are compressed and replaced by what their files decode to, and the
data passes through again, so that the next block is calibrated on what it will get. Finished blocks are kept in a journal
beside the output; a killed run that is started again takes them from there. Memory beyond the model is bounded by the Gram
matrices and codes of one block and the calibration data's hidden states.
"""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from tersor import container
from tersor.api import apply_method, as_method, load_payload, payload_of, restore
from tersor.arrays import buffer
from tersor.errors import CalibrationError, ConfigError, CorruptPayloadError, FileError, InputError, PluginError
from tersor.files import atomic_write
from tersor.io import _library
from tersor.jobs import Lost, Pool
from tersor.model.loading import as_folder, load_model
from tersor.model.recipe import Recipe
from tersor.model.statistics import ROWS, View, Wish, by_name, call, gather, layers, squared_gradients, thin_layers, transposed
from tersor.progress import track
from tersor.results import Calibration, Payload, Spec

_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


@attrs.frozen
class _Target:
    """One tensor that gets a method: its full name, the block that it is in, the module that holds it."""

    name: str
    block: int
    pattern: str
    method: Any
    module: Any

    @property
    def folded(self) -> bool:
        """Whether the tensor is a layer's weight, which calibration reaches."""
        return isinstance(self.module, layers()) and self.name.endswith("weight")

    def weight(self) -> Any:
        """The tensor as methods see it: out x in."""
        parameter = self.module.get_parameter(self.name.rpartition(".")[2]).detach()
        return parameter.T if self.folded and transposed(self.module) else parameter

    def put(self, payload: Payload) -> None:
        """Give the tensor the values that a payload stands for."""
        import torch

        value = restore(payload)
        value = value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
        self.weight().copy_(value)


def find_blocks(model: Any) -> tuple[str, list[Any]]:
    """The longest list of modules of one class in a network, and its name; the network itself where there is none."""
    import torch

    best: tuple[str, list[Any]] = ("", [model])
    for name, module in model.named_modules():
        if best[0] and name.startswith(best[0] + "."):
            continue  # a list inside a block (experts, heads) is part of the block
        longer = isinstance(module, torch.nn.ModuleList) and len(module) > (len(best[1]) if best[0] else 1)
        if longer and len({type(m) for m in module}) == 1:
            best = (name, list(module))
    return best


def _targets(model: Any, method: Any, recipe: Recipe) -> list[_Target]:
    """Tensors that get a method: what the recipe says, and every linear layer of the blocks for the rest; in a network without
    repeated blocks every linear and convolution layer."""
    prefix, _ = find_blocks(model)
    out = []
    parameters = dict(model.named_parameters())
    recipe.check(n for n, p in parameters.items() if p.ndim >= 2)
    for name, parameter in parameters.items():
        holder = model.get_submodule(name.rpartition(".")[0])
        block = -1
        if not prefix:
            block = 0
        elif name.startswith(prefix + "."):
            block = int(name[len(prefix) + 1 :].split(".")[0])
        rule = recipe.match(name) if parameter.ndim >= 2 else None
        kinds = thin_layers() if prefix else layers()
        if rule is None and block >= 0 and isinstance(holder, kinds) and name.endswith("weight"):
            rule = ("(default)", method)
        if rule is not None and rule[1] is not None:
            out.append(_Target(name, block, rule[0], rule[1], holder))
    if not out:
        raise ConfigError("no tensor of the model gets a method; the default takes the linear layers of its repeated blocks")
    return out


def plan_model(source: Any, method: Any, recipe: Any = None) -> list[dict[str, Any]]:
    """What :func:`compress_model` would do, without doing it: each tensor with its shape, the pattern that matched, the method.

    Raises :class:`tersor.ConfigError` for a pattern that matches nothing.
    """
    method, recipe = as_method(method), Recipe.of(recipe)
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".safetensors":
        rules = list(_plan_tensors(Path(source), method, recipe))
        plan, shapes = {n: r for n, r, _ in rules}, {n: s for n, _, s in rules}
    else:
        model = load_model(source)[0] if isinstance(source, (str, os.PathLike)) else source
        plan = {t.name: (t.pattern, t.method) for t in _targets(model, method, recipe)}
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    rows = []
    for name, shape in shapes.items():
        pattern, chosen = plan.get(name) or (recipe.match(name) if len(shape) >= 2 else None) or ("", None)
        rows.append(
            {"tensor": name, "shape": list(shape), "pattern": pattern, "method": str(chosen) if chosen else "kept as it is"}
        )
    return rows


class _Stop(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


def _first_inputs(model: Any, blocks: list[Any], batches: Iterable[Any]) -> tuple[list[Any], dict[int, list[dict[str, Any]]]]:
    """For each batch the arguments of the first block; and for blocks whose other arguments are not those of the block before
    (masks and positions that depend on the kind of layer), these arguments, batch by batch."""
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    extra: dict[int, list[dict[str, Any]]] = {}
    before: dict[str, Any] = {}
    uniform = False

    def hook(number: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal before, uniform
        args, kwargs = by_name(blocks[number], args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "layer_past", "use_cache")}
        if number == 0:
            if not args:
                raise CalibrationError(
                    f"{type(blocks[0]).__name__} is called by keyword alone; calibration needs its input first"
                )
            caught.append((args, kwargs))
        elif set(kwargs) != set(before) or any(kwargs[k] is not before[k] for k in kwargs):
            extra.setdefault(number, []).append(kwargs)
        before = kwargs
        if number == len(blocks) - 1 or uniform:
            raise _Stop

    handles = [b.register_forward_pre_hook(functools.partial(hook, n), with_kwargs=True) for n, b in enumerate(blocks)]
    try:
        for batch in batches:
            try:
                call(model, batch)
            except _Stop:
                # where all blocks of the first batch were called alike, the others need not go beyond the first block
                uniform = not extra
    finally:
        for handle in handles:
            handle.remove()
    return caught, extra


def _one(method: Any, weight: Any, calibration: Calibration | None) -> Payload:
    import torch

    with torch.no_grad():  # which is a matter of each thread
        return apply_method(method, weight, calibration)


def _at_a_distance(call: tuple[Any, ...]) -> bytes | Exception:
    """What a worker does, and sends back: the payload's bytes, or what went wrong."""
    try:
        return _one(*call).to_bytes()
    except Exception as error:
        return error


def _spread(calls: list[tuple[Any, ...]], pool: Pool) -> Iterator[Payload]:
    done: dict[int, Payload] = {}
    following = 0
    for number, value in pool.map(_at_a_distance, calls):
        if isinstance(value, Lost):
            raise OSError(f"a tensor could not be compressed: {value}")
        if isinstance(value, Exception):
            raise value
        payload, method = Payload.from_bytes(value), calls[number][0]
        if method._own_state is not None:
            payload.method = payload.method.with_state(method._own_state)
        done[number] = payload
        while following in done:
            yield done.pop(following)
            following += 1


def _each(calls: list[tuple[Any, ...]], jobs: int | Pool) -> Iterator[Payload]:
    """Payloads of (method, weight, calibration), in order; several at a time where there are ``jobs``."""
    if isinstance(jobs, Pool):
        yield from _spread(calls, jobs)
        return
    if jobs == 1 or len(calls) < 2:
        yield from (_one(*call) for call in calls)
        return
    joblib = _library("joblib", "joblib", f"jobs={jobs}")
    yield from joblib.Parallel(n_jobs=jobs, prefer="threads", return_as="generator")(joblib.delayed(_one)(*c) for c in calls)


def _check_jobs(jobs: int | Pool) -> None:
    if isinstance(jobs, Pool):
        return
    if not isinstance(jobs, int) or isinstance(jobs, bool) or (jobs < 1 and jobs != -1):
        raise ConfigError(f"jobs={jobs!r}; allowed: 1 or more, or -1 for one on each core")


def _walk(
    model: Any, targets: list[_Target], batches: list[Any], done: Callable[[str], Payload | None],
    place: Callable[[_Target, Payload], None] = _Target.put, jobs: int | Pool = 1,
) -> Iterator[tuple[_Target, Payload]]:  # fmt: skip
    """Compress every target in order and ``place`` it in the model (default: the weight becomes what its file decodes to);
    ``done`` gives what is there already."""
    import torch

    _check_jobs(jobs)
    training = [m for m in model.modules() if m.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it calls no layer, so that nothing would see their inputs
    try:
        yield from _compress_blocks(model, targets, batches, done, place, jobs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for m in training:
            m.training = True


def _compress_blocks(
    model: Any, targets: list[_Target], batches: list[Any], done: Callable[[str], Payload | None],
    place: Callable[[_Target, Payload], None], jobs: int | Pool,
) -> Iterator[tuple[_Target, Payload]]:  # fmt: skip
    import torch

    prefix, blocks = find_blocks(model)
    calibrated = any(t.method.calibration != "none" for t in targets) and bool(batches)
    by_block: dict[int, list[_Target]] = {}
    for t in targets:
        by_block.setdefault(t.block, []).append(t)
    known = _survey(model, targets, batches, done) if calibrated else {}

    def compress(
        mine: list[_Target], ready: dict[str, Payload | None], seen: dict[str, Any]
    ) -> Iterator[tuple[_Target, Payload]]:
        def calibration(t: _Target) -> Calibration | None:
            found, told = seen.pop(t.name, None), known.pop(t.name, None)
            if found is None and told is None:
                return None
            out = Calibration(layer=t.name) if found is None else found.calibration(t.name)
            told = told or {}
            gradients: Any = told.get("gradients")
            turned = gradients is not None and t.folded and transposed(t.module)
            return attrs.evolve(out, gradients=gradients.T if turned else gradients, extra={**out.extra, **told.get("extra", {})})

        calls = [(t.method, t.weight(), calibration(t)) for t in mine if ready[t.name] is None]
        found = _each(calls, jobs)
        for t in mine:
            payload = ready.pop(t.name)
            payload = next(found) if payload is None else payload
            place(t, payload)
            yield t, payload

    with torch.no_grad():
        outside = by_block.pop(-1, [])
        for t in outside:
            if t.method.calibration == "required":
                raise CalibrationError(
                    f"{t.name} is outside the blocks, where no calibration reaches; {t.method.name} requires it"
                )
        yield from compress(outside, {t.name: done(t.name) for t in outside}, {})
        whole = len(blocks) == 1 and blocks[0] is model
        # the last block that data has to reach: beyond it no method wants inputs, or to look at a block
        seeing = [t.block for t in targets if t.method.calibration != "none" and _sees(t.method)] if calibrated else []
        watched = max(seeing, default=-1)
        states, others = _first_inputs(model, blocks, batches) if watched >= 0 and not whole else ([], {})
        for number in track(range(len(blocks)), "blocks"):
            mine = by_block.get(number, [])
            if number in others:  # masks or positions of its own
                states = [(args, own) for (args, _), own in zip(states, others[number])]

            ready = {t.name: done(t.name) for t in mine}
            todo = [t for t in mine if t.method.calibration != "none" and ready[t.name] is None]
            for t in todo:
                if t.method.calibration == "required" and not t.folded:
                    kind = type(t.module).__name__
                    raise CalibrationError(
                        f"{t.name} belongs to a {kind}; calibration reaches linear and convolution layers only"
                    )
            todo = [t for t in todo if t.folded] if calibrated else []
            block = model if whole else model.get_submodule(f"{prefix}.{number}")  # which may have been replaced
            inputs = batches if whole else states
            for name, extra in _studied("block", todo, block, inputs, not whole).items():
                known.setdefault(name, {}).setdefault("extra", {}).update(extra)
            seen = {}
            if wishes := _wishes(todo, len(batches)):

                def runs(block: Any = block, inputs: Any = inputs, whole: bool = whole) -> Iterator[Any]:
                    for x in inputs:
                        yield call(block, x) if whole else block(*x[0], **x[1])

                seen = gather(block, wishes, runs, model)
            yield from compress(mine, ready, seen)
            _give_back()
            if number < watched and not whole:
                block = model.get_submodule(f"{prefix}.{number}")
                for i, (args, kwargs) in enumerate(states):
                    out = block(*args, **kwargs)
                    states[i] = ((out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs)


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):  # no glibc
        return lambda _: 0


def _give_back() -> None:
    """Memory that was freed goes back to the system: glibc keeps what a block's work left, and the next one takes more."""
    _trim()(0)


def _sees(method: Any) -> bool:
    """Whether a method wants anything of what passes through the blocks while they are compressed."""
    return method.studies == "block" or not {"gram", "inputs"}.isdisjoint(method.wants)


def _wishes(targets: list[_Target], batches: int) -> dict[str, Wish]:
    """What the methods of these targets want of their layers' inputs."""
    out = {}
    for t in targets:
        m = t.method
        gram, rows = "gram" in m.wants, -(-ROWS // max(batches, 1)) if "inputs" in m.wants else 0
        if gram or rows:
            out[t.name] = Wish(t.module, gram, rows, m.token_weights)
    return out


def _studied(scope: str, targets: list[_Target], module: Any, inputs: list[Any], block: bool) -> dict[str, Mapping[str, Any]]:
    """What the methods that study this scope find out about it: layer names to their extras."""
    import torch

    by_method: dict[Any, list[_Target]] = {}
    for t in targets:
        if t.method.studies == scope:
            by_method.setdefault(t.method, []).append(t)
    out: dict[str, Mapping[str, Any]] = {}
    for method, mine in by_method.items():
        with torch.enable_grad():
            found = method._study(View(module, {t.name: t.module for t in mine}, inputs, block))
        strange = set(found) - {t.name for t in mine}
        if strange:
            raise PluginError(f"{method.name} studied {sorted(strange)[0]!r}, which is none of its layers")
        out.update(found)
    return out


def _survey(
    model: Any, targets: list[_Target], batches: list[Any], done: Callable[[str], Payload | None]
) -> dict[str, dict[str, Any]]:
    """What is known of layers before the first of them is compressed: gradients, and what methods find out about the network.

    Nothing is done for methods whose layers are all done already.
    """
    reached = [t for t in targets if t.folded and t.block >= 0 and t.method.calibration != "none"]
    open_ = {
        id(t.method) for t in reached if ("gradients" in t.method.wants or t.method.studies == "network") and not done(t.name)
    }
    reached = [t for t in reached if id(t.method) in open_]
    out: dict[str, dict[str, Any]] = {}
    wanted = {t.name: t.module.weight for t in reached if "gradients" in t.method.wants}
    if wanted:
        for name, value in squared_gradients(model, wanted, batches).items():
            out[name] = {"gradients": value}
    for name, extra in _studied("network", reached, model, batches, False).items():
        out.setdefault(name, {})["extra"] = dict(extra)
    return out


def quantize(model: Any, method: Any, batches: Any = None, recipe: Any = None, jobs: int = 1) -> dict[str, Payload]:
    """Apply a weight method to a network in memory: its weights become what their files decode to.

    ``model``: any torch module; ``batches``: inputs of its forward (tensors, tuples or dicts), for methods with calibration.
    ``jobs``: layers compressed at a time, with the same result (threads, unless joblib was told otherwise; needs joblib).
    Returns tensor names to payloads, whose ``nbytes`` is what each costs.
    Raises :class:`tersor.CalibrationError` where calibration is required and there are no batches.
    """
    method, recipe = as_method(method), Recipe.of(recipe)
    targets = _targets(model, method, recipe)
    batches = list(batches or [])
    _need_batches(targets, batches)
    return {t.name: payload for t, payload in _walk(model, targets, batches, lambda _: None, jobs=jobs)}


def _need_batches(targets: list[_Target], batches: Any) -> None:
    for t in targets:
        if t.method.calibration == "required" and not batches:
            raise CalibrationError(f"{t.method.name} needs calibration data, and none was given")


def calibration_windows(tokenizer: Any, text: str, samples: int, window: int) -> list[Any]:
    """``samples`` windows of ``window`` tokens, evenly spread over the text, as 1 x window tensors."""
    import torch

    if samples < 1 or window < 2:
        raise CalibrationError(f"samples={samples}, window={window}; allowed: at least 1 window of at least 2 tokens")
    if tokenizer is None:
        raise CalibrationError("the model comes without a tokenizer, so text cannot calibrate it; give token windows instead")
    step = max(len(text) // samples, 1)
    out = []
    for i in range(samples):
        ids = tokenizer(text[i * step : i * step + window * 12], add_special_tokens=False, verbose=False)["input_ids"][:window]
        if len(ids) == window:
            out.append(torch.tensor([ids], dtype=torch.long))
    if not out:
        raise CalibrationError(f"the calibration text of {len(text)} characters has no window of {window} tokens")
    return out


def _fingerprint(path: Path) -> list[Any]:
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _identity(method: Any) -> list[Any]:
    """What decides the result of a method beside its settings: where it comes from, its version, its state."""
    return [*method.origin(), method.config_version, method.state_id.hex() if method.fitted else ""]


def _digest_of(batches: Iterable[Any]) -> str:
    """The content of calibration batches: tensors, tuples or dicts of them."""
    digest = hashlib.sha256()
    for batch in batches:
        for value in batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,):
            dtype, shape, view = buffer(value)
            digest.update(f"{dtype}{shape}".encode())
            digest.update(view)
    return digest.hexdigest()


def _stored_types(folder: Path) -> dict[str, Any]:
    """The 16-bit element types of the tensors in a model's folder, by name: what is kept is stored as it was."""
    import torch
    from safetensors import SafetensorError, safe_open

    names = {"BF16": torch.bfloat16, "F16": torch.float16}
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                types = {n: file.get_slice(n).get_dtype() for n in file.keys()}  # noqa: SIM118
        except SafetensorError:
            continue
        out.update({n: names[t] for n, t in types.items() if t in names})
    return out


class _Journal:
    """Finished tensors on disk, so that a killed run goes on where it stopped."""

    def __init__(self, out: Path, key: Any) -> None:
        self.folder = out.with_name(out.name + ".partial")
        stamp = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        mark = self.folder / "journal.json"
        if self.folder.exists():
            try:
                same = json.loads(mark.read_text("utf-8"))["key"] == stamp
            except (OSError, ValueError, KeyError, TypeError):
                same = False
            if not same and not mark.is_file() and any(self.folder.iterdir()):
                raise InputError(f"{self.folder} exists and is no journal of an earlier run; move it, or choose another output")
            if not same:
                shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        if not mark.is_file():
            with atomic_write(mark) as file:
                file.write(json.dumps({"key": stamp}).encode())

    def path(self, name: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:24] + ".tsr")

    def get(self, name: str) -> Payload | None:
        path = self.path(name)
        try:
            return load_payload(path) if path.is_file() else None
        except FileError:  # damaged since it was written: the tensor is done again
            path.unlink()
            return None

    def put(self, name: str, payload: Payload) -> None:
        if not self.path(name).is_file():
            payload.save(self.path(name))


def compress_model(
    source: str | os.PathLike[str], method: Any, out: str | os.PathLike[str], *, calibration: Any = None, recipe: Any = None,
    samples: int = 32, window: int = 512, jobs: int = 1, engine: str | None = None,
) -> Path:  # fmt: skip
    """Compress a transformers folder, a GGUF file or a ``.safetensors`` file into one ``.tsr`` file.

    ``method``: for the linear layers of the repeated blocks; ``recipe``: a :class:`Recipe`, or what :meth:`Recipe.of` takes, for
    other choices. Tensors without a method are kept as they are. ``calibration``: text, or a list of 1 x n token windows;
    default: English text that ships with Python. ``samples`` windows of ``window`` tokens are taken from a text.
    ``jobs``: tensors compressed at a time, with the same file as result (threads, unless joblib was told otherwise).
    ``engine``: ``"loky"``, ``"dask://HOST:PORT"`` or ``"ray"``: the tensors of a block go to these workers, see
    :func:`tersor.jobs.run`; a worker that dies loses nothing but time.
    A run that was killed and is started again with the same arguments goes on where it stopped.
    Raises :class:`tersor.ConfigError`, :class:`tersor.CalibrationError`, :class:`tersor.InputError`, OSError.
    """
    method, recipe, out = as_method(method), Recipe.of(recipe), Path(out)
    src = Path(source)
    _check_jobs(jobs)
    with contextlib.ExitStack() as stack:
        workers = jobs if engine is None else stack.enter_context(Pool(jobs, engine))
        return _compress_model(src, method, out, calibration, recipe, samples, window, workers)


def _compress_model(
    src: Path, method: Any, out: Path, calibration: Any, recipe: Recipe, samples: int, window: int, jobs: int | Pool
) -> Path:
    rules = [[p, str(m) if m else None] for p, m in recipe.rules]
    text = calibration if isinstance(calibration, str) else None
    used = [method, *(m for _, m in recipe.rules if m is not None)]
    key: list[Any] = [str(src.resolve()), _fingerprint(src), str(method), rules, samples, window, [_identity(m) for m in used]]
    if src.suffix == ".safetensors":
        parts, meta = _compress_tensors(src, method, recipe, out, key, jobs)
    else:
        folder = as_folder(src)
        model, tokenizer = load_model(folder)
        targets = _targets(model, method, recipe)
        batches: list[Any] = []
        if any(t.method.calibration != "none" for t in targets):
            if calibration is None:
                from tersor.data import english_text

                text = english_text()
            batches = calibration_windows(tokenizer, text, samples, window) if text is not None else list(calibration)
        _need_batches(targets, batches)
        journal = _Journal(out, [*key, _digest_of(batches)])
        parts, meta = {}, {}
        for t, payload in _walk(model, targets, batches, journal.get, jobs=jobs):
            journal.put(t.name, payload)
            parts[f"t:{t.name}"] = container.load_bytes(journal.path(t.name))
            del payload
        turned = [t.name for t in targets if t.folded and transposed(t.module)]
        if turned:
            meta["transposed"] = turned
        stored = _stored_types(folder)
        taken: dict[Any, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = taken.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype), name)
            if first != name and tensor.numel():
                meta.setdefault("ties", {})[name] = first
            elif f"t:{name}" not in parts:
                kept = tensor.detach()
                narrow = kept.to(stored[name]) if name in stored else kept
                parts[f"r:{name}"] = narrow if bool((narrow.to(kept.dtype) == kept).all()) else kept
        for pattern in _FILES:
            for file in sorted(folder.glob(pattern)):
                if not file.name.endswith(".index.json"):
                    parts[f"f:{file.name}"] = file.read_bytes()
    from tersor import __version__

    header = container.Header(
        kind="model", method=method.name, distribution=method.origin()[0], version=__version__,
        bitwise=all(m.bitwise for m in used), meta={**meta, "recipe": rules, "method": str(method)},
        spec=Spec("weight", (), "float32"),
    )  # fmt: skip
    container.write(out, header, parts)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    return out


def _plan_tensors(src: Path, method: Any, recipe: Recipe) -> Iterator[tuple[str, tuple[str, Any] | None, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(src, "np") as file:
            shapes = {n: (tuple(file.get_slice(n).get_shape()), file.get_slice(n).get_dtype()) for n in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{src} is not a safetensors file: {error}") from error
    matrices = [n for n, (s, d) in shapes.items() if len(s) >= 2 and d in ("F16", "F32", "F64", "BF16")]
    recipe.check(matrices)
    for name, (shape, _) in shapes.items():
        rule = None
        if name in matrices:
            rule = recipe.match(name) or ("(default)", method)
        yield name, rule, shape


def _compress_tensors(
    src: Path, method: Any, recipe: Recipe, out: Path, key: Any, jobs: int | Pool = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file of named tensors without a network: as many tensors in memory at a time as jobs, no calibration."""
    from safetensors import safe_open

    parts: dict[str, Any] = {}
    plan = list(_plan_tensors(src, method, recipe))
    for _, rule, _ in plan:
        if rule is not None and rule[1] is not None and rule[1].calibration == "required":
            raise CalibrationError(
                f"{rule[1].name} needs calibration data, and a .safetensors file is not a network that data can pass through; "
                f"give the model's folder"
            )
    journal = _Journal(out, key)
    size = 16 if isinstance(jobs, Pool) else (os.cpu_count() or 1) if jobs == -1 else jobs
    with safe_open(src, "pt") as file:
        for start in track(range(0, len(plan), size), "tensors"):
            some = plan[start : start + size]
            todo = [(n, r[1]) for n, r, _ in some if r is not None and r[1] is not None and journal.get(n) is None]
            for (name, _), payload in zip(todo, _each([(m, file.get_tensor(n), None) for n, m in todo], jobs), strict=True):
                journal.put(name, payload)
            for name, rule, _ in some:
                chosen = rule is not None and rule[1] is not None
                parts[f"{'t' if chosen else 'r'}:{name}"] = (
                    container.load_bytes(journal.path(name)) if chosen else file.get_tensor(name)
                )
    return parts, {}


def _plain(name: str) -> bool:
    """Whether a file of a model may have this name: one of the kinds that are stored, without a path."""
    if not name or len(name) > 200 or name.startswith(".") or any(c in name for c in "/\\\0"):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _FILES)


_FILE_SUFFIXES = {".npy", ".bin", ".gguf", ".pt", ".pth", ".tsr", ".json", ".png", ".wav"}


def restore_model(
    header: container.Header, views: Mapping[str, memoryview], out: Any = None, limit: int | None = None, replace: bool = False
) -> Any:
    """What a model's ``.tsr`` file holds: a dict of tensors, or written to ``out``.

    ``out``: a folder that transformers loads, or a ``.safetensors`` file. It is written aside and renamed when complete.
    ``replace``: put it in the place of a folder that is there. Raises the errors under :class:`tersor.FileError`,
    :class:`tersor.InputError` for an ``out`` that exists or is no place for a model, OSError.
    """
    from safetensors.torch import save_file

    from tersor.arrays import from_buffer, to_torch

    tensors: dict[str, Any] = {}
    turned = header.meta.get("transposed", [])
    if not isinstance(turned, list) or not all(isinstance(n, str) for n in turned):
        raise CorruptPayloadError("the file's list of transposed tensors is none")
    left = limit  # given: for all tensors together; else each has the limit of one array
    for part in track(header.parts, "restoring"):
        kind, _, name = part.name.partition(":")
        if kind == "t":
            nested, inner = container.read(views[part.name])
            if nested.kind == "model":
                raise CorruptPayloadError(f"tensor {name!r} is a whole model")
            value = restore(payload_of(nested, inner), left)
            if not hasattr(value, "shape"):
                raise CorruptPayloadError(f"tensor {name!r} decodes to a {type(value).__name__}")
            tensors[name] = to_torch(value)
            if name in turned and tensors[name].ndim == 2:
                tensors[name] = tensors[name].T.contiguous()
            left = None if left is None else left - tensors[name].numel() * tensors[name].element_size()
        elif kind == "r" and part.dtype != "bytes":
            tensors[name] = from_buffer(part.dtype, part.shape, views[part.name], "torch")
        elif kind != "f" or part.dtype != "bytes" or not _plain(name):
            raise CorruptPayloadError(f"part {part.name!r} is neither a tensor nor a configuration file with a plain name")
    ties = header.meta.get("ties", {})
    if not isinstance(ties, dict) or not all(isinstance(v, str) and v in tensors for v in ties.values()):
        raise CorruptPayloadError("the file ties a tensor to one that is not there")
    if out is None:
        return {**tensors, **{k: tensors[v] for k, v in ties.items()}}
    out = Path(out)
    if out.suffix == ".safetensors":
        with atomic_write(out) as file:
            from safetensors.torch import save

            whole = {**tensors, **{k: tensors[v].clone() for k, v in ties.items()}}
            file.write(save({k: v.contiguous() for k, v in whole.items()}))
        return out
    if out.suffix and not out.is_dir() and out.suffix.lower() in _FILE_SUFFIXES:
        raise InputError(f"a model is written to a folder or a .safetensors file; given: {out.name}")
    if out.exists() and not (out.is_dir() and (replace or not any(out.iterdir()))):
        raise InputError(f"{out} exists; choose another folder" + ("" if replace else ", or replace=True"))
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    aside.chmod(0o755)
    try:
        for part in header.parts:
            if part.name.startswith("f:"):
                (aside / part.name[2:]).write_bytes(views[part.name])
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside / "model.safetensors", metadata={"format": "pt"})
        if out.is_dir():
            old = out.with_name(f".{out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
            os.replace(aside, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out
