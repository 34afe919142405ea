"""Writes what is not written by hand: the methods table, the catalogue, the API reference, the list of official methods.

    python tools/generate.py            write what has changed
    python tools/generate.py --check    write nothing; exit code 1 and the names of the stale files, if any

The facts come from the installed methods of this repository and from docs/evidence/*.json. The same input gives the same bytes.
A method that is not installed, or does not import, is named on standard error and left as it is; the latter is exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
os.environ.setdefault("OMP_NUM_THREADS", "1")

Method = dict[str, Any]


# -- what there is


def official() -> dict[tuple[str, str], Path]:
    """(kind, name) of every method in this repository, to the folder of its package."""
    out = {}
    for path in sorted(ROOT.glob("plugins/*/*/pyproject.toml")):
        groups = tomllib.loads(path.read_text("utf-8")).get("project", {}).get("entry-points", {})
        for group, entries in groups.items():
            kind = group.removeprefix("tersor.")
            if group.startswith("tersor.") and kind != "extension":
                out.update({(kind, name): path.parent for name in entries})
    return out


def gather(folders: dict[tuple[str, str], Path]) -> tuple[list[Method], list[tuple[str, str]], list[str]]:
    """The installed methods, sorted for the tables; (kind, name) of those left out; and why those fail that should not."""
    import tersor
    from tersor import registry

    installed = {(m["kind"], m["name"]): m for m in tersor.available()}
    methods, skipped, failures = [], [], []
    for (kind, name), folder in folders.items():
        if kind == "exporter":  # no method; docs/engines.md has them
            continue
        listed = installed.get((kind, name))
        if listed is None:
            skipped.append((kind, name))
            print(f"not installed, left as it is: {kind} {name} (make setup)", file=sys.stderr)
            continue
        try:
            info = tersor.info(f"{listed['distribution']}/{name}", kind)
        except tersor.TersorError as error:
            skipped.append((kind, name))
            failures.append(f"{kind} {name}: {error}")
            continue
        cls = registry.lookup(kind, f"{listed['distribution']}/{name}")
        evidence = DOCS / "evidence" / f"{name}.json"
        methods.append(
            {
                **info,
                "exact": getattr(cls, "exact", None),
                "page": name,
                "folder": folder,
                "evidence": json.loads(evidence.read_text("utf-8")) if evidence.is_file() else None,
            }
        )
    methods.sort(key=lambda m: (m["family"] == "reference", m["family"], m["name"], m["kind"]))
    taken: set[str] = set()
    for m in methods:
        if m["page"] in taken:
            m["page"] = f"{m['name']}-{m['kind']}"
        taken.add(m["page"])
    return methods, skipped, failures


# -- pieces of Markdown


def table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; bars and line ends in cells are made harmless."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(str(c).replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def overview(methods: list[Method], to: str) -> str:
    """The table of methods; ``to``: what stands before the name of a page."""
    rows = [
        [f"[{m['name']}]({to}{m['page']}.md)", m["kind"], m["family"], ", ".join(m["domains"]), m["summary"]] for m in methods
    ]
    return table(["method", "kind", "family", "domains", "summary"], rows)


def yes(value: Any) -> str:
    return "yes" if value else "no"


def facts(m: Method) -> str:
    rows = [["kind", m["kind"]], ["family", m["family"]], ["domains", ", ".join(m["domains"])]]
    if m["kind"] == "decoder":
        said = {"greedy": "the tokens of greedy decoding", "distribution": "the source's distribution"}
        rows.append(["output", said.get(m["exact"], "its own")])
    else:
        if m["kind"] != "pruner":
            rows.append(["lossless", yes(m["lossless"])])
        rows += [
            ["same bytes on every machine (bitwise)", yes(m["bitwise"])],
            ["needs a fitted state", yes(m["fitted"])],
            ["calibration", m["calibration"]],
        ]
    rows.append(["distribution", f"`{m['distribution']}` {m['version']}"])
    rows += [[label, f"<{url}>"] for label, url in m["urls"].items() if label != "Docs"]
    return table(["fact", "value"], rows)


def settings(m: Method) -> str:
    if not m["settings"]:
        return "It has no settings."
    from tersor.config import to_text

    rows = []
    for f in m["settings"]:
        default = "must be given" if f["required"] else f"`{to_text(f['default'])}`"
        rows.append([f"`{f['name']}`", f["type"], default, f["allowed"], f["help"]])
    return table(["setting", "type", "default", "allowed", "meaning"], rows)


def number(value: float) -> str:
    return f"{value:.4g}"


def claims(m: Method) -> str:
    e = m["evidence"]
    if e is None:
        return "No result is kept yet."
    rows = []
    for c in e["claims"]:
        needed = f"{c['better']}" + (f", by {100 * c['margin']:g} %" if c.get("margin") else "")
        verdict = "holds" if c["holds"] else "**does not hold**"
        baseline = f"{number(c['baseline'])} ({c['baseline_name']})"
        rows.append([c["claim"], c["metric"], number(c["ours"]), baseline, needed, verdict, c.get("note", "")])
    bad = sum(not c["holds"] for c in e["claims"])
    versions = ", ".join(f"{k} {v}" for k, v in sorted(e["versions"].items()))
    said = "All hold." if not bad else f"{bad} of {len(rows)} do not hold at this scale."
    return (
        table(["claim", "metric", "ours", "baseline", "better is", "verdict", "note"], rows)
        + f"\n\n{said} Run on {e['date']} with seed {e['seed']}; {versions}. The record: [{m['name']}.json](../evidence/{m['name']}.json)."
    )


def brief(m: Method) -> str:
    """The claims for the method's README: both sides, and whether they hold."""
    e = m["evidence"]
    if e is None:
        return "No result is kept yet."
    rows = []
    for c in e["claims"]:
        verdict = "yes" if c["holds"] else "**no**"
        rows.append([c["claim"], c["metric"], number(c["ours"]), f"{number(c['baseline'])} ({c['baseline_name']})", verdict])
    return table(["claim", "metric", "ours", "other side", "holds"], rows)


def demoted(text: str, folder: Path) -> str:
    """A README one heading level down, its relative links turned to where they lead in the catalogue, or to plain text."""
    out, fence = [], ""
    for line in text.strip().splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence:
            if re.match(r"#{1,5} ", line):
                line = "#" + line
            line = re.sub(r"(?<!!)\[([^]]+)\]\(([^)\s]+)\)", lambda m: _link(m, folder), line)
        out.append(line.rstrip())
    return "\n".join(out)


def _link(match: re.Match[str], folder: Path) -> str:
    text, target = match[1], match[2]
    if re.match(r"[a-z]+:|#", target):
        return match[0]
    path = Path(os.path.normpath(folder / target.partition("#")[0]))
    if path.is_relative_to(DOCS) and path.is_file():
        return f"[{text}]({os.path.relpath(path, DOCS / 'methods')})"
    return text


def plain(doc: str, link: Callable[[str], str] | None = None) -> str:
    """A docstring as Markdown: roles and double backquotes become code (linked where ``link`` knows them), ``::`` a code block."""
    lines = inspect.cleandoc(doc).splitlines()
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        opens, doctest = line.endswith("::"), line.startswith(">>> ")
        if not opens and not doctest:
            out.append(line)
            continue
        block = [re.sub(r"\s*# doctest:.*", "", line)] if doctest else []
        if opens:
            out += [line[:-1], ""]
        while at < len(lines) and ((lines[at].strip() and doctest) or (opens and lines[at][:1] in ("", " "))):
            block.append(re.sub(r"\s*# doctest:.*", "", lines[at]))
            at += 1
        out += ["```text" if opens else "```pycon", inspect.cleandoc("\n" + "\n".join(block)).strip("\n"), "```", ""]
    text = "\n".join(out)

    def code(match: re.Match[str]) -> str:
        name = match[1]
        href = link(name) if link else ""
        return f"[`{name}`]({href})" if href else f"`{name}`"

    pieces = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r":[a-z]+:`~?([^`]+)`", code, pieces[i])
        pieces[i] = re.sub(r"``([^`]+)``", r"`\1`", pieces[i])
        words = re.split(r"(`[^`\n]*`)", pieces[i])
        words[::2] = [re.sub(r"(?<!^)(?<!\n)\*", r"\\*", w).replace("<", "&lt;") for w in words[::2]]
        pieces[i] = "".join(words)
    return "".join(pieces).strip()


# -- pages


def page(m: Method) -> str:
    readme = m["folder"] / "README.md"
    parts = [
        f"# {m['name']}",
        m["summary"],
        facts(m),
        "## Install",
        f"```sh\npip install tersor {m['distribution']}\n```",
        "## Settings",
        settings(m),
    ]
    if m["doc"]:
        parts += ["## Reference", plain(m["doc"])]
    if readme.is_file():
        text = re.sub(r"<!-- claims -->\n.*?<!-- /claims -->", "The table is below.", readme.read_text("utf-8"), flags=re.DOTALL)
        parts.append(demoted(text, m["folder"]))
    if m["evidence"] is not None or (m["family"] != "reference"):
        parts += ["## Claims, measured", claims(m)]
    return "\n\n".join(parts) + "\n"


def catalogue(methods: list[Method]) -> str:
    parts = ["# Methods", "All methods of this repository. Reference methods are what the others are compared with."]
    for family in dict.fromkeys(m["family"] for m in methods):
        mine = [m for m in methods if m["family"] == family]
        rows = [[f"[{m['name']}]({m['page']}.md)", m["kind"], ", ".join(m["domains"]), m["summary"]] for m in mine]
        parts += [f"## {family}", table(["method", "kind", "domains", "summary"], rows)]
    return "\n\n".join(parts) + "\n"


def evidence_table(methods: list[Method]) -> str:
    rows = []
    for m in methods:
        if e := m["evidence"]:
            held = sum(c["holds"] for c in e["claims"])
            rows.append([f"[{m['name']}](methods/{m['page']}.md)", len(e["claims"]), held, e["seed"], e["date"]])
    return table(["method", "comparisons", "hold", "seed", "date"], rows) if rows else "No result is kept yet."


def domain_table() -> str:
    from tersor import DOMAINS

    rows = [[f"`{d.name}`", d.convention, d.elements, "refused" if d.finite else "allowed"] for d in DOMAINS.values()]
    return table(["domain", "convention", "elements", "NaN and infinity"], rows)


#: Module, what to call it, and the public names in the order in which a reader wants them.
API = (
    ("tersor.api", "Functions", "codec quantizer pruner decoder method available info compress decompress inspect"),
    ("tersor.jobs", "Many inputs", "compress_many decompress_many run Pool Lost"),
    (
        "tersor.results",
        "Results and inputs",
        "Payload Codes Mask Decoded Spec Calibration Uniform Source Session TreeSession branching",
    ),
    ("tersor.domains", "Domains", "Domain Audio Video"),
    ("tersor.kinds", "Base classes", "Method Codec Quantizer Pruner Decoder"),
    ("tersor.tokens", "Pruners of tokens", "TokenPruner Kept"),
    ("tersor.stream", "Streams", "Stream ErrorFeedback EF21"),
    ("tersor.config", "Configuration", "method field between at_least positive one_of"),
    ("tersor.hooks", "Hooks", "tersor_codec tersor_quantizer tersor_pruner tersor_decoder tersor_exporter tersor_operation"),
    ("tersor.progress", "Progress", "track listen on_terminal"),
    ("tersor.errors", "Errors", ""),
    ("tersor.io", "Files", "load save load_image load_audio"),
    ("tersor.video", "Video", "read write count_frames"),
    ("tersor.container", "Container", "read write dumps inspect"),
    ("tersor.metrics", "Metrics", "psnr ms_ssim snr relative_error bd_rate"),
    ("tersor.bench", "Bench", "expand measure run plot"),
    ("tersor.model", "Models", ""),
    ("tersor.model.board", "Leaderboards", "Protocol standard configurations run measure table frontier plot"),
    ("tersor.exporters", "Exports", "export exporter Exporter ExportModel ModelTensor Exported"),
    ("tersor.distributed", "Distributed training", "State hook"),
    ("tersor.zarr", "zarr", "TersorCodec TersorSerializer"),
    ("tersor.testing", "Conformance", "check_method assert_conforms Result TableSource greedy_tokens"),
    ("tersor.evidence", "Evidence", "Row claim claims_of verify record"),
    ("tersor.data", "Data", "photographs digits english_text wikitext2 video smollm2 smollm2_file minilm shared"),
)


class _Words(str):
    """An annotation that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)


def signature(thing: Any) -> str:
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    parameters = []
    for i, p in enumerate(found.parameters.values()):
        if i == 0 and p.name in ("self", "cls", "_cls"):
            continue
        if p.annotation is not p.empty:
            p = p.replace(annotation=_Words(inspect.formatannotation(p.annotation).strip("'")))
        parameters.append(p)
    gives = found.return_annotation
    if gives is not inspect.Signature.empty and gives not in (None, "None"):
        gives = _Words(inspect.formatannotation(gives).strip("'"))
    else:
        gives = inspect.Signature.empty
    text = str(found.replace(parameters=parameters, return_annotation=gives))
    return re.sub(r"<factory>|NOTHING", "...", text).replace("'", '"')


def members(cls: type) -> list[tuple[str, str, str]]:
    """Name, signature and docstring of the public functions and properties that a class defines itself."""
    out = []
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        inner = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        doc = inspect.getdoc(inner)
        if not doc:
            continue
        if isinstance(inner, property):
            out.append((name, "", doc))
        elif inspect.isfunction(inner):
            out.append((name, signature(inner), doc))
    return out


def api() -> str:
    import tersor

    homes: dict[str, str] = {}
    sections = []
    for module_name, title, names in API:
        module = importlib.import_module(module_name)
        if module_name == "tersor.errors":
            chosen = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, tersor.TersorError)]
        else:
            chosen = names.split() or list(module.__all__)
        sections.append((module, title, chosen))
        for name in chosen:
            full = f"{module_name}.{name}"
            homes[full] = "#" + re.sub(r"[^a-z0-9_]", "", shown(module_name, name).lower())
            homes[shown(module_name, name)] = homes[full]

    parts = [
        "# Reference",
        "What `import tersor` and its public modules offer. Names that stand under `tersor.` here are imported from there.",
    ]
    for module, title, chosen in sections:

        def link(target: str, here: str = module.__name__) -> str:
            return homes.get(target) or homes.get(f"{here}.{target}", "")

        parts += [f"## {title}"]
        for name in chosen:
            thing = getattr(module, name)
            parts.append(f"### {shown(module.__name__, name)}")
            doc = inspect.getdoc(thing) or ""
            error = isinstance(thing, type) and issubclass(thing, Exception)
            if error:
                bases = ", ".join(f"`{b.__name__}`" for b in thing.__bases__)
                parts.append(f"{plain(doc, link)} Derives from {bases}.")
                continue
            if "Protocol" not in str(getattr(thing, "__mro__", "")) and module.__name__ != "tersor.kinds":
                parts.append(f"```python\n{name}{signature(thing)}\n```")
            parts.append(plain(doc, link))
            if isinstance(thing, type):
                for member, sign, text in members(thing):
                    body = plain(text, link).replace("\n", "\n    ").replace("\n    \n", "\n\n")
                    parts.append(f"- `{member}{sign}`: {body}")
    return "\n\n".join(p for p in parts if p) + "\n"


def shown(module: str, name: str) -> str:
    """The name under which a thing is imported."""
    import tersor

    return f"tersor.{name}" if tersor._HOME.get(name) == module else f"{module}.{name}"


def between(text: str, mark: str, new: str) -> str:
    """``text`` with what stands between the two markers replaced."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no markers <!-- {mark} --> ... <!-- /{mark} -->")
    return pattern.sub(lambda m: f"{m[1]}{new}\n{m[2]}", text, count=1)


def build() -> tuple[dict[Path, str | None], list[str]]:
    """Every generated file with its text (None: the file has to go), and what failed."""
    folders = official()
    lines = sorted(f"{name}\t{kind}\n" for kind, name in folders)
    files: dict[Path, str | None] = {ROOT / "core/src/tersor/official.txt": "".join(lines)}
    methods, skipped, failures = gather(folders)
    for path, mark, text in (
        (ROOT / "README.md", "methods", overview(methods, "docs/methods/")),
        (DOCS / "evidence.md", "evidence", evidence_table(methods)),
        (DOCS / "authoring.md", "domains", domain_table()),
    ):
        files[path] = between(path.read_text("utf-8"), mark, text)
    for m in methods:
        readme = m["folder"] / "README.md"
        if readme.is_file() and "<!-- claims -->" in (text := readme.read_text("utf-8")):
            files[readme] = between(text, "claims", brief(m))
    files[DOCS / "methods/index.md"] = catalogue(methods)
    files |= {DOCS / f"methods/{m['page']}.md": page(m) for m in methods}
    keep = {DOCS / f"methods/{name}.md" for _, name in skipped}
    for old in DOCS.glob("methods/*.md"):
        if old not in files and old not in keep:
            files[old] = None
    files[DOCS / "api.md"] = api()
    return files, failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated files.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is stale")
    check = parser.parse_args().check
    files, failures = build()
    stale = 0
    for path, text in sorted(files.items()):
        old = path.read_text("utf-8") if path.is_file() else None
        if old == text:
            continue
        stale += 1
        print(f"{'stale' if check else 'removed' if text is None else 'wrote'}: {path.relative_to(ROOT)}")
        if check:
            continue
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    for failure in failures:
        print(f"fails: {failure}", file=sys.stderr)
    if check and stale:
        print(f"{stale} stale: run `make generate`", file=sys.stderr)
    return 1 if failures or (check and stale) else 0


if __name__ == "__main__":
    raise SystemExit(main())
