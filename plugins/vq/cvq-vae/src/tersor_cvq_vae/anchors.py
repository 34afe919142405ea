"""Features for codewords to move to: the closest, random ones by closeness, or random ones of a pool (section 3.2, "anchor sampling")."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.nn import functional

from tersor_kit_vq import add_over_processes, nearest, together

_WORDS, _RUN = 1024, 1024  # of a tile of scores: 4 MB


def search(x: Tensor, words: Tensor, distance: str) -> Tensor:
    """Index of the nearest of ``words`` (K x d), int64 N, for each of ``x`` (N x d): "l2", or "cos", of the least angle."""
    if distance == "cos":
        x, words = functional.normalize(x, dim=1), functional.normalize(words, dim=1)
    return nearest(x, words)


def scores(words: Tensor, x: Tensor, distance: str) -> Tensor:
    """Larger is nearer, K x N: -|x - w|^2, or the cosine."""
    if distance == "cos":
        return functional.normalize(words, dim=1) @ functional.normalize(x, dim=1).T
    return 2 * words @ x.T - words.square().sum(1, keepdim=True) - x.square().sum(1)


def _agreed(features: Tensor, score: Tensor) -> Tensor:
    """The features, K x d, of the process with the largest score (K), for each of them; the first of equals."""
    if not together():
        return features
    best, me = score.clone(), distributed.get_rank()
    distributed.all_reduce(best, distributed.ReduceOp.MAX)
    winner = torch.where(score == best, me, distributed.get_world_size())
    distributed.all_reduce(winner, distributed.ReduceOp.MIN)
    return add_over_processes(torch.where((winner == me)[:, None], features, 0.0))


def closest(words: Tensor, x: Tensor, distance: str) -> Tensor:
    """The feature nearest to each of ``words`` (K x d), of those of all processes; ``x`` N x d."""
    if len(x) == 0:
        return _agreed(torch.zeros_like(words), words.new_full((len(words),), -torch.inf))
    found = x[search(words, x, distance)]
    if distance == "cos":
        return _agreed(found, functional.cosine_similarity(found, words))
    return _agreed(found, -(found - words).square().sum(1))


def by_probability(words: Tensor, x: Tensor, distance: str) -> Tensor:
    """A feature for each of ``words`` (K x d), drawn with the softmax over all features of how near they are (:func:`scores`).

    In two steps, a run of features and then one in it, so that the scores are never whole; runs are drawn by the largest of
    log-sum plus Gumbel noise, which holds among processes too.
    """
    out, score = torch.zeros_like(words), words.new_full((len(words),), -torch.inf)
    # processes that share a seed are not to share their noise
    seed = int(torch.randint(1 << 60, ())) + (distributed.get_rank() if together() else 0)
    generator = torch.Generator(x.device).manual_seed(seed)
    runs = x.split(_RUN) if len(x) else ()
    for start in range(0, len(words) if runs else 0, _WORDS):
        part = words[start : start + _WORDS]
        sums = torch.stack([scores(part, run, distance).logsumexp(1) for run in runs], 1)
        noisy = sums - torch.empty_like(sums).exponential_(generator=generator).log()
        score[start : start + _WORDS], chosen = noisy.max(1)
        for i in chosen.unique().tolist():
            here = torch.nonzero(chosen == i)[:, 0]
            odds = scores(part[here], runs[i], distance).softmax(1)
            out[start + here] = runs[i][torch.multinomial(odds, 1, generator=generator)[:, 0]]
    return _agreed(out, score)


def refill(pool: Tensor, filled: int, x: Tensor, counts: Tensor) -> int:
    """Put features into the pool, K x d in place: all of it at random where they are more, else in the free places (those from ``filled`` on)
    and, where there are none, in random ones. ``counts``: features of each process. Gives the new ``filled``."""
    size, total = len(pool), int(counts.sum())
    if total > size:
        places, sources, filled = torch.arange(size), torch.randint(total, (size,)), size
    elif filled < size:
        places, sources = torch.arange(filled, min(filled + total, size)), torch.arange(min(total, size - filled))
        filled = min(filled + total, size)
    else:
        places, sources = torch.randperm(size)[:total], torch.arange(total)
    both = torch.stack([places, sources]).to(pool.device)
    if together():
        distributed.broadcast(both, 0)
    me = distributed.get_rank() if together() else 0
    own = both[1] - int(counts[:me].sum())
    mine = (own >= 0) & (own < len(x))
    taken = pool.new_zeros(both.shape[1], pool.shape[1])
    taken[mine] = x[own[mine]]
    pool[both[0]] = add_over_processes(taken)
    return filled
