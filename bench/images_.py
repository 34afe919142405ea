"""Lossy image codecs on photographs: rate against JPEG for equal quality, and speed."""

from __future__ import annotations

import math
import statistics
from typing import Any

import tersor
from bench.common import Report, Row, Size, say
from tersor import InputError, data, metrics
from tersor import bench as method_bench

SWEEPS: dict[str, tuple[str, ...]] = {
    "jpeg": tuple(f"jpeg:quality={q}" for q in (3, 6, 10, 20, 35, 55, 75, 88, 95)),
    "walloc": tuple(f"walloc:quality={q}" for q in range(1, 9)),
    "webp": tuple(f"webp:quality={q}" for q in (5, 20, 40, 60, 80, 92)),
    "avif": tuple(f"avif:quality={q}" for q in (15, 30, 45, 60, 75, 88)),
    "jpeg2000": tuple(f"jpeg2000:psnr={q}" for q in (25, 28, 31, 34, 37, 40)),
}


def decibel(x: float) -> float:
    return -10 * math.log10(max(1 - x, 1e-9))


def run(size: Size) -> Report:
    photographs = data.photographs()
    if size.quick:
        photographs = {"cat": photographs["cat"]}
    points: dict[str, dict[str, list[dict[str, Any]]]] = {}
    rows: list[Row] = []
    installed = {m["name"] for m in tersor.available()}
    for name, sweep in SWEEPS.items():
        if name not in installed:
            rows.append(Row(case=name, measure=f"not installed: pip install tersor-{name}", unit=""))
            continue
        say(f"images: {name}")
        sweep = size.pick(sweep[::3], sweep)
        method_bench.measure(next(iter(photographs.values())), sweep[0])  # loads what is loaded once
        points[name] = {k: [method_bench.measure(x, text, size.pick(1, 2)) for text in sweep] for k, x in photographs.items()}
    reference = points["jpeg"]
    for name, found in points.items():
        speeds = {
            way: statistics.median(p[f"{way}_mega_per_second"] for curve in found.values() for p in curve)
            for way in ("encode", "decode")
        }
        against = {
            way: statistics.median(p[f"{way}_mega_per_second"] for curve in reference.values() for p in curve) for way in speeds
        }
        bits = [p["bits_per_pixel"] for curve in found.values() for p in curve]
        span = f"{min(bits):.2g} to {max(bits):.2g} bits per pixel"
        if name != "jpeg":
            for label, key, scale in (("PSNR", "psnr_db", float), ("MS-SSIM", "ms_ssim", decibel)):
                rates, apart = [], ""
                for image, curve in found.items():
                    both = [[(p["bits_per_pixel"], scale(p[key])) for p in c] for c in (reference[image], curve)]
                    try:
                        rates.append(metrics.bd_rate(*both))
                    except InputError as error:
                        apart = f"{image}: {error}"
                if not rates:
                    rows.append(Row(case=name, measure=f"BD-rate against JPEG, {label}", unit="%", note=apart))
                    continue
                rows.append(
                    Row(case=name, measure=f"BD-rate against JPEG, {label}", unit="%", ours=statistics.mean(rates), better="lower",
                        aim=0 if name == "walloc" else None, note=f"{min(rates):.0f} to {max(rates):.0f} over {len(rates)} images, {span}")
                )  # fmt: skip
        for way in speeds:
            rows.append(
                Row(case=name, measure=way, unit="Mpx/s", ours=speeds[way], peer="" if name == "jpeg" else "jpeg",
                    theirs=None if name == "jpeg" else against[way])
            )  # fmt: skip
    return Report(f"{len(photographs)} photographs; sizes are those of whole .tsr files, headers included", rows,
                  ["BD-rate is over the range of quality that both curves share, image by image."])  # fmt: skip
