"""InfoMEC: modularity, explicitness and compactness of a representation (Hsu et al., https://arxiv.org/abs/2305.18378).

Definitions and estimators are those of the file for InfoMEC that the authors released."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tersor import InputError


class InfoMEC(NamedTuple):
    """``modularity``: InfoM, 1 where every latent knows of one source only, 0 where all sources alike; ``explicitness``: InfoE, 1 where a linear
    classifier reads every source from the latents, 0 where it does no better than guessing; ``compactness``: InfoC, 1 where every source
    is known to one latent only. ``information``: float64 sources x latents, I(source; latent) / H(source); ``active``: bool, one for each latent."""

    modularity: float
    explicitness: float
    compactness: float
    information: Tensor
    active: Tensor


def _table(x: Any, what: str) -> Tensor:
    x = torch.as_tensor(x)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise InputError(f"{what} are samples x variables, 2 x 1 or more; given: shape {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise InputError(f"{what} have no NaN or infinity")
    return x.detach().cpu()


def _tables(sources: Any, latents: Any) -> tuple[list[Tensor], Tensor]:
    """The classes 0, 1, ... of each source, and the latents."""
    given, z = _table(sources, "sources"), _table(latents, "latents")
    if len(given) != len(z):
        raise InputError(f"sources and latents are of the same samples; given: {len(given)} and {len(z)}")
    classes = [torch.unique(s, return_inverse=True)[1] for s in given.T]
    single = [i for i, c in enumerate(classes) if int(c.max()) == 0]
    if single:
        raise InputError(f"sources have two different values or more; source {single[0]} has one")
    return classes, z


def _entropy(counts: Tensor) -> float:
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log()).sum())


def _between_classes(a: Tensor, b: Tensor) -> float:
    """Mutual information in nats of two columns of classes 0, 1, ..., by their joint frequencies."""
    width = int(b.max()) + 1
    joint = torch.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).view(-1, width)
    return max(0.0, _entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint.reshape(-1)))


def _psi(n: int) -> float:
    return float(torch.digamma(torch.tensor(n, dtype=torch.float64)))


def _with_continuous(classes: Tensor, z: Tensor, neighbours: int) -> float:
    """Mutual information in nats of classes and a continuous column by nearest neighbours (Ross 2014, https://doi.org/10.1371/journal.pone.0087357):
    psi(N) + <psi(k)> - <psi(N_class)> - <psi(m)>, m being the samples nearer than the k-th neighbour of the same class."""
    order = z.argsort()
    z, classes = z[order].contiguous(), classes[order]
    terms, radii, centres = 0.0, [], []
    for label in range(int(classes.max()) + 1):
        own = z[classes == label].contiguous()
        n, k = len(own), min(neighbours, len(own) - 1)
        if k < 1:  # alone in its class: left out, as in the authors' library
            continue
        # of the k + 1 windows of k + 1 samples in order around each, the one that reaches least far
        wide = torch.cat([own.new_full((k,), -math.inf), own, own.new_full((k,), math.inf)])
        reach = own.new_full((n,), math.inf)
        for j in range(k + 1):
            reach = reach.minimum(torch.maximum(own - wide[j : j + n], wide[j + k : j + k + n] - own))
        radii.append(reach - 8 * torch.finfo(own.dtype).eps * own.abs())  # nearer than that, whatever way sums are rounded
        centres.append(own)
        terms += n * (_psi(k) - _psi(n))
    if not centres:
        return 0.0
    radius, centre = torch.cat(radii), torch.cat(centres)
    everyone, count = centre.sort().values, len(centre)
    inside = torch.searchsorted(everyone, centre + radius, right=True) - torch.searchsorted(everyone, centre - radius)
    return max(0.0, _psi(count) + terms / count - float(torch.digamma(inside.clamp(min=1).double()).mean()))


def normalized_information(sources: Any, latents: Any, discrete: bool, neighbours: int = 10) -> Tensor:
    """I(source; latent) / H(source), float64 sources x latents.

    ``sources``: samples x sources, any numbers, each different value a class; ``latents``: samples x latents. ``discrete``: latents are codes, and
    frequencies are counted; else the estimate is by ``neighbours`` nearest neighbours, after noise of 1e-10 that parts equal ones.
    Raises :class:`tersor.InputError` for other shapes, NaN, infinity, or a source with a single value.
    """
    classes, z = _tables(sources, latents)
    if neighbours < 1:
        raise InputError(f"neighbours are 1 or more; given: {neighbours}")
    out = torch.empty(len(classes), z.shape[1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for j, column in enumerate(z.T):
        if discrete:
            codes = torch.unique(column, return_inverse=True)[1]
            shared = [_between_classes(c, codes) for c in classes]
        else:
            spread = column.double().std(correction=0)
            scaled = column.double() / torch.where(spread > 0, spread, 1)
            noise = torch.randn(len(scaled), generator=generator, dtype=torch.float64)
            scaled = scaled + noise * (1e-10 * scaled.abs().mean().clamp(min=1))
            shared = [_with_continuous(c, scaled, neighbours) for c in classes]
        out[:, j] = torch.tensor(shared, dtype=torch.float64)
    entropies = torch.tensor([_entropy(torch.bincount(c)) for c in classes], dtype=torch.float64)
    return out / entropies[:, None]


def _log_loss(features: Tensor, classes: Tensor, iterations: int) -> float:
    """Cross-entropy in nats of a linear classifier fitted by L-BFGS without penalty, classes weighted to count alike in the fit."""
    counts = torch.bincount(classes)
    weight = len(classes) / (len(counts) * counts.double())
    matrix = torch.zeros(features.shape[1], len(counts), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(counts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([matrix, bias], max_iter=iterations, history_size=10, tolerance_grad=1e-4, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(features @ matrix + bias, classes, weight)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(functional.cross_entropy((features @ matrix + bias).detach(), classes))


def explicitness(sources: Any, latents: Any, discrete: bool, iterations: int = 100) -> float:
    """InfoE: the mean over sources of the share of its entropy that a linear classifier of all latents takes away.

    Discrete latents go in one-hot, others standardized. The classifier without latents guesses uniformly, since classes are weighted
    alike, so its loss is the logarithm of their number. Errors: :func:`normalized_information`.
    """
    classes, z = _tables(sources, latents)
    with torch.autocast("cpu", enabled=False):
        if discrete:
            columns = [functional.one_hot(torch.unique(c, return_inverse=True)[1]) for c in z.T]
            features = torch.cat(columns, 1).double()
        else:
            spread = z.double().std(0, correction=0)
            features = (z.double() - z.double().mean(0)) / torch.where(spread > 0, spread, 1)
        shares = [1 - _log_loss(features, c, iterations) / math.log(int(c.max()) + 1) for c in classes]
    return sum(shares) / len(shares)


def _concentration(information: Tensor) -> float:
    """Mean over columns of the largest share, from 0 where all rows have as much to 1 where one has everything; NaN of one row or no column."""
    rows, columns = information.shape
    if rows < 2 or columns < 1:
        return math.nan
    total = information.sum(0)
    share = torch.where(total > 0, information.amax(0) / total, 1 / rows)
    return (float(share.mean()) - 1 / rows) / (1 - 1 / rows)


def infomec(sources: Any, latents: Any, discrete: bool, neighbours: int = 10) -> InfoMEC:
    """InfoM, InfoE and InfoC of latents (samples x latents) against the known sources (samples x sources) that made the data.

    Modularity and compactness are of the active latents: codes that vary, or continuous latents with a range of at least a twentieth
    of the largest. Compactness is NaN with fewer than two of them, modularity with none or with a single source; a latent that knows nothing counts 0.
    Errors: :func:`normalized_information`.
    """
    information = normalized_information(sources, latents, discrete, neighbours)
    z = _table(latents, "latents")
    reach = z.amax(0) - z.amin(0)
    active = reach > (0 if discrete else reach.max() / 20)
    known = information[:, active]
    return InfoMEC(_concentration(known), explicitness(sources, latents, discrete), _concentration(known.T), information, active)
