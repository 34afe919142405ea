"""The paper's claims with networks of 100,000 to 500,000 parameters, trained from scratch on one thread."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import tersor
from tersor.evidence import Row, claim, data

SEEDS = {"vision": 3, "language": 2}
CONTEXT, EMBEDDING = 16, 24  # characters that a prediction sees, dimensions of each


def _train(network: Any, batches: Any, steps: int, rate: float) -> None:
    """AdamW (weight decay 0.01) with a cosine schedule; ``batches``: yields inputs and labels."""
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _, (x, labels) in zip(range(steps), batches, strict=False):
        loss = torch.nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _images() -> Iterator[tuple[str, list[Any], list[int], int]]:
    """Name, images and labels to train and to judge, widths of the layers, epochs. Standard sets where they are at hand."""
    import numpy as np
    import torch

    images, labels = data.digits()
    order = np.random.default_rng(0).permutation(len(images))
    cut = 1400
    found = [
        (
            "digits 8 x 8",
            [images[order[:cut]], labels[order[:cut]], images[order[cut:]], labels[order[cut:]]],
            [64, 256, 256, 256, 10],
            60,
        )
    ]
    if path := data.shared("mnist/mnist_dev.npz"):
        sets = np.load(path)
        found.append(
            ("MNIST, 9,000 images", [sets[k] for k in ("x_train", "y_train", "x_test", "y_test")], [784, 256, 256, 10], 15)
        )
    paths = [data.shared(f"cifar10/cifar10_{k}.npz") for k in ("train_lossless", "test_fromjpeg")]
    if paths[0] and paths[1]:
        train, test = np.load(paths[0]), np.load(paths[1])
        found.append(("CIFAR-10, 3,000 images", [train["x"], train["y"], test["x"], test["y"]], [3072, 128, 128, 10], 15))
    for name, (x, y, held, truth), widths, epochs in found:
        flat = [torch.from_numpy(a.reshape(len(a), -1)).float() for a in (x, held)]
        mean, std = flat[0].mean(), flat[0].std()
        yield (
            name,
            [(flat[0] - mean) / std, torch.from_numpy(y).long(), (flat[1] - mean) / std, torch.from_numpy(truth).long()],
            widths,
            epochs,
        )


def _perceptron(widths: list[int], norm: bool) -> Any:
    """``norm``: inputs of the layers are normalised as a BitLinear does it, so that this is no difference between the networks."""
    from torch import nn

    layers: list[Any] = []
    for a, b in itertools.pairwise(widths):
        layers += [*([nn.LayerNorm(a, elementwise_affine=False)] if norm else []), nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@claim("small vision networks: ternary weights within a point of full precision at equal size")
def vision(seed: int) -> Iterator[Row]:
    """Multilayer perceptrons, all linear layers ternary; mean accuracy of three seeds; batches of 64, rate 1e-3."""
    import torch

    for name, (x, y, held, truth), widths, epochs in _images():
        found: dict[str, list[float]] = {"float32": [], "median": [], "mean": []}
        differ = 0.0
        for kind, scores in found.items():
            for run in range(seed, seed + SEEDS["vision"]):
                torch.manual_seed(run)
                network = _perceptron(widths, kind == "float32")
                if kind != "float32":
                    tersor.quantizer("bitnet-b158", measure=kind).swap(network)
                batches = ((x[b], y[b]) for _ in range(epochs) for b in torch.randperm(len(x))[: len(x) // 64 * 64].split(64))
                _train(network, batches, epochs * (len(x) // 64), 1e-3)
                with torch.no_grad():
                    scores.append(100 * float((network(held).argmax(1) == truth).float().mean()))
                    if kind == "median":
                        differ = max(differ, abs(scores[-1] - _as_integers(network, held, truth)))
        size = sum(a * b + b for a, b in itertools.pairwise(widths))
        whole = statistics.mean(found["float32"])
        for kind in ("median", "mean"):
            yield Row(claim=f"abs{kind} within one point of full precision, {name}", metric="percent correct, held-out images",
                      ours=statistics.mean(found[kind]), baseline=whole, baseline_name="float32, equal size, normalised alike", better="higher",
                      slack=1.0, note=f"{size:,} parameters; {SEEDS['vision']} seeds, deviation {statistics.stdev(found[kind]):.2f}, "
                      f"of float32 {statistics.stdev(found['float32']):.2f}")  # fmt: skip
        yield Row(claim=f"the network of integers decides as the trained one, {name}", metric="points of accuracy apart, largest of 3 seeds",
                  ours=differ, baseline=0.5, baseline_name="half a point", better="lower")  # fmt: skip


def _as_integers(network: Any, x: Any, labels: Any) -> float:
    """Percent correct of a trained network once its layers hold packed digits and multiply int8."""
    from tersor.model import compress_layers

    frozen = copy.deepcopy(network)
    compress_layers(frozen, tersor.quantizer("bitnet-b158"))
    return 100 * float((frozen(x).argmax(1) == labels).float().mean())


def _language_model(vocabulary: int, hidden: int) -> Any:
    from torch import nn

    width = CONTEXT * EMBEDDING
    body: list[Any] = [nn.Embedding(vocabulary, EMBEDDING), nn.Flatten(), nn.LayerNorm(width)]
    for inputs in (width, hidden, hidden):
        body += [nn.Linear(inputs, hidden), nn.ReLU(), nn.LayerNorm(hidden)]
    return nn.Sequential(*body, nn.Linear(hidden, vocabulary))


@claim("small language models: behind at equal size, level with full precision at twice the hidden size")
def language(seed: int) -> Iterator[Row]:
    """The next character from 16 before it (the text that ships with Python; every tenth stretch of 4096 characters is held out).

    Three hidden layers, normalised before each in all networks; the output layer stays float, as in BitNet; 1500 batches of 512, rate 2e-3.
    """
    import torch

    text = data.english_text()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[c] for c in text])
    held = torch.arange(len(ids)) // 4096 % 10 == 9
    ends = torch.arange(CONTEXT, len(ids))
    before = torch.arange(-CONTEXT, 0)
    train = ends[~held[ends] & ~held[ends - CONTEXT]]
    test = ends[held[ends] & held[ends - CONTEXT]][::4]

    def bits(hidden: int, kind: str) -> tuple[float, int]:
        """Mean bits a character of the seeds, and the bytes of the ternary layers' files (of float16 for a float network)."""
        losses = []
        for run in range(seed, seed + SEEDS["language"]):
            torch.manual_seed(run)
            network = _language_model(len(number), hidden)
            last = str(len(network) - 1)
            method = tersor.quantizer("bitnet-b158", measure="median" if kind == "float32" else kind)
            if kind != "float32":
                method.swap(network, keep=[last])
            picks = (train[torch.randint(len(train), (512,))] for _ in range(1500))
            _train(network, ((ids[at[:, None] + before], ids[at]) for at in picks), 1500, 2e-3)
            with torch.no_grad():
                loss = sum(float(torch.nn.functional.cross_entropy(network(ids[at[:, None] + before]), ids[at], reduction="sum"))
                           for at in test.split(4096))  # fmt: skip
            losses.append(loss / len(test) / math.log(2))
        layers = [m for n, m in network.named_children() if isinstance(m, torch.nn.Linear) and n != last]
        size = sum(2 * m.weight.numel() if kind == "float32" else method.quantize(m.weight.detach()).nbytes for m in layers)
        return statistics.mean(losses), size

    small, wide = 128, 256
    whole, whole_bytes = bits(small, "float32")
    found = {(kind, hidden): bits(hidden, kind) for hidden in (small, wide) for kind in ("median", "mean")}
    metric = f"bits a character, {len(test):,} held-out characters, mean of {SEEDS['language']} seeds"
    for kind in ("median", "mean"):
        yield Row(claim=f"full precision is ahead of abs{kind} at equal size", metric=metric, ours=whole, baseline=found[kind, small][0],
                  baseline_name=f"bitnet-b158:measure={kind}, hidden size {small}", better="lower")  # fmt: skip
        yield Row(claim=f"abs{kind} with twice the hidden size is level with full precision", metric=metric, ours=found[kind, wide][0],
                  baseline=whole, baseline_name=f"float32, hidden size {small}", better="lower", tie=True)  # fmt: skip
    for hidden in (small, wide):
        yield Row(claim=f"absmedian is level with absmean, hidden size {hidden}", metric=metric, ours=found["median", hidden][0],
                  baseline=found["mean", hidden][0], baseline_name="bitnet-b158:measure=mean", better="lower",
                  slack=0.01 * found["mean", hidden][0], note="within 1 %")  # fmt: skip
    yield Row(claim="with twice the hidden size the file is still smaller", metric="bytes of the hidden layers' weights", ours=found["median", wide][1],
              baseline=whole_bytes, baseline_name=f"float16, hidden size {small}", better="lower")  # fmt: skip


@claim("1.6 bits a weight, and a layer that is faster than one of float32")
def cost(seed: int) -> Iterator[Row]:
    """All 210 linear layers of SmolLM2-135M as files; a layer of 4096 x 4096 on one thread, least of 15 runs in turns."""
    import torch

    method = tersor.quantizer("bitnet-b158")
    model, _ = data.smollm2()
    layers = [m for n, m in model.named_modules() if type(m) is torch.nn.Linear and "layers" in n]
    files = [method.quantize(m.weight.detach()) for m in layers]
    measured = 8 * sum(f.nbytes for f in files) / sum(f.spec.size for f in files)
    yield Row(claim="1.6 bits a weight as written", metric="bits a weight, 210 files", ours=measured, baseline=math.log2(3),
              baseline_name="three equally likely values", better="lower", slack=0.03)  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(seed))
        layer = method.module(method.quantize(weight))
        for rows in (1, 32, 512):
            x = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(seed))
            best = [float("inf")] * 2
            with torch.inference_mode():
                layer(x)
                for _ in range(15):
                    for i, run in enumerate((layer, lambda x: torch.nn.functional.linear(x, weight))):
                        start = time.perf_counter()
                        run(x)
                        best[i] = min(best[i], time.perf_counter() - start)
            yield Row(claim=f"{rows} rows through 4096 x 4096", metric="ms", ours=1e3 * best[0], baseline=1e3 * best[1],
                      baseline_name="float32", better="lower")  # fmt: skip
    finally:
        torch.set_num_threads(threads)
