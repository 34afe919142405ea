"""The circuit in integers: the marginals that drive the entropy coder, evaluated in one of three schedules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tersor import StateError
from tersor_pc_lossless.hclt import Tree

BITS = 24  # width of a message of the integer circuit
UNIT = {"prior": 1 << 16, "transition": 1 << 16, "emission": 1 << 20}  # what a row of the integer tables sums to
TOTAL = 1 << 24  # constriction's fixed point: the integer probabilities of one symbol sum to this


def integers(p: np.ndarray, unit: int) -> np.ndarray:
    """The rows of ``p`` as integers of at least 1 that sum to exactly ``unit``."""
    q = np.maximum(np.rint(p.astype(np.float64) / p.sum(-1, keepdims=True, dtype=np.float64) * unit), 1).astype(np.int64)
    np.put_along_axis(q, top := q.argmax(-1)[..., None], np.take_along_axis(q, top, -1) + unit - q.sum(-1, keepdims=True), -1)
    return q


def renormalize(y: np.ndarray) -> np.ndarray:
    """Rows of integers shifted (by powers of two, truncated) so that the largest has BITS bits and none is zero."""
    _, exponent = np.frexp(y.max(-1, keepdims=True))
    return np.maximum(np.floor(y * np.ldexp(1.0, BITS - exponent)), 1.0)


class Circuit:
    """The circuit in integers. They are kept in float64 and stay below 2**53, where sums and products are exact in any order:
    a matrix product gives the same bits on every machine, whatever the number of threads and the size of the batch."""

    def __init__(self, state: dict[str, np.ndarray]) -> None:
        try:
            tables = {k: state[k].astype(np.float64) for k in UNIT}
            (d, k, m), self.tile, self.alphabet = tables["emission"].shape, tuple(map(int, state["tile"])), state["alphabet"]
            fits = tables["transition"].shape == (d, k, k) and tables["prior"].shape == (k,) and state["parent"].shape == (d,)
            fits &= (state["parent"].dtype, self.alphabet.dtype) == (np.int32, np.uint8) and m == len(self.alphabet) + 1
            fits &= 2 <= k <= 256 and np.prod(self.tile) == d and min(self.tile) > 0
            if not fits or not all((t.sum(-1) == UNIT[n]).all() and t.min() >= 1 for n, t in tables.items()):
                raise StateError("pc-lossless: the tables in the state do not fit together")
        except (KeyError, ValueError, TypeError) as error:
            raise StateError(f"pc-lossless: not a state of this method ({error!r})") from error
        self.tree, self.prior, self.a, self.b = Tree(state["parent"]), *(tables[n] for n in UNIT)
        self.chunk = max(16, min((1 << 22) // (d * k), (1 << 21) // m))  # tiles coded side by side; part of the format

    def run(self, n: int, step: Callable[[np.ndarray, int], np.ndarray], schedule: str) -> np.ndarray:
        """Code the variables of ``n`` tiles one after the other. ``step(table, v)``: code variable ``v`` of all tiles with the
        integer weights ``table`` (n x symbols), give its symbols. Returns all symbols, n x D."""
        tree, k, ones = self.tree, len(self.prior), np.ones((n, len(self.prior)))
        message = dict.fromkeys(range(len(self.a)), np.full((n, k), 2.0 ** (BITS - 1)))  # of a scope without evidence
        context, evidence, done, begun = {}, {}, {}, {}
        out = np.empty((n, len(self.a)), np.int64)

        def inside(v: int, but: int = -1) -> np.ndarray:  # product unit: messages of the children of v, evidence at v
            y, children = (ones, tree.children[v]) if schedule == "naive" else (done.get(v, ones), begun.get(v, []))
            for c in children:
                if c != but:
                    y = renormalize(y * message[c])
            return renormalize(y * evidence[v]) if v in evidence else y

        for ups, downs, v in tree.plan(schedule):
            for u in ups:  # sum units: p(evidence under u | latent of the parent)
                p = int(tree.parent[u])
                message[u] = renormalize(inside(u) @ self.a[u].T)
                begun[p] = [] if u in evidence else [u]
                if u in evidence and schedule != "naive":  # all of u's scope is coded: kept as a partial product
                    done[p] = renormalize(done.get(p, ones) * message[u])
            for u in downs:  # p(latent of u, evidence not under u)
                p = int(tree.parent[u])
                context[u] = renormalize(self.prior * ones if p < 0 else renormalize(context[p] * inside(p, u)) @ self.a[u])
            out[:, v] = step(self.table(renormalize(context[v] * inside(v)) @ self.b[v]), v)
            evidence[v] = self.b[v].T[out[:, v]]
        return out

    def table(self, joint: np.ndarray) -> np.ndarray:
        """Integers >= 0 in proportion to p(x_v, evidence); with the 1 that constriction adds to each they sum to TOTAL."""
        w = joint.astype(np.int64) >> 13
        room = TOTAL - w.shape[1]
        w = w * room // w.sum(-1, keepdims=True)
        w[np.arange(len(w)), w.argmax(-1)] += room - w.sum(-1)
        return w.astype(np.float32)  # exact: below 2**24
