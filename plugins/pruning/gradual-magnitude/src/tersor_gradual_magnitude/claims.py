"""What the paper claims, on handwritten digits: large-sparse networks against small-dense ones of equal stored bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import tersor
from tersor import track
from tersor.evidence import Row, claim, data

_STEPS, _BATCH = 2500, 64
_LARGE = 256


def dataset() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out digits of scikit-learn: float 64 features in [0, 1], and labels; the last 597 are held out."""
    images, labels = data.digits()
    x = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 240)
    y = torch.from_numpy(labels.astype(np.int64))
    return x[:1200], y[:1200], x[1200:], y[1200:]


def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """MNIST, where it is at hand: 9,000 images to train on and 5,000 held out, at 28 x 28."""
    path = data.shared("mnist/mnist_dev.npz")
    if path is None:
        return None
    with np.load(path) as d:
        x, x_test = (torch.from_numpy(d[k].reshape(len(d[k]), -1).astype(np.float32) / 255) for k in ("x_train", "x_test"))
        y, y_test = (torch.from_numpy(d[k].astype(np.int64)) for k in ("y_train", "y_test"))
    return x, y, x_test, y_test


def network(features: int, hidden: int) -> nn.Sequential:
    """Two hidden layers of equal width."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def train(hidden: int, seed: int, keep: float | None, splits: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[nn.Module, float]:
    """A network trained with (``keep``) or without pruning, and its accuracy on what was held out."""
    x, y, x_test, y_test = splits
    torch.manual_seed(seed)
    net = network(x.shape[1], hidden)
    pruning = None
    if keep is not None:
        pruner = tersor.pruner("gradual-magnitude", keep=keep, begin=_STEPS // 10, end=_STEPS * 7 // 10, frequency=10)
        pruning = pruner.attach(net)  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, _STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        pick = torch.randint(len(x), (_BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(net(x[pick]), y[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if pruning is not None:
            pruning.step()
    with torch.no_grad():
        accuracy = float((net(x_test).argmax(1) == y_test).float().mean())
    return net, accuracy


def stored_bytes(net: nn.Module, keep: float) -> int:
    """Length of the file with all parameters: weights sparse at ``keep``, biases whole."""
    weights = {k: p.detach() for k, p in net.named_parameters() if p.ndim >= 2}
    biases = {k: p.detach() for k, p in net.named_parameters() if p.ndim < 2}
    sparse = tersor.pruner("gradual-magnitude", keep=keep).encode(weights).nbytes
    return sparse + tersor.pruner("gradual-magnitude", keep=1.0).encode(biases).nbytes


def compare(keep: float, seeds: list[int], splits: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, float]:
    """Mean accuracies over seeds, and the bytes of both files; the dense network is the narrowest of at least as many bytes."""
    sparse, dense = [], []
    for seed in seeds:
        net, accuracy = train(_LARGE, seed, keep, splits)
        sparse.append(accuracy)
        size = stored_bytes(net, keep)
    hidden = next(h for h in range(1, _LARGE) if stored_bytes(network(splits[0].shape[1], h), 1.0) >= size)
    for seed in seeds:
        dense.append(train(hidden, seed, None, splits)[1])
    small = stored_bytes(network(splits[0].shape[1], hidden), 1.0)
    return {
        "sparse": float(np.mean(sparse)),
        "dense": float(np.mean(dense)),
        "bytes": size,
        "dense_bytes": small,
        "hidden": hidden,
    }


@claim("large-sparse beats small-dense at equal stored bytes")
def large_sparse(seed: int) -> list[Row]:
    """Networks of two hidden layers of 256, pruned to 20, 10, 5 and 2.5 % of their weights; three seeds each."""
    rows = []
    for name, splits in (("digits", dataset()), ("MNIST", mnist())):
        if splits is None:
            continue
        for keep in track((0.2, 0.1, 0.05, 0.025), name):
            r = compare(keep, [seed, seed + 1, seed + 2], splits)
            rows.append(
                Row(
                    claim=f"{name}: large network at keep {keep} above a small dense one",
                    metric="held-out accuracy, mean of 3 seeds", ours=r["sparse"], baseline=r["dense"],
                    baseline_name=f"dense, hidden width {r['hidden']:.0f}", better="higher",
                    note=f"files of {r['bytes']:.0f} and {r['dense_bytes']:.0f} bytes",
                )
            )  # fmt: skip
    return rows
