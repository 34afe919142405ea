"""Discovery and lookup.

Discovery reads the metadata of installed distributions and imports nothing. A lookup imports and registers with pluggy the one
plugin asked for. A broken plugin fails under its own name only.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tersor.errors import ConflictError, PluginError, UnknownMethodError

if TYPE_CHECKING:
    from collections.abc import Callable

    import pluggy

KINDS = ("codec", "quantizer", "pruner", "decoder")
#: what a plugin can offer by name: methods of the four kinds, and exporters
OFFERS = (*KINDS, "exporter")
_GROUPS = {f"tersor.{kind}": kind for kind in (*OFFERS, "extension")}


class Entry(NamedTuple):
    """One entry point of one distribution, as its metadata says."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str
    folder: str  # the .dist-info folder

    @property
    def metadata(self) -> dict[str, list[str]]:
        """The header fields of the distribution's METADATA, lower-case names to lists of values."""
        out: dict[str, list[str]] = {}
        try:
            text = Path(self.folder, "METADATA").read_text("utf-8", "replace")
        except OSError:
            return out
        last: list[str] | None = None
        for line in text.splitlines():
            if not line:
                break
            if line[0] in " \t":
                if last:
                    last[-1] += " " + line.strip()
                continue
            key, _, value = line.partition(":")
            last = out.setdefault(key.lower(), [])
            last.append(value.strip())
        return out

    def keywords(self, prefix: str, metadata: dict[str, list[str]] | None = None) -> list[str]:
        """The values of keywords such as ``family:vq`` and ``domain:image``."""
        words = ",".join((self.metadata if metadata is None else metadata).get("keywords", [])).split(",")
        return [w.strip()[len(prefix) + 1 :] for w in words if w.strip().startswith(prefix + ":")]


def _plain(distribution: str) -> str:
    """The normalised form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _read_entry_points(path: str) -> list[tuple[str, str, str]]:
    """(group, name, target) of the groups of Tersor in one entry_points.txt."""
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except OSError:
        return []
    if b"[tersor." not in raw:
        return []
    out, group = [], ""
    for line in raw.decode("utf-8", "replace").splitlines():
        line = line.strip()
        if line.startswith("["):
            group = line[1 : line.find("]")].strip()
        elif group in _GROUPS and "=" in line and line[0] not in "#;":
            name, _, target = line.partition("=")
            out.append((group, name.strip(), target.strip()))
    return out


def _scan_folder(folder: str) -> list[Entry]:
    entries = []
    try:
        with os.scandir(folder or ".") as it:
            names = [e.name for e in it if e.name.endswith((".dist-info", ".egg-info"))]
    except OSError:
        return []
    for name in names:
        info = os.path.join(folder, name)
        for group, entry, target in _read_entry_points(os.path.join(info, "entry_points.txt")):
            distribution, _, version = name.rpartition(".")[0].partition("-")
            entries.append(Entry(_GROUPS[group], entry, target, distribution.replace("_", "-"), version, info))
    return entries


#: discovery, registration and lookup are done by one thread at a time
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().__setitem__("_lock", threading.RLock()))
_folders: dict[str, tuple[int, list[Entry]]] = {}
_index: tuple[tuple[Any, ...], dict[tuple[str, str], list[Entry]]] | None = None


def index() -> dict[tuple[str, str], list[Entry]]:
    """(kind, name) to the entry points that claim it, over ``sys.path``. Rescans only folders that changed."""
    with _lock:
        return _scan()


def _scan() -> dict[tuple[str, str], list[Entry]]:
    global _index
    stamp = []
    for folder in sys.path:
        try:
            stamp.append((folder, os.stat(folder or ".").st_mtime_ns))
        except OSError:
            continue
    key = tuple(stamp)
    if _index is not None and _index[0] == key:
        return _index[1]
    out: dict[tuple[str, str], list[Entry]] = {}
    seen: dict[str, str] = {}
    for folder, changed in stamp:
        if folder not in _folders or _folders[folder][0] != changed:
            _folders[folder] = (changed, _scan_folder(folder))
        for entry in _folders[folder][1]:
            plain = _plain(entry.distribution)
            if seen.setdefault(plain, entry.folder) != entry.folder:
                continue  # the same distribution, shadowed by an earlier folder of the path
            out.setdefault((entry.kind, entry.name), []).append(entry)
    _index = (key, out)
    _classes.clear()
    return out


_classes: dict[tuple[str, str], Any] = {}
_failures: dict[tuple[str, str], str] = {}


def _manager() -> pluggy.PluginManager:
    with _lock:
        return _make_manager()


def _make_manager() -> pluggy.PluginManager:
    global _pm
    if _pm is None:
        import pluggy

        from tersor import hooks

        class _Core:
            """Core's own last word on an operation: do it."""

            @hooks.hookimpl(trylast=True)
            def tersor_operation(self, call: Callable[[], Any]) -> Any:
                return call()

        _pm = pluggy.PluginManager("tersor")
        _pm.add_hookspecs(hooks)
        _pm.register(_Core(), "tersor")
        for (kind, _), entries in index().items():
            if kind == "extension":
                for entry in entries:
                    try:
                        _register(entry)
                    except PluginError as error:
                        import warnings

                        warnings.warn(f"extension {entry.name} is left out: {error}", RuntimeWarning, stacklevel=3)
    return _pm


_pm: pluggy.PluginManager | None = None


def cache_folder() -> Path:
    """Where Tersor keeps what it can make again: TERSOR_CACHE, or ``tersor`` in the user's cache folder."""
    own = os.environ.get("TERSOR_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "tersor")


def _cache_file() -> Path:
    return cache_folder() / "broken.json"


def _stamp(entry: Entry) -> str:
    """Identifies one installation of a distribution: it changes when the distribution is installed anew."""
    try:
        return f"{entry.folder}@{os.stat(entry.folder).st_mtime_ns}"
    except OSError:
        return entry.folder


def known_broken() -> dict[str, str]:
    """Installations whose import failed when it was last tried, to the last line of why."""
    try:
        out = json.loads(_cache_file().read_text("utf-8"))
        return out if isinstance(out, dict) else {}
    except (OSError, ValueError):
        return {}


def _remember(entry: Entry, reason: str | None) -> None:
    broken = known_broken()
    key = _stamp(entry)
    if broken.get(key) == reason:
        return
    if reason is None:
        broken.pop(key, None)
    else:
        broken[key] = reason
    from tersor.files import atomic_write

    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(_cache_file()) as file:
            file.write(json.dumps(broken).encode())
    except OSError:
        pass  # a read-only home only means that `tersor list` cannot know


def misfit(entry: Entry, metadata: dict[str, list[str]] | None = None) -> str | None:
    """Why the range of ``tersor`` that the distribution asks for does not admit this version, or None."""
    from tersor import __version__

    for line in (entry.metadata if metadata is None else metadata).get("requires-dist", []):
        match = re.match(r"tersor(?![\w.-])\s*(?:\[[^]]*\])?\s*\(?([^;)]*)", line)
        if match and "extra ==" not in line and match[1].strip():
            from packaging.specifiers import InvalidSpecifier, SpecifierSet

            try:
                fits = SpecifierSet(match[1].strip()).contains(__version__, prereleases=True)
            except InvalidSpecifier:
                return f"its requirement {line!r} cannot be read"
            if not fits:
                return f"it needs tersor{match[1].strip()}, and this is tersor {__version__}"
    return None


def _register(entry: Entry) -> Any:
    """Import the plugin's module and register it; :class:`tersor.PluginError` names plugin, distribution and cause."""
    import entrypoints
    import pluggy

    who = f"plugin {entry.name!r} of distribution {entry.distribution} {entry.version}"
    pm = _manager() if entry.kind != "extension" else _pm
    if pm is None:
        raise RuntimeError("the plugin manager is not ready")
    reason = misfit(entry)
    if reason:
        raise PluginError(f"{who} cannot be used: {reason}; upgrade one of the two with pip")
    try:
        module = entrypoints.EntryPoint.from_string(entry.target, entry.name).load()
    except (Exception, SystemExit) as error:
        _failures[entry.kind, entry.name] = traceback.format_exc()
        _remember(entry, f"{type(error).__name__}: {error}")
        raise PluginError(
            f"{who} fails to import ({type(error).__name__}: {error}); `tersor doctor {entry.name}` shows the traceback"
        ) from error
    if not pm.is_registered(module):
        try:
            pm.register(module, f"{entry.distribution}:{entry.target}")
            pm.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if pm.is_registered(module):
                pm.unregister(module)
            _failures[entry.kind, entry.name] = traceback.format_exc()
            reason = " ".join(str(error).split())
            _remember(entry, reason)
            known = ", ".join(f"tersor_{k}" for k in OFFERS)
            raise PluginError(f"{who} does not fit the hook specs ({known}): {reason}") from error
    return module


def find(kind: str, name: str) -> Entry:
    """The entry point of a method. ``name`` may be ``distribution/method`` where two distributions offer it.

    Raises :class:`tersor.UnknownMethodError` (with the nearest names, and the pip command where it is an official method) and
    :class:`tersor.ConflictError` (names both distributions).
    """
    table = index()
    distribution, _, bare = name.rpartition("/")
    entries = table.get((kind, bare), [])
    if distribution:
        entries = [e for e in entries if _plain(e.distribution) == _plain(distribution)]
    if len(entries) > 1:
        both = " and ".join(f"{e.distribution} {e.version}" for e in entries)
        first = entries[0]
        raise ConflictError(
            f"{kind} {bare!r} is offered by {both}; say which: {first.distribution}/{bare}, or uninstall one of them"
        )
    if entries:
        return entries[0]
    raise UnknownMethodError(_unknown(kind, name, bare))


def _unknown(kind: str | None, name: str, bare: str) -> str:
    """What to say of a name that no installed method (of that kind) has."""
    table = index()
    other = [k for k in OFFERS if k != kind and (k, bare) in table]
    if other and (kind or other == ["exporter"]):
        a = "an" if other[0] == "exporter" else "a"
        how = f"tersor.export(model, {bare!r}, out)" if other[0] == "exporter" else f"tersor.{other[0]}({bare!r})"
        return f"{bare!r} is not {'an' if kind == 'exporter' else 'a'} {kind or 'method'} but {a} {other[0]}: {how}"
    message = f"no installed {kind or 'method'} is named {name!r}"
    sought = KINDS if kind is None else (kind,)
    official = official_methods()
    if official.get(bare) in sought:
        return f"{message}; it is an official {'exporter' if kind == 'exporter' else 'method'}: pip install tersor-{bare}"
    installed = sorted({n for k, n in table if k in sought})
    names = {*installed, *(n for n, k in official.items() if k in sought)}
    near = difflib.get_close_matches(bare, names, 3, 0.6)
    if near:
        said = [n if n in installed else f"{n} (pip install tersor-{n})" for n in near]
        return f"{message}; did you mean {', '.join(said)}?"
    return f"{message}; installed: {', '.join(installed) if installed else 'none'} (see `tersor list`)"


def official_methods() -> dict[str, str]:
    """Names of the methods and exporters that the project itself publishes as ``tersor-NAME``, to their kind."""
    lines = Path(__file__).with_name("official.txt").read_text("utf-8").split("\n")
    return dict(line.split("\t")[:2] for line in lines if "\t" in line)  # type: ignore[misc]


def kind_of(name: str) -> str:
    """The kind of the installed method ``name`` (or ``distribution/name``).

    Raises :class:`tersor.UnknownMethodError`, and :class:`tersor.ConflictError` where distributions offer the name for different
    kinds.
    """
    if name.startswith("numcodecs."):
        return "codec"  # one of numcodecs' own
    table = index()
    distribution, _, bare = name.rpartition("/")
    offers = [
        e
        for kind in KINDS
        for e in table.get((kind, bare), [])
        if not distribution or _plain(e.distribution) == _plain(distribution)
    ]
    if len({e.distribution for e in offers}) > 1 and len({e.kind for e in offers}) > 1:
        said = " and ".join(f"a {e.kind} of {e.distribution}" for e in offers)
        raise ConflictError(f"{bare!r} is {said}; say which: {offers[0].distribution}/{bare}, or uninstall one of them")
    if not offers:
        raise UnknownMethodError(_unknown(None, name, bare))
    return offers[0].kind


def is_exporter(name: str) -> bool:
    """Whether ``name`` (or ``distribution/name``) is that of an exporter and of no method."""
    bare = name.rpartition("/")[2]
    table = index()
    return ("exporter", bare) in table and not any((kind, bare) in table for kind in KINDS)


def lookup(kind: str, name: str) -> Any:
    """The class of a method, or of an exporter: imports the one plugin that offers it.

    Raises :class:`tersor.UnknownMethodError`, :class:`tersor.ConflictError` or :class:`tersor.PluginError`.
    """
    if kind == "codec" and name.startswith("numcodecs."):
        from tersor.numcodec import wrapped

        return wrapped(name)
    with _lock:
        index()  # drops the classes below when something was installed or removed
        cls = _classes.get((kind, name))
        return cls if cls is not None else _look_up(kind, name)


def _look_up(kind: str, name: str) -> Any:
    cls: Any = None
    entry = find(kind, name)
    module = _register(entry)
    pm = _manager()
    hook = getattr(pm.hook, f"tersor_{kind}")
    others = [p for p in pm.get_plugins() if p is not module and any(i.plugin is p for i in hook.get_hookimpls())]
    try:
        cls = pm.subset_hook_caller(f"tersor_{kind}", others)(name=entry.name)
    except (Exception, SystemExit) as error:
        _failures[kind, entry.name] = traceback.format_exc()
        _remember(entry, f"{type(error).__name__}: {error}")
        raise PluginError(
            f"plugin {entry.name!r} of distribution {entry.distribution} fails in tersor_{kind} ({type(error).__name__}: {error}); "
            f"`tersor doctor {entry.name}` shows the traceback"
        ) from error
    from tersor import exporters, kinds

    base: Any = exporters.Exporter if kind == "exporter" else getattr(kinds, kind.capitalize())
    sound = isinstance(cls, type) and issubclass(cls, base)
    if not sound:
        problem = (
            f"it has no tersor_{kind}"
            if cls is None
            else f"its tersor_{kind} gave {cls!r}, not a class derived from {base.__name__}"
        )
        _remember(entry, problem)
        raise PluginError(f"plugin {entry.name!r} of distribution {entry.distribution} offers no {kind}: {problem}")
    if cls.name != entry.name:
        problem = f"its class is named {cls.name!r} and its entry point {entry.name!r}"
        _remember(entry, problem)
        raise PluginError(f"plugin {entry.name!r} of distribution {entry.distribution} contradicts itself: {problem}")
    _remember(entry, None)
    cls._origin = entry
    _classes[kind, name] = cls
    return cls


def failure(kind: str, name: str) -> str | None:
    """The traceback of the last failed lookup of a method in this process."""
    return _failures.get((kind, name))


def operate(operation: str, method: Any, call: Callable[[], Any]) -> Any:
    """Run ``call`` through the operation hook, so that extensions see it."""
    return _manager().hook.tersor_operation(operation=operation, method=method, call=call)


def listing() -> list[dict[str, str]]:
    """All methods and exporters, as :func:`tersor.available` gives them; imports no plugin."""
    broken = known_broken()
    out = []
    for (kind, name), entries in index().items():
        if kind == "extension":
            continue
        for entry in entries:
            meta = entry.metadata
            status = "ok"
            if len(entries) > 1:
                status = "conflict"
            elif not meta or (broken and _stamp(entry) in broken) or misfit(entry, meta):
                status = "broken"
            out.append(
                {
                    "name": name,
                    "kind": kind,
                    "family": ",".join(entry.keywords("family", meta)),
                    "domain": ",".join(entry.keywords("domain", meta)),
                    "summary": " ".join(meta.get("summary", [])),
                    "distribution": entry.distribution,
                    "version": entry.version,
                    "status": status,
                }
            )
    return sorted(out, key=lambda m: (OFFERS.index(m["kind"]), m["name"], m["distribution"]))
