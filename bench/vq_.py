"""Vector quantizers as layers: forward, and with the gradient of the input (a codebook moves then); searches; k-means."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

import tersor
from bench.common import Report, Row, Size, missing, say, there, turns
from tersor.api import as_method

INSTALL = "pip install einops; pip install --no-deps vector-quantize-pytorch einx torch-einops-utils frozendict loguru"

_PEAK = """
import ctypes, gc, re, sys, torch
torch.set_num_threads(1)

def most():  # of this program alone, in kB (ru_maxrss knows the parent's too)
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

side, count, size, dim = sys.argv[1], *map(int, sys.argv[2:])
x = torch.randn(1, count, dim)
if side != "theirs":
    from tersor.api import as_method
    layer = as_method(side).layer()
else:
    from vector_quantize_pytorch import VectorQuantize
    layer = VectorQuantize(dim=dim, codebook_size=size, decay=0.99, commitment_weight=0.25)
layer.train()
layer(x[:, :64])
z = x.clone().requires_grad_()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # what was freed, and the peak so far, do not count
before = most()
out = layer(z)
(out[0].sum() + out[2].sum()).backward()
print(most() - before)
"""


def forward(layer: Any, x: torch.Tensor) -> None:
    with torch.no_grad():
        layer(x)


def both(layer: Any, x: torch.Tensor) -> None:
    """Values, and the loss where there is one."""
    z = x.clone().requires_grad_()
    out = layer(z)
    sum(part.sum() for part in (out[0], *out[2:3])).backward()


def chunked(words: torch.Tensor, x: torch.Tensor, rows: int = 1024) -> torch.Tensor:
    """The usual form: |c|^2 - 2 x.c of some rows at a time, and their argmin."""
    norms = words.square().sum(1)
    with torch.no_grad():
        return torch.cat([torch.addmm(norms, part, words.T, alpha=-2).argmin(1) for part in x.split(rows)])


def product(words: torch.Tensor, x: torch.Tensor, rows: int = 1024) -> None:
    """The product of vectors and codewords alone: the least that a search can take."""
    buffer = torch.empty(rows, len(words))
    for part in x.split(rows):
        torch.mm(part, words.T, out=buffer[: len(part)])


def peak(side: str, count: int, size: int, dim: int) -> float:
    """MB of memory that a training step takes beyond what there was before, gradients included, in a process of its own (Linux). ``side``: a
    method, or "theirs"."""
    command = [sys.executable, "-c", _PEAK, side, str(count), str(size), str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float(done.stdout.split()[-1]) * 1024 / 1e6


def fsq(size: Size, count: int, dim: int, x: torch.Tensor, threads: int) -> list[Row]:
    rows = []
    for levels in ((4,) * 5, (4,) * 6, (4,) * 7, (8, 5, 5, 5)):
        layers: dict[str, Any] = {"ours": tersor.quantizer("fsq", levels=levels).layer(dim)}
        if there("vector_quantize_pytorch"):
            from vector_quantize_pytorch import FSQ

            layers["peer"] = FSQ(levels=list(levels), dim=dim)
        for name, call in (("forward", forward), ("forward and backward", both)):
            seconds = turns({k: functools.partial(call, m, x) for k, m in layers.items()}, size.pick(1, 41))
            rates = {k: count / s / 1e6 for k, s in seconds.items()}
            case = f"fsq, levels {'x'.join(map(str, levels))}, {threads} thread{'s' * (threads > 1)}"
            rows.append(
                Row(case=case, measure=name, unit="million vectors/s", ours=rates["ours"],
                    peer="vector-quantize-pytorch FSQ" if "peer" in rates else "", theirs=rates.get("peer"),
                    aim=1 if "peer" in rates else None)
            )  # fmt: skip
    return rows


def codebooks(size: Size, count: int, dim: int, x: torch.Tensor) -> list[Row]:
    """A codebook of 1,024 and 16,384 codes, one thread."""
    rows, flat = [], x[0]
    for codes in size.pick((256,), (1024, 16384)):
        say(f"vq-vae: {codes} codes")
        words = torch.randn(codes, dim)
        layer = tersor.quantizer("vq-vae", codes=codes, dim=dim).layer("random")
        layer.codebook.set(words)
        layers: dict[str, Any] = {"ours": layer}
        if there("vector_quantize_pytorch"):
            from vector_quantize_pytorch import VectorQuantize

            layers["peer"] = VectorQuantize(dim=dim, codebook_size=codes, decay=0.99, commitment_weight=0.25)
        rounds = size.pick(1, 11 if codes < 4096 else 3)
        # the peer passes no gradient in evaluation mode
        for measure, call, training in (("forward", forward, False), ("training step", both, True)):
            sides = {k: functools.partial(call, m.train(training), x) for k, m in layers.items()}
            sides["chunked addmm and argmin"] = functools.partial(chunked, words, flat)
            sides["product alone"] = functools.partial(product, words, flat)
            seconds = turns(sides, rounds)
            for k, s in seconds.items():
                if k == "ours":
                    continue
                aim = {"peer": 3.0, "chunked addmm and argmin": 1 / 1.5 if not training else None}.get(k)
                rows.append(
                    Row(case=f"vq-vae, {codes} codes, 1 thread", measure=measure, unit="thousand vectors/s",
                        ours=count / seconds["ours"] / 1e3, peer="vector-quantize-pytorch VectorQuantize" if k == "peer" else k,
                        theirs=count / s / 1e3, aim=aim)
                )  # fmt: skip
        memory = {"ours": peak(f"vq-vae:codes={codes},dim={dim}", count, codes, dim)} | (
            {"peer": peak("theirs", count, codes, dim)} if "peer" in layers else {}
        )
        rows.append(
            Row(case=f"vq-vae, {codes} codes, 1 thread", measure="peak memory of a training step", unit="MB", ours=memory["ours"],
                peer="vector-quantize-pytorch VectorQuantize" if "peer" in memory else "", theirs=memory.get("peer"), better="lower",
                aim=0.5 if "peer" in memory else None, note=f"all distances: {4 * count * codes / 1e6:.0f} MB")
        )  # fmt: skip
    return rows


def others(size: Size, count: int, dim: int, x: torch.Tensor) -> list[Row]:
    """The other methods with a codebook or bits: a training step with 1,024 and 16,384 codes, one thread, beside the peer's where it has one."""
    peers: dict[str, tuple[str, Callable[[], Any], float | None]] = {}
    rows = []
    for codes in size.pick((64,), (1024, 16384)):
        bits, many = codes.bit_length() - 1, codes > 4096
        half = 2 ** (bits // 2)
        if there("vector_quantize_pytorch"):
            from vector_quantize_pytorch import LFQ, ResidualVQ, SimVQ, VectorQuantize

            ema = dict(dim=dim, codebook_size=codes, decay=0.99, commitment_weight=0.25)
            peers = {
                f"rotation-trick:codes={codes},dim={dim}": ("VectorQuantize, rotation", lambda e=ema: VectorQuantize(rotation_trick=True, **e), 5.0),
                f"simvq:codes={codes},dim={dim}": ("SimVQ", lambda c=codes: SimVQ(dim=dim, codebook_size=c), 1.0),
                f"rq-vae:codes={codes},dim={dim},depth=4": ("ResidualVQ, 4 levels", lambda e=ema: ResidualVQ(num_quantizers=4, **e), 5.0),
                # the entropy over all codes is what makes the difference
                f"bsq:bits={bits},dim={dim}": ("LFQ, spherical", lambda c=codes: LFQ(dim=dim, codebook_size=c, spherical=True), 100.0 if many else 5.0),
                f"maskbit:bits={bits},dim={dim}": ("LFQ", lambda c=codes: LFQ(dim=dim, codebook_size=c), 100.0 if many else 5.0),
            }  # fmt: skip
        alone = [
            *(f"{name}:codes={codes},dim={dim}" for name in ("cvq-vae", "optvq", "ibq", "softvq", "vqgan-lc", "ste-affine", "te-vq")),
            f"hifi-codec:codes={codes},dim={dim}", f"fqgan:codes=[{half},{codes // half}],dim={dim}", f"dkvb:heads=1,codes={codes},dim={dim}", f"qlae:values=8,dim={dim}",
        ]  # fmt: skip
        for ours in (*peers, *alone):
            say(ours)
            peer, build, aim = peers.get(ours, ("", None, None))
            sides = {"ours": as_method(ours).layer().train()} | ({"peer": build().train()} if build else {})
            sides["ours"](x)  # a codebook may start from the first batch by k-means, which the peer's does not
            seconds = turns({k: functools.partial(both, m, x) for k, m in sides.items()}, 1 if many else size.pick(1, 3))
            rows.append(
                Row(case=f"{ours}, 1 thread", measure="training step", unit="thousand vectors/s", ours=count / seconds["ours"] / 1e3,
                    peer=f"vector-quantize-pytorch {peer}" if peer else "", theirs=count / seconds["peer"] / 1e3 if peer else None, aim=aim,
                    note=f"{peak(ours, count, codes, dim):.0f} MB; all distances: {4 * count * codes / 1e6:.0f} MB")
            )  # fmt: skip
    return rows


def clusters(size: Size, count: int, dim: int, x: torch.Tensor) -> list[Row]:
    """k-means of 1,024 codes, 10 iterations."""
    from tersor_kit_vq import kmeans

    codes = size.pick(64, 1024)
    sides: dict[str, Any] = {"ours": lambda: kmeans(x[0], codes, 10)}
    if there("faiss"):
        import faiss

        faiss.omp_set_num_threads(1)
        sides["faiss"] = lambda: str(faiss.Kmeans(dim, codes, niter=10, max_points_per_centroid=10**6).train(x[0].numpy()))
    if there("sklearn"):
        from sklearn.cluster import KMeans

        sides["scikit-learn"] = lambda: KMeans(codes, init="random", n_init=1, max_iter=10, tol=0).fit(x[0].numpy())
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds = turns(sides, size.pick(1, 5))
    out = [
        Row(case=f"k-means, {codes} codes, 10 iterations", measure="time", unit="ms", ours=1e3 * seconds["ours"], peer=k,
            theirs=1e3 * s, better="lower", aim=1.5 if k == "faiss" else None)
        for k, s in seconds.items() if k != "ours"
    ]  # fmt: skip
    if "faiss" not in sides:
        out.append(missing("k-means", "faiss", "pip install faiss-cpu"))
    return out


def run(size: Size) -> Report:
    count, dim = size.pick(1024, 16384), 64
    rows: list[Row] = []
    torch.manual_seed(0)
    x = torch.randn(1, count, dim)
    before = torch.get_num_threads()
    for threads in size.pick((1,), (1, 2)):
        torch.set_num_threads(threads)
        rows += fsq(size, count, dim, x, threads)
    torch.set_num_threads(1)
    rows += codebooks(size, count, dim, x) + others(size, count, dim, x) + clusters(size, count, dim, x)
    torch.set_num_threads(before)
    if not there("vector_quantize_pytorch"):
        rows.append(missing("all", "vector-quantize-pytorch", INSTALL))
    return Report(f"vector quantizers, {count} vectors of {dim} dimensions (FSQ with linear maps to and from its levels)", rows)
