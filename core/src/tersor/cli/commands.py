"""The commands themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from tersor.cli import show_json, tersor

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

_FRAMES = click.option("--frames", metavar="START:STOP", help="Videos: only these frames, such as 0:32 or 0:100:2.")
_SIZE = click.option("--size", metavar="WxH", help="Videos: scale to this size when reading.")


def _many(command: Any) -> Any:
    """The options of commands that take several inputs."""
    for option in reversed(
        (
            click.option("--force", is_flag=True, help="Overwrite the output."),
            click.option("--skip-existing", is_flag=True, help="Leave outputs that are there: take up a run that was cut off."),
            click.option(
                "-j",
                "--jobs",
                type=click.IntRange(min=1),
                default=1,
                show_default=True,
                help="Several inputs, or the tensors of a model: at a time.",
            ),
            click.option("--engine", metavar="WHERE", help="Where: loky, dask://HOST:PORT, ray or ray://HOST:PORT."),
        )
    ):
        command = option(command)
    return command


def _complete_method(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from tersor import registry

    return sorted(n for k, n in registry.index() if k in registry.KINDS and n.startswith(incomplete))


def _complete_exporter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from tersor import registry

    return sorted(n for k, n in registry.index() if k == "exporter" and n.startswith(incomplete))


def _complete_any(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return sorted({*_complete_method(ctx, param, incomplete), *_complete_exporter(ctx, param, incomplete)})


def _table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Plain aligned columns, cut to the terminal's width where there is one."""
    cells = [columns] + [[_cell(r.get(c, "")) for c in columns] for r in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    width = (os.get_terminal_size().columns if sys.stdout.isatty() else 0) or 10**6  # 0: the terminal does not say
    for row in cells:
        click.echo("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip()[:width])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


@click.command("list")
@click.option("--kind", type=click.Choice(["codec", "quantizer", "pruner", "decoder", "exporter"]), help="Only this kind.")
@click.option("--family", help="Only methods of this family.")
@click.option("--domain", help="Only methods for this domain.")
@_JSON
def list_(kind: str | None, family: str | None, domain: str | None, as_json: bool) -> None:
    """List the installed methods and exporters. Reads metadata only and imports no plugin.

    Status: ok; broken (its last import failed, or it needs another tersor: see `tersor doctor`); conflict (two distributions
    offer the name: choose with DISTRIBUTION/NAME).
    """
    from tersor.api import available

    rows = available(kind, family, domain) + ([] if kind else available("exporter", family, domain))
    if as_json:
        show_json(rows)
    elif not rows:
        click.echo("no methods are installed" if not (kind or family or domain) else "no installed method fits")
    else:
        _table(rows, ["name", "kind", "family", "domain", "status", "summary"])


@click.command("info")
@click.argument("name", shell_complete=_complete_any)
@_JSON
def info_(name: str, as_json: bool) -> None:
    """Show what a method or exporter is, its facts and its settings with types, defaults and allowed values."""
    from tersor.api import info

    out = info(name)
    if as_json:
        show_json(out)
        return
    click.echo(f"{out['name']} ({out['kind']}, {out['family']}): {out['summary']}")
    where = f"distribution {out['distribution']} {out['version']}"
    if out["kind"] == "exporter":
        click.echo(f"{where}; writes {out['writes']}")
    else:
        click.echo(f"{where}; domains {', '.join(out['domains'])}")
        facts = [k for k in ("lossless", "bitwise", "fitted") if out[k]] + [f"calibration {out['calibration']}"]
        click.echo("; ".join(facts))
    for label, url in out["urls"].items():
        click.echo(f"{label}: {url}")
    if out["settings"]:
        click.echo("\nsettings:")
        for f in out["settings"]:
            default = "must be given" if f["required"] else f"default {f['default']}"
            allowed = f"; {f['allowed']}" if f["allowed"] else ""
            click.echo(f"  {f['name']} ({f['type']}, {default}{allowed})  {f['help']}")
    if out["doc"]:
        import inspect

        click.echo("\n" + inspect.cleandoc(out["doc"]))


@click.command("compress")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "--with",
    "with_",
    required=True,
    metavar="METHOD",
    shell_complete=_complete_method,
    help="NAME:key=value,key=value, for example gptq:bits=4,group_size=128",
)
@click.option("-o", "--output", help="The .tsr file to write (default: SOURCE.tsr), or the folder, for several.")
@click.option(
    "--to", metavar="EXPORTER", shell_complete=_complete_exporter, help="Models: write this format instead, NAME:key=value,..."
)
@click.option("--state", type=click.Path(exists=True), help="A saved state (.safetensors) for a fitted method.")
@click.option("--recipe", type=click.Path(exists=True), help="Models: JSON list of [pattern, method or null], first match wins.")
@click.option("--calibration", type=click.Path(exists=True), help="Models: a text file; arrays: a .npy file, samples x in.")
@click.option("--samples", type=int, default=32, show_default=True, help="Models: windows of calibration text.")
@click.option("--window", type=int, default=512, show_default=True, help="Models: tokens in a window.")
@_FRAMES
@_SIZE
@click.option("--dry-run", is_flag=True, help="Models: print which tensor each pattern matches, and stop.")
@_many
@_JSON
def compress_(
    sources: tuple[str, ...],
    with_: str,
    output: str | None,
    to: str | None,
    state: str | None,
    recipe: str | None,
    calibration: str | None,
    samples: int,
    window: int,
    frames: str | None,
    size: str | None,
    dry_run: bool,
    force: bool,
    skip_existing: bool,
    jobs: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Compress SOURCE: an image, audio, video, .npy or any other file, or a model (a transformers folder, .safetensors, .gguf).

    Several files, a folder, a quoted pattern ("photos/*.png") or a remote one go to .tsr files in the folder OUTPUT; one that fails
    does not stop the others (exit code 1). A path may be remote: s3://..., https://... and what else fsspec knows.

    A model is done block by block with calibration; a killed run goes on where it stopped when started again. It becomes one .tsr
    file, or with --to what an inference engine reads, such as a folder for transformers (`tersor list --kind exporter`).
    """
    from tersor import remote
    from tersor.api import as_method, compress
    from tersor.io import is_model
    from tersor.progress import on_terminal

    m = as_method(with_)
    if state:
        m = m.load(state)
    part = {k: v for k, v in (("frames", frames), ("size", size)) if v}
    if len(sources) > 1 or (remote.several(sources[0]) and not is_model(sources[0], m)):
        from tersor.jobs import compress_many

        if dry_run or recipe or to:
            raise click.UsageError("--dry-run, --recipe and --to belong to single models")
        if not output:
            raise click.UsageError("several inputs need a folder: -o FOLDER")
        given = part | ({"calibration": os.path.abspath(calibration)} if calibration else {})
        with on_terminal():
            rows = compress_many(sources, m, output, jobs=jobs, engine=engine, force=force, skip_existing=skip_existing, **given)
        _show_many(rows, f" with {m}", as_json)
        return
    source = str(remote.local(sources[0]))
    model = is_model(source, m)
    options: dict[str, Any] = {}
    _single(source, *((1, None) if model else (jobs, engine)))
    if remote.is_remote(source) and not output:
        raise click.UsageError("a remote input needs an output: -o PATH")
    target = str(remote.local(output or f"{source.rstrip('/')}.tsr"))
    if to:
        target = _exported(source, output, to, model)
        options["to"], options["replace"] = to, force
    elif model and not remote.is_remote(target) and (target.endswith("/") or os.path.isdir(target)):
        from tersor.api import available

        formats = ", ".join(e["name"] for e in available("exporter")) or "none is installed"
        raise click.UsageError(
            f"a model becomes one .tsr file, and {target} is a folder; for a folder or file that an engine reads: --to EXPORTER ({formats})"
        )
    if remote.exists(target) and not force and not dry_run and not (to and _empty(target)):
        _there(target, skip_existing, as_json)
        return
    options |= part
    if model:
        options |= {"recipe": recipe, "samples": samples, "window": window, "jobs": jobs, "engine": engine}
        if dry_run:
            from tersor.model import plan_model

            rows = plan_model(source, m, recipe=recipe)
            if as_json:
                show_json(rows)
            else:
                _table(rows, ["tensor", "shape", "pattern", "method"])
            return
    elif dry_run or recipe:
        raise click.UsageError("--dry-run and --recipe belong to models")
    elif calibration:
        from tersor.io import load

        if m.calibration == "none":
            raise click.UsageError(f"{m.name} takes no calibration")
        options["calibration"] = load(calibration)
        calibration = None
    if calibration:
        try:
            options["calibration"] = Path(calibration).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{calibration} is not UTF-8 text") from error
    with on_terminal():
        compress(source, m, target, **options)
    before, after = remote.size(source), remote.size(target)
    if as_json:
        show_json({"output": target, "method": str(m), "input_bytes": before, "bytes": after, "ratio": before / max(after, 1)})
    else:
        click.echo(f"{target}: {before:,} bytes to {after:,} ({after / max(before, 1):.1%}) with {m}")


def _exported(source: str, output: str | None, to: str, model: bool) -> str:
    """Where a model goes that is compressed and exported in one step."""
    from tersor.exporters import as_exporter

    if not model:
        raise click.UsageError("--to exports whole models")
    suffix = as_exporter(to).suffix
    if not output and not suffix:
        raise click.UsageError(f"{to} writes a folder: -o FOLDER")
    return (output or f"{source.rstrip('/')}{suffix}").rstrip("/")


def _empty(path: str) -> bool:
    return os.path.isdir(path) and not os.listdir(path)


def _single(source: str, jobs: int, engine: str | None) -> None:
    from tersor import remote

    if jobs > 1 or engine:
        raise click.UsageError("--jobs and --engine spread several inputs, or the tensors of a model; one file was given")
    if not remote.is_remote(source) and not os.path.exists(source):
        raise click.UsageError(f"Path {source!r} does not exist.")


def _there(target: str, skip_existing: bool, as_json: bool) -> None:
    if not skip_existing:
        raise click.UsageError(f"{target} exists; choose another output or give --force")
    if as_json:
        show_json({"output": target, "skipped": True})
    else:
        click.echo(f"{target}: is there already")


def _show_many(rows: list[dict[str, Any]], said: str, as_json: bool) -> None:
    """The end of a run over several inputs: the list as JSON or a line, the table of what failed, exit code 1 if anything did."""
    failed = [r for r in rows if "error" in r]
    good = [r for r in rows if "error" not in r]
    if as_json:
        show_json(rows)
    else:
        skipped = sum("skipped" in r for r in good)
        line = f"{len(good) - skipped} of {len(rows)} files done{said}" + (f", {skipped} were there" if skipped else "")
        before, after = (sum(r.get(k, 0) for r in good) for k in ("input_bytes", "bytes"))
        if before:
            line += f": {before:,} bytes to {after:,} ({after / before:.1%})"
        click.echo(line)
        if failed:
            click.echo(f"{len(failed)} failed:", err=True)
            for r in failed:
                click.echo(f"  {r['source']}  {r['error']}", err=True)
    if failed:
        sys.exit(1)


@click.command("decompress")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="File (its suffix says the format) or, for a model and for several, folder.")
@click.option("--suffix", metavar=".EXT", help="Several: the suffix of every output. Default: one that keeps the data as it is.")
@click.option("--state", type=click.Path(exists=True), help="The saved state that the file needs.")
@click.option("--limit", type=click.IntRange(min=1), help="Bytes that a decoded array may take. Default: 4 GiB.")
@_many
@_JSON
def decompress_(
    sources: tuple[str, ...],
    output: str,
    suffix: str | None,
    state: str | None,
    limit: int | None,
    force: bool,
    skip_existing: bool,
    jobs: int,
    engine: str | None,
    as_json: bool,
) -> None:
    """Restore what the .tsr file SOURCE holds; several files, a folder, a quoted pattern: into the folder OUTPUT."""
    from tersor import remote
    from tersor.api import decompress
    from tersor.progress import on_terminal

    if len(sources) > 1 or remote.several(sources[0]):
        from tersor.jobs import decompress_many

        with on_terminal():
            rows = decompress_many(
                sources, output, jobs=jobs, engine=engine, force=force, skip_existing=skip_existing, suffix=suffix,
                state=state, limit=limit,
            )  # fmt: skip
        _show_many(rows, "", as_json)
        return
    source, target = str(remote.local(sources[0])), str(remote.local(output))
    _single(source, jobs, engine)
    if suffix:
        raise click.UsageError("--suffix belongs to several inputs; the output's own suffix says the format")
    if remote.exists(target) and not force and not _empty(target):
        _there(target, skip_existing, as_json)
        return
    with on_terminal():
        decompress(source, target, state=state, limit=limit, replace=force)
    if as_json:
        show_json({"output": target})
    else:
        click.echo(target)


@click.command("export")
@click.argument("source", metavar="MODEL.tsr", type=click.Path(exists=True, dir_okay=False))
@click.option("--to", required=True, metavar="EXPORTER", shell_complete=_complete_exporter, help="NAME:key=value,key=value")
@click.option("-o", "--output", help="The file or folder to write; a file's default: MODEL with the exporter's suffix.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@_JSON
def export_(source: str, to: str, output: str | None, force: bool, as_json: bool) -> None:
    """Write a compressed model in the format of an inference engine. The values stay those of MODEL.tsr.

    What the format cannot hold is an error that names the tensors and the property. `tersor list --kind exporter` lists the formats.
    """
    from collections import Counter

    from tersor.exporters import as_exporter
    from tersor.progress import on_terminal

    exporter = as_exporter(to)
    if not output and not exporter.suffix:
        raise click.UsageError(f"{exporter.name} writes a folder: -o FOLDER")
    target = (output or os.path.splitext(source)[0] + exporter.suffix).rstrip("/")
    if os.path.lexists(target) and not force and not _empty(target):
        _there(target, False, as_json)
    with on_terminal():
        done = exporter.export(source, target, replace=force)
    if as_json:
        row = {"output": str(done.path), "exporter": str(exporter), "input_bytes": os.path.getsize(source)}
        show_json({**row, "bytes": done.nbytes, "tensors": done.tensors})
    else:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in Counter(done.tensors.values()).most_common())
        click.echo(f"{target}: {done.nbytes:,} bytes ({kinds})")


@click.command("inspect")
@click.argument("source", type=click.Path(exists=True, dir_okay=False))
@_JSON
def inspect_(source: str, as_json: bool) -> None:
    """Show a .tsr file's header, the size of every part and the state of its checksum. Loads no plugin.

    Exit code 1 where the checksum does not match.
    """
    from tersor.container import inspect

    out = inspect(source)
    if as_json:
        show_json(out)
    else:
        for key, value in out.items():
            if key != "parts":
                click.echo(f"{key}: {_cell(value)}")
        click.echo("parts:")
        for p in out["parts"]:
            click.echo(f"  {p['name']}  {p['dtype']} {'x'.join(map(str, p['shape']))}  {p['bytes']:,} bytes")
    if out["checksum"] != "ok":
        sys.exit(1)


@click.command("bench")
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--with",
    "with_",
    multiple=True,
    metavar="METHOD",
    shell_complete=_complete_method,
    help="A method; give several. A slash sweeps a setting: jpeg:quality=10/30/60",
)
@click.option(
    "--kind", type=click.Choice(["quantizer"]), help="Every installed weight quantizer on the model FILES (a folder or .gguf)."
)
@click.option(
    "--bits", type=click.IntRange(1, 8), multiple=True, help="With --kind: bits a weight; give several. Default: 2, 3 and 4."
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=8, show_default=True, help="With --kind: calibration windows of 512 tokens."
)
@click.option(
    "--tokens", type=click.IntRange(min=2), default=8193, show_default=True, help="With --kind: tokens of the text that judge."
)
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False), help="With --kind: a text file that calibrates.")
@click.option(
    "--text", "texts", type=click.Path(exists=True, dir_okay=False), multiple=True, help="With --kind: a text file that judges."
)
@click.option("--cache", type=click.Path(file_okay=False), help="With --kind: the folder that keeps finished rows.")
@click.option("--plot", type=click.Path(), help="Write a rate-distortion plot (.svg, .png, .pdf).")
@click.option("--repeat", type=click.IntRange(1, 100), default=1, show_default=True, help="Best time of so many runs.")
@_FRAMES
@_SIZE
@_JSON
def bench_(
    files: tuple[str, ...],
    with_: tuple[str, ...],
    kind: str | None,
    bits: tuple[int, ...],
    samples: int,
    tokens: int,
    calibration: str | None,
    texts: tuple[str, ...],
    cache: str | None,
    plot: str | None,
    repeat: int,
    frames: str | None,
    size: str | None,
    as_json: bool,
) -> None:
    """Compare methods on FILES: size of the written file, quality after decoding from it, seconds.

    FILES may be files, folders, quoted patterns ("photos/*.png") and remote paths. With --kind quantizer it is one language model:
    bits of the written weights, perplexity, seconds, memory and decoded tokens per second of every installed weight quantizer, or
    of those given by --with. A run that was cut off goes on where it stopped.
    """
    from tersor import bench
    from tersor.progress import on_terminal

    if kind:
        _bench_model(files, with_, bits, samples, tokens, calibration, texts, cache, plot, as_json)
        return
    if not with_:
        raise click.UsageError("give a method: --with NAME, or --kind quantizer for all weight quantizers on a model")
    given = {"--bits": bits, "--calibration": calibration, "--text": texts, "--cache": cache}
    if wrong := [n for n, v in given.items() if v]:
        raise click.UsageError(f"{wrong[0]} belongs to --kind quantizer")
    with on_terminal():
        rows = list(bench.run(list(files), list(with_), repeat, frames=frames, size=size))
    if plot:
        bench.plot(rows, plot)
    if as_json:
        show_json(rows)
    else:
        keys = [
            "file",
            "method",
            "bytes",
            "bits_per_pixel",
            "bits_per_frame",
            "bits_per_element",
            "ratio",
            "psnr_db",
            "ms_ssim",
            "snr_db",
            "relative_error",
            "exact",
            "encode_seconds",
            "decode_seconds",
            "encode_frames_per_second",
            "decode_frames_per_second",
            "error",
        ]
        _table(rows, [k for k in keys if any(k in r for r in rows)])
    if all("error" in r for r in rows):
        sys.exit(1)


def _bench_model(
    files: tuple[str, ...], with_: tuple[str, ...], bits: tuple[int, ...], samples: int, tokens: int, calibration: str | None,
    texts: tuple[str, ...], cache: str | None, plot: str | None, as_json: bool,
) -> None:  # fmt: skip
    """The leaderboard of weight quantizers on one model."""
    import attrs

    from tersor.model import board
    from tersor.progress import on_terminal

    if len(files) != 1:
        raise click.UsageError(f"--kind quantizer takes one model; given: {len(files)} paths")
    protocol = board.standard(samples, tokens)
    if calibration:
        protocol = attrs.evolve(protocol, calibration=Path(calibration).read_text("utf-8"))
    if texts:
        protocol = attrs.evolve(protocol, texts={Path(t).name: Path(t).read_text("utf-8") for t in texts})
    with on_terminal():
        rows = list(board.run(files[0], board.configurations(bits or board.BITS, with_ or None), protocol, cache=cache))
    if plot:
        board.plot(rows, plot)
    if as_json:
        show_json(rows)
    else:
        shown = board.table(rows)
        _table(shown, list(dict.fromkeys(k for r in shown for k in r)))
    if all("error" in r for r in rows if r["method"] != "float32"):
        sys.exit(1)


@click.command("check")
@click.argument("name", shell_complete=_complete_method)
@click.option("--examples", type=click.IntRange(1, 10000), default=10, show_default=True, help="Inputs to draw for each check.")
@_JSON
def check_(name: str, examples: int, as_json: bool) -> None:
    """Run the conformance checks of NAME's kind; exit code 1 if one fails."""
    from tersor.progress import on_terminal
    from tersor.registry import cache_folder

    # hypothesis would otherwise leave a folder where the command is run
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(cache_folder() / "hypothesis"))
    from tersor.testing import check_method

    with on_terminal():
        results = check_method(name, max_examples=examples)
    rows = [{"check": r.check, "passed": r.passed, "skipped": r.skipped, "reason": r.reason} for r in results]
    if as_json:
        show_json(rows)
    else:
        _table([{**r, "passed": "skipped" if r["skipped"] else r["passed"]} for r in rows], ["check", "passed", "reason"])
    if not all(r["passed"] for r in rows):
        sys.exit(1)


@click.command("verify")
@click.argument("name", shell_complete=_complete_method)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", help="Only claims whose title contains this.")
@click.option("--record", type=click.Path(file_okay=False), help="Keep the result as FOLDER/NAME.json.")
@_JSON
def verify_(name: str, seed: int, only: str | None, record: str | None, as_json: bool) -> None:
    """Re-run the claims of NAME on real data and print both sides; exit code 1 if one does not hold."""
    from tersor import evidence
    from tersor.progress import on_terminal

    rows = []
    with on_terminal():
        for row in evidence.verify(name, seed, only):
            rows.append(row)
            if not as_json:
                sign = ("<" if row["better"] == "lower" else ">") + ("=" if row.get("tie") else "")
                sign = "~" + sign if row.get("slack") else sign
                verdict = "holds" if row["holds"] else "DOES NOT HOLD"
                click.echo(
                    f"{row['claim']}: {row['metric']} {row['ours']:.5g} {sign} {row['baseline']:.5g} "
                    f"({row['baseline_name']}): {verdict}  [{row['seconds']} s]"
                )
    if record:
        evidence.record(name, rows, seed, record)
    if as_json:
        show_json(rows)
    if not all(r["holds"] for r in rows):
        sys.exit(1)


@click.command("doctor")
@click.argument("name", required=False, shell_complete=_complete_method)
@_JSON
def doctor_(name: str | None, as_json: bool) -> None:
    """Import every plugin and extension (or NAME's), and show the traceback of those that fail; exit code 1 if one does."""
    from tersor import registry
    from tersor.errors import ConflictError, TersorError

    rows = []
    for kind, method in sorted(registry.index()):
        if name and method != name.rpartition("/")[2]:
            continue
        row = {"name": method, "kind": kind, "status": "ok", "reason": "", "traceback": ""}
        try:
            if kind == "extension":
                _try_extensions(method)
            else:
                registry.lookup(kind, name if name and "/" in name else method)
        except TersorError as error:
            row["status"] = "conflict" if isinstance(error, ConflictError) else "broken"
            row["reason"] = str(error)
            row["traceback"] = registry.failure(kind, method) or ""
        rows.append(row)
    if name and not rows:
        registry.kind_of(name)
    if as_json:
        show_json(rows)
    else:
        bad = [r for r in rows if r["status"] != "ok"]
        for r in bad:
            click.echo(f"{r['name']} ({r['kind']}): {r['status']}: {r['reason']}")
            if r["traceback"]:
                click.echo(r["traceback"])
        click.echo(f"{len(rows) - len(bad)} plugins work, {len(bad)} do not")
    if any(r["status"] != "ok" for r in rows):
        sys.exit(1)


def _try_extensions(name: str) -> None:
    """Import and register the extensions of that name, which an operation would leave out with a warning."""
    import warnings

    from tersor import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        registry._manager()
    for entry in registry.index()["extension", name]:
        registry._register(entry)


@click.command("new")
@click.argument("name")
@click.option("--kind", type=click.Choice(["codec", "quantizer", "pruner", "decoder"]), default="codec", show_default=True)
@click.option("-o", "--output", type=click.Path(file_okay=False), help="Folder to write; default: tersor-NAME")
@_JSON
def new_(name: str, kind: str, output: str | None, as_json: bool) -> None:
    """Write the package of a new method: it installs, is found, passes `tersor check`, and shows how to go on."""
    from tersor.scaffold import create

    folder = create(name, kind, output)
    if as_json:
        show_json({"folder": str(folder), "name": name, "kind": kind})
    else:
        click.echo(f"{folder}: pip install -e {folder}, then tersor check {name}; README.md says how to go on")


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_(shell: str) -> None:
    """Print the completion script for SHELL; for bash: eval "$(tersor completion bash)"."""
    from click.shell_completion import get_completion_class

    cls = get_completion_class(shell)
    if cls is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(cls(tersor, {}, "tersor", "_TERSOR_COMPLETE").source())
