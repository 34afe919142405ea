"""What the paper claims: classes learned one after another are kept; and how the layer reconstructs beside plain VQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.evidence import Row, claim, data
from tersor_kit_vq.contest import compared, plain, trials

_RATES = (0.03, 0.3, 3.0, 30.0)  # the linear head has the best of them; the bottleneck the paper's
_STAGES = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
_STEPS, _BATCH, _DIM = 100, 128, 32


def _sets(seed: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Name, features and labels to train on, and to test on, of each data set at hand. The frozen encoder is a principal component
    analysis of the training images, without labels: 32 components, of unit deviation together."""
    x, y = data.digits()
    order = np.random.default_rng(seed).permutation(len(x))
    found = [("digits of scikit-learn", x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]])]
    if (path := data.shared("mnist/mnist_dev.npz")) is not None:
        with np.load(path, allow_pickle=False) as file:
            found.append(("MNIST", file["x_train"], file["y_train"], file["x_test"], file["y_test"]))
    for name, train, labels, test, expected in found:
        flat, other = (torch.from_numpy(np.ascontiguousarray(a)).flatten(1).float() / 255 for a in (train, test))
        centre = flat.mean(0)
        basis = torch.linalg.svd(flat - centre, full_matrices=False)[2][:_DIM].T
        z, z_test = (flat - centre) @ basis, (other - centre) @ basis
        spread = z.std()
        yield name, z / spread, torch.from_numpy(labels).long(), z_test / spread, torch.from_numpy(expected).long()


def _stages(
    model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], rate: float, x: Tensor, y: Tensor, seed: int
) -> None:
    """Two classes at a time, with nothing of the others, by plain SGD."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(parameters, rate)
    for classes in _STAGES:
        here = torch.nonzero(torch.isin(y, torch.tensor(classes)))[:, 0]
        for _ in range(_STEPS):
            chosen = here[torch.randint(len(here), (_BATCH,), generator=generator)]
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()


def _accuracies(seed: int, z: Tensor, y: Tensor, z_test: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """After the last stage: of the bottleneck, on the first stage's classes too, and of a linear head at its best rate."""
    layer = tersor.quantizer("dkvb", codes=64, heads=128, dim=_DIM, key_dim=8, key_steps=30, seed=seed).layer()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(30):
            layer(z[torch.randint(len(z), (1000,), generator=generator)])
        bottleneck = layer.bottleneck(10, sparse=True)
        codes, codes_test = bottleneck(z).codes, bottleneck(z_test).codes
    _stages(bottleneck.look_up, [bottleneck.values], 0.3, codes, y, seed)
    first = torch.isin(expected, torch.tensor(_STAGES[0]))
    right = bottleneck.look_up(codes_test).argmax(1) == expected
    best = 0.0
    for rate in _RATES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Linear(_DIM, 10)
        _stages(head, list(head.parameters()), rate, z, y, seed)
        best = max(best, float((head(z_test).argmax(1) == expected).float().mean()))
    return float(right.float().mean()), float(right[first].float().mean()), best


@claim("classes learned two at a time are kept, where a linear head on the same frozen encoder forgets them")
def class_incremental(seed: int) -> Iterator[Row]:
    """The paper's setting: keys from unlabelled data (here the training images), then frozen; five stages of two classes, SGD without
    momentum at 0.3, no decoder to learn. The linear head has the same steps and batches, and the best of four rates by its test accuracy."""
    measured: dict[str, list[tuple[float, float, float]]] = {}
    for s in range(seed, seed + 3):
        for name, *tensors in _sets(s):
            measured.setdefault(name, []).append(_accuracies(s, *tensors))
    for name, each in measured.items():
        ours, first, head = np.mean(each, 0)
        note = f"3 seeds: {', '.join(f'{a:.3f}' for a, _, _ in each)}; linear: {', '.join(f'{c:.3f}' for _, _, c in each)}; 128 heads of 64 keys, 100 steps a stage"
        yield Row(claim=f"{name}: more right after the last stage than a linear head", metric="accuracy, all ten classes", ours=ours,
                  baseline=head, baseline_name="linear head, the best of four rates", better="higher", margin=0.1, note=note)  # fmt: skip
        yield Row(claim=f"{name}: the classes of the first stage are still known", metric="accuracy on the first two classes", ours=first,
                  baseline=0.8, baseline_name="four of five", better="higher", note="3 seeds; four stages without them in between")  # fmt: skip


@claim("as a quantizer beside vq-vae, 1024 codes: not what the paper is about")
def reconstruction(seed: int) -> Iterator[Row]:
    theirs = trials(plain(10), seed=seed)
    for heads, codes in ((1, 1024), (2, 32)):
        ours = trials(f"dkvb:codes={codes},heads={heads},dim=32,projection=orthogonal", seed=seed)
        # shares of 2 x 32 codes and of 1024 do not compare; the perplexity of both indices together does
        yield from compared(f"{heads} x {codes} keys: higher perplexity than vq-vae", "perplexity", ours, theirs, "higher")
        if heads == 1:
            yield from compared("1 x 1024 keys: more of the codes used than of vq-vae's", "use", ours, theirs, "higher")
        yield from compared(f"{heads} x {codes} keys: less reconstruction error than vq-vae", "mse", ours, theirs, "lower")
