"""Learning a hidden Chow-Liu tree: its structure from mutual information, its parameters with EM."""

from __future__ import annotations

import numpy as np

from tersor import StateError


def mutual_information(x: np.ndarray, levels: int) -> np.ndarray:
    """Mutual information in nats, D x D, of every two columns of ``x`` (samples x D, integers below ``levels``)."""
    n, d = x.shape
    onehot = (x[:, :, None] == np.arange(levels)).reshape(n, d * levels).astype(np.float32)
    joint = onehot.T @ onehot / np.float32(n)
    ratio = joint / np.maximum(np.outer(np.diag(joint), np.diag(joint)), 1e-30)
    return (joint * np.log(np.where(joint > 0, ratio, 1))).reshape(d, levels, d, levels).sum((1, 3), dtype=np.float64)


def chow_liu(mi: np.ndarray) -> np.ndarray:
    """Parents (the root's is -1) in the maximum spanning tree of ``mi``, rooted at its centre: as shallow as it can be."""
    d = len(mi)
    best, link, adjacent = mi[0].copy(), np.zeros(d, int), np.zeros((d, d), bool)
    best[0] = -np.inf
    for _ in range(d - 1):
        v = int(np.argmax(best))
        adjacent[v, link[v]] = adjacent[link[v], v] = True
        closer = (mi[v] > best) & (best > -np.inf)
        link[closer], best[closer], best[v] = v, mi[v, closer], -np.inf

    def walk(root: int) -> tuple[list[int], np.ndarray]:
        order, parent = [root], np.full(d, -1, np.int32)
        for u in order:
            for w in np.flatnonzero(adjacent[u]):
                if w != parent[u]:
                    parent[w] = u
                    order.append(int(w))
        return order, parent

    order, parent = walk(walk(0)[0][-1])
    path = [order[-1]]
    while parent[path[-1]] >= 0:
        path.append(int(parent[path[-1]]))
    return walk(path[len(path) // 2])[1]


class Tree:
    """``children`` (largest subtree first), ``order`` (of coding), ``levels`` (nodes of one depth, grouped by sibling rank)."""

    def __init__(self, parent: np.ndarray) -> None:
        d = len(parent)
        self.parent, size, depth, self.children = parent, np.ones(d, int), np.zeros(d, int), [[] for _ in range(d)]
        for v in np.flatnonzero((parent >= 0) & (parent < d)):
            self.children[parent[v]].append(int(v))
        self.root = int(np.argmin(parent))
        down = [self.root] if parent[self.root] == -1 else []
        for u in down:
            depth[self.children[u]] = depth[u] + 1
            down += self.children[u]
        if len(down) != d:
            raise StateError("pc-lossless: the parents in the state are not a tree")
        for u in reversed(down[1:]):
            size[parent[u]] += size[u]
        rank, stack, order = np.zeros(d, int), [self.root], []
        while stack:
            order.append(u := stack.pop())
            self.children[u].sort(key=lambda c: (-size[c], c))
            rank[self.children[u]] = range(len(self.children[u]))
            stack += self.children[u]
        self.order = order[::-1]  # post-order, of two siblings the one with the larger scope first (paper, section 3.2)
        nodes = [np.flatnonzero(depth == k) for k in range(depth.max() + 1)]
        self.levels = [(n, [n[rank[n] == r] for r in range(rank[n].max() + 1)]) for n in nodes]

    def plan(self, schedule: str) -> list[tuple[list[int], list[int], int]]:
        """For each variable in order: nodes whose message to the parent, and whose context, are evaluated before it is coded.

        naive: the whole circuit, O(D |p|) in all. cached: the path from the variable coded last to the root, whose
        scopes have changed, then down to the next, O(depth |p|). tour: contexts are kept too, so that each is evaluated once.
        """
        steps, entered = [], set()
        for i, v in enumerate(self.order):
            before, down = self.order[i - 1 : i] if i else [], self._path(v)[::-1]
            if schedule == "naive":
                before = self.order[:-1]
            elif schedule == "cached" and i:
                before = self._path(before[0])[:-1]
            elif schedule == "tour":
                down = [u for u in down if u not in entered]
                entered.update(down)
            steps.append((before, down, v))
        return steps

    def _path(self, v: int) -> list[int]:
        path = [v]
        while path[-1] != self.root:
            path.append(int(self.parent[path[-1]]))
        return path


def expectation(tree: Tree, p: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """E-step: log2-likelihood of each row of ``x``, expected counts. Up and down the circuit, one depth at a time."""
    pi, a, b = p["prior"], p["transition"], p["emission"]
    d, m = len(a), b.shape[2]
    up = b.transpose(0, 2, 1)[np.arange(d)[:, None], x.T]  # D x N x K
    message, counts, loglik = np.empty_like(up), {"transition": np.ones_like(a), "emission": np.empty_like(b)}, np.zeros(len(x))
    for nodes, ranks in reversed(tree.levels):
        scale = up[nodes].max(-1, keepdims=True)
        up[nodes] /= scale
        loglik += np.log2(scale[..., 0], dtype=np.float64).sum(0)
        if nodes[0] != tree.root:
            message[nodes] = up[nodes] @ a[nodes].swapaxes(1, 2)
            for same in ranks:
                up[tree.parent[same]] *= message[same]
    post = up  # becomes the posterior of each latent, from the root down
    for nodes, _ in tree.levels:
        if nodes[0] == tree.root:
            post[nodes] *= pi
            total = post[tree.root].sum(-1)
            loglik += np.log2(total)
            post[nodes] /= total[:, None]
        else:
            outside = post[tree.parent[nodes]] / message[nodes]
            counts["transition"][nodes] = a[nodes] * (outside.swapaxes(1, 2) @ up[nodes])
            post[nodes] = (outside @ a[nodes]) * up[nodes]
        onehot = (x.T[nodes][:, :, None] == np.arange(m)).astype(np.float32)
        counts["emission"][nodes] = post[nodes].swapaxes(1, 2) @ onehot
    return loglik, {"prior": post[tree.root].sum(0), **counts}


def maximization(counts: dict[str, np.ndarray], marginal: np.ndarray, weight: float) -> dict[str, np.ndarray]:
    """M-step: normalized counts, smoothed by ``weight`` pseudocounts a row (emissions: spread as the variable's marginal)."""
    prior = {"prior": 1 / len(counts["prior"]), "transition": 1 / len(counts["prior"]), "emission": marginal[:, None, :]}
    smooth = {k: c + np.float32(weight) * prior[k] for k, c in counts.items()}
    return {k: (c / c.sum(-1, keepdims=True)).astype(np.float32) for k, c in smooth.items()}


def initial(tree: Tree, x: np.ndarray, marginal: np.ndarray, k: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Where EM starts: each latent is the cluster, by k-means, of its variable and those near it in the tree."""
    x, d, m = x[rng.permutation(len(x))[:2000]], x.shape[1], marginal.shape[1]
    linked = np.zeros((d, d))
    child = np.flatnonzero(tree.parent >= 0)
    linked[child, tree.parent[child]] = linked[tree.parent[child], child] = 0.5
    near, z = np.linalg.matrix_power(np.eye(d) + linked, 3), np.zeros((d, len(x)), int)
    for v in range(d):
        about = np.flatnonzero(near[v])
        f = (x[:, about] * np.sqrt(near[v, about])).astype(np.float32)
        centre = f[rng.integers(len(f), size=k)]
        for _ in range(8):
            z[v] = ((centre**2).sum(1) - 2 * f @ centre.T).argmin(1)
            onehot = np.eye(k, dtype=np.float32)[z[v]]
            centre = (onehot.T @ f + 1e-3 * centre) / (onehot.sum(0)[:, None] + 1e-3)
    pairs = [np.bincount(z[max(tree.parent[v], 0)] * k + z[v], minlength=k * k).reshape(k, k) for v in range(d)]
    emits = [np.bincount(z[v] * m + x[:, v], minlength=k * m).reshape(k, m) for v in range(d)]
    counts = {"prior": np.bincount(z[tree.root], minlength=k), "transition": np.stack(pairs), "emission": np.stack(emits)}
    return maximization(counts, marginal, 0.01 * len(x))
