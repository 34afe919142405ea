"""Listing and looking up among 300 plugin distributions: whole processes."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.common import Report, Row, Size, missing, there, turns

NEEDED = ("tersor", "click", "attr", "attrs", "entrypoints", "pluggy", "packaging", "numpy", "xxhash", "rich", "safetensors")
METADATA = """Metadata-Version: 2.3
Name: tersor-p{i}
Version: 0.1.{i}
Summary: Dummy method {i}, which is only listed
Keywords: tersor,family:vq,domain:latent
License-Expression: Apache-2.0
Requires-Dist: tersor>=0.1,<0.2
Requires-Dist: numpy>=1.26
Requires-Python: >=3.11
Project-URL: Paper, https://arxiv.org/abs/2309.15505
Project-URL: Docs, https://tersor.readthedocs.io/
Description-Content-Type: text/markdown

# tersor-p{i}

A dummy.
"""
MODULE = '''"""A dummy method."""
from tersor import Codec, hookimpl, method


@method
class P(Codec):
    """A dummy."""

    name = "p{i}"
    domains = ("bytes",)
    native = "numpy"
    lossless = True


@hookimpl
def tersor_codec():
    return P
'''
PLAIN = '"""A dummy method."""\n'


def site(folder: Path, count: int, module: str) -> None:
    """A site folder: the packages that Tersor needs, linked, and ``count`` dummy distributions."""
    for name in (*NEEDED, *(["stevedore"] if there("stevedore") else [])):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        target = origin.parent if origin.name == "__init__.py" else origin
        (folder / target.name).symlink_to(target)
        try:
            info = importlib.metadata.distribution({"attr": "attrs"}.get(name, name))._path  # type: ignore[attr-defined]
            if not (folder / info.name).exists():
                (folder / info.name).symlink_to(info)
            if name == "numpy" and (info.parent / "numpy.libs").exists():
                (folder / "numpy.libs").symlink_to(info.parent / "numpy.libs")
        except importlib.metadata.PackageNotFoundError:
            pass
    for i in range(count):
        (folder / f"tersor_p{i}.py").write_text(module.format(i=i))
        info = folder / f"tersor_p{i}-0.1.{i}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(METADATA.format(i=i))
        (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: uv 0.9\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        (info / "entry_points.txt").write_text(f"[tersor.codec]\np{i} = tersor_p{i}\n")
        (info / "RECORD").write_text(f"tersor_p{i}.py,,\n")


def process(folder: Path, code: str) -> None:
    """A bare interpreter with ``folder`` on its path; raises where the code fails."""
    start = f"import sys; sys.path.append({str(folder)!r})\n"
    subprocess.run([sys.executable, "-I", "-S", "-c", start + code], check=True, stdout=subprocess.DEVNULL)


def timed(folder: Path, before: str, code: str) -> float:
    """Seconds of ``code`` in a new process, the imports in ``before`` not counted."""
    start = f"import sys; sys.path.append({str(folder)!r})\n{before}\nimport time; t = time.perf_counter()\n{code}\n"
    out = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + "print(time.perf_counter() - t)"], check=True, capture_output=True, text=True
    )
    return float(out.stdout)


LIST = "sys.argv = ['tersor', 'list'{}]\nfrom tersor.cli import main\nmain()"
GROUP = "tersor.codec"
PROCESSES = {
    "empty interpreter": "",
    "tersor list": LIST.format(""),
    "tersor list --json": LIST.format(", '--json'"),
    "import click": "import click",
    "importlib.metadata": f"import importlib.metadata as m\nfor e in m.entry_points(group={GROUP!r}): print(e.name, e.value)",
    "entrypoints": f"import entrypoints\nfor n, e in entrypoints.get_group_named({GROUP!r}).items(): print(n, e)",
    "pluggy": f"import pluggy\np = pluggy.PluginManager('x'); p.load_setuptools_entrypoints({GROUP!r}); print(len(p.get_plugins()))",
    "stevedore": f"import stevedore\nfor n in stevedore.ExtensionManager({GROUP!r}).names(): print(n)",
}
LOOKUPS = {
    "ours": ("from tersor import registry", "registry.find('codec', 'p7')"),
    "entrypoints": ("import entrypoints", f"entrypoints.get_single({GROUP!r}, 'p7')"),
    "importlib.metadata": ("import importlib.metadata as m", f"list(m.entry_points(group={GROUP!r}, name='p7'))[0]"),
    "ours, class": ("import tersor.api, tersor.kinds, numpy", "tersor.api.codec('p7')"),
    "entrypoints, module": ("import numpy, tersor.kinds, entrypoints", f"entrypoints.get_single({GROUP!r}, 'p7').load()"),
}


def run(size: Size) -> Report:
    count = size.pick(20, 300)
    rounds = size.pick(1, 11)
    known = [p for p in PROCESSES if p != "stevedore" or there("stevedore")]
    with tempfile.TemporaryDirectory() as plain_name, tempfile.TemporaryDirectory() as real_name:
        plain, real = Path(plain_name), Path(real_name)
        site(plain, count, PLAIN)
        site(real, count, MODULE)
        whole = turns({p: functools.partial(process, plain, PROCESSES[p]) for p in known}, rounds)
        calls = turns({k: functools.partial(timed, real, *v) for k, v in LOOKUPS.items()}, rounds)
        found = turns(
            {k: functools.partial(process, real, "\n".join(LOOKUPS[k])) for k in ("ours", "entrypoints", "importlib.metadata")},
            rounds,
        )
    click = whole["import click"] - whole["empty interpreter"]
    allowance = whole["importlib.metadata"] + click

    def row(case: str, measure: str, ours: float, peer: str, theirs: float | None, aim: float | None, note: str = "") -> Row:
        return Row(case=case, measure=measure, unit="ms", ours=1e3 * ours, peer=peer, theirs=theirs and 1e3 * theirs,
                   better="lower", aim=aim, note=note)  # fmt: skip

    rows = []
    for name in ("tersor list", "tersor list --json"):
        rows.append(row(name, "process", whole[name], "importlib.metadata + import click", allowance, 1.3))
        rows.append(row(name, "process", whole[name], "", None, 300))
    for peer in ("importlib.metadata", "entrypoints", "stevedore", "pluggy", "import click", "empty interpreter"):
        if peer in whole:
            rows.append(row("tersor list", "process", whole["tersor list"], peer, whole[peer], None))
    rows += [
        row("lookup of one name", "cold call", calls["ours"], "entrypoints.get_single", calls["entrypoints"], 1),
        row("lookup of one name", "cold call", calls["ours"], "importlib.metadata", calls["importlib.metadata"], 1),
        row("lookup of one name", "process", found["ours"], "entrypoints.get_single", found["entrypoints"], 1),
        row("lookup of one name", "process", found["ours"], "importlib.metadata", found["importlib.metadata"], 1),
        row("lookup, import, configured method", "cold call", calls["ours, class"], "entrypoints.get_single(...).load()",
            calls["entrypoints, module"], None, "ours also registers and checks the plugin"),
    ]  # fmt: skip
    if "stevedore" not in whole:
        rows.append(missing("tersor list", "stevedore", "pip install stevedore"))
    return Report(f"{count} distributions with a codec each, bare interpreter, warm disk cache", rows)
