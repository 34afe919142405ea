"""``tersor new``: the package of a new method, which installs, is found and conforms before its author has changed a line."""

from __future__ import annotations

import keyword
import os
import re
import shutil
import tempfile
from pathlib import Path
from string import Template

from tersor.errors import ConfigError

_PYPROJECT = """\
[project]
name = "$distribution"
version = "0.1.0"
description = "$title: say in one line what it does"
readme = "README.md"
requires-python = ">=3.11"
keywords = ["tersor", "family:$family", $domains]
dependencies = ["tersor>=$version,<$next", "numpy>=1.26"]

[project.urls]
Paper = "https://arxiv.org/abs/0000.00000"

[project.entry-points."tersor.$kind"]
$name = "$module"

[build-system]
requires = ["uv_build>=0.8,<1"]
build-backend = "uv_build"
"""

_INIT = '''\
"""$title for Tersor."""

from tersor import hookimpl

from $module.method import $cls

__all__ = ["$cls"]


@hookimpl
def tersor_$kind() -> type[$cls]:
    return $cls
'''

_README = """\
# $distribution

$title, a $kind for [Tersor](https://tersor.readthedocs.io/en/latest/).

    pip install -e .
    tersor list
    tersor check $name

```python
import tersor

method = tersor.$kind("$name")
print(method)
```

## How to go on

1. `src/$module/method.py` holds a method that already conforms and does next to nothing. Put the algorithm there; state its
   facts and settings.
2. `tests/test_$module.py` holds one test that fails until you do: `$failing`.
3. `tersor check $name` must stay green all along; `tersor verify $name` runs what you claim in `src/$module/claims.py`.
"""

_CLAIMS = '''\
"""What the method claims, executable: `tersor verify $name`."""

from tersor.evidence import Row, claim


@claim("say what the paper says")
def first_claim(seed: int) -> list[Row]:
    """Measure both sides on real data. This one compares nothing yet, and so does not hold."""
    return [
        Row(
            claim="say what the paper says", metric="unit", ours=0.0, baseline=0.0, baseline_name="nothing yet", better="higher",
            note="replace by a measurement",
        )
    ]
'''

_TEST = '''\
"""The first test must always pass; the second fails until the algorithm is written."""

$test_imports
import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("$name")


$test
'''

_METHOD = {
    "codec": (
        '("bytes", "array")',
        '''\
"""$title. Say here what the paper does, step by step."""

import zlib
from typing import Any

import numpy as np

from tersor import Codec, CorruptPayloadError, Spec, between, field, method


@method
class $cls(Codec):
    """What it does; shapes and element types; units; errors; the source with its link."""

    name = "$name"
    domains = ("bytes", "array")
    lossless = True
    allow_empty = True
    level: int = field(0, between(0, 9), help="effort")

    def _encode(self, x: Any, spec: Spec) -> dict[str, Any]:
        # x is bytes, or a numpy array; everything that decoding needs goes into the dict
        raw = x if isinstance(x, bytes) else np.ascontiguousarray(x).tobytes()
        return {"data": zlib.compress(raw, self.level)}

    def _decode(self, parts: dict[str, Any], spec: Spec) -> Any:
        size = spec.size * (1 if spec.dtype == "bytes" else np.dtype(spec.dtype).itemsize)
        raw = zlib.decompressobj().decompress(parts["data"], size + 1)
        if len(raw) != size:
            raise CorruptPayloadError(f"$name: {len(raw)} bytes, the header says {size}")
        return raw if spec.dtype == "bytes" else np.frombuffer(raw, spec.dtype).reshape(spec.shape)
''',
        "test_text_gets_smaller",
        "",
        """\
def test_text_gets_smaller():
    text = b"a method that compresses makes this smaller. " * 100
    assert tersor.codec("$name").encode(text).nbytes < len(text) / 2, "level 0 only stores: write the algorithm\"""",
    ),
    "quantizer": (
        '("latent",)',
        '''\
"""$title. Say here what the paper does, step by step."""

from typing import Any

import numpy as np

from tersor import Calibration, Quantizer, Spec, between, field, method


@method
class $cls(Quantizer):
    """Uniform scalar quantization. Say what it does; shapes and element types; units; errors; the source with its link."""

    name = "$name"
    domains = ("latent",)
    bits: int = field(8, between(1, 8), help="bits per element")

    def _quantize(self, x: Any, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        # x is a float32 numpy array; everything that dequantizing needs goes into the dict
        low, high = x.min(), x.max()
        step = (high - low) / np.float32(2**self.bits - 1) or np.float32(1)
        codes = np.rint((x - low) / step).astype(np.uint8)
        return {"codes": codes, "grid": np.array([low, step], np.float32)}

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Any:
        low, step = parts["grid"]
        return parts["codes"].reshape(spec.shape) * step + low
''',
        "test_four_bits_take_half_the_space_of_eight",
        "import numpy as np\n",
        """\
def test_four_bits_take_half_the_space_of_eight():
    x = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    four, eight = (tersor.quantizer("$name", bits=b).quantize(x).nbytes for b in (4, 8))
    assert four < 0.6 * eight, "codes are stored one a byte: pack them\"""",
    ),
    "pruner": (
        '("weight",)',
        '''\
"""$title. Say here what the paper does, step by step."""

from typing import Any

import numpy as np

from tersor import Pruner, between, field, method


@method
class $cls(Pruner):
    """Keeps the first elements. Say what it does; shapes and element types; errors; the source with its link."""

    name = "$name"
    domains = ("weight",)
    keep: float = field(0.5, between(0, 1), help="fraction of elements kept")

    def promised(self, size: int) -> int:
        return round(self.keep * size)

    def _prune(self, tensors: dict[str, Any], calibration: Any) -> dict[str, Any]:
        # one boolean array for each tensor, True where the element is kept; keep is over all tensors together
        left = self.promised(sum(t.size for t in tensors.values()))
        masks = {}
        for name, tensor in tensors.items():
            mask = np.zeros(tensor.size, bool)
            mask[:left] = True
            left -= int(mask.sum())
            masks[name] = mask.reshape(tensor.shape)
        return masks
''',
        "test_large_elements_are_kept",
        "import numpy as np\n",
        """\
def test_large_elements_are_kept():
    x = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    kept = tersor.pruner("$name").apply(x, tersor.pruner("$name").prune(x))
    assert kept.sum() > 0.7 * x.sum(), "the first elements are kept, not the large ones: write the algorithm\"""",
    ),
    "decoder": (
        '("sequence",)',
        '''\
"""$title. Say here what the paper does, step by step."""

from typing import Any

import numpy as np

from tersor import Decoded, Decoder, method


@method
class $cls(Decoder):
    """The most probable token at every step. Say what it does; errors; the source with its link."""

    name = "$name"
    exact = "greedy"  # the conformance kit compares the tokens with greedy decoding; "distribution" and None are the others

    def _decode(self, source: Any, prompt: list[int], budget: int, **options: Any) -> Decoded:
        session = source.open()
        logits = session.extend(prompt, last=1)
        out: list[int] = []
        while True:
            token = int(np.argmax(logits[-1]))
            out.append(token)
            if len(out) == budget or token in source.stop:
                break
            logits = session.extend([token])
        return Decoded(np.array(out), calls=session.calls, steps=len(out))
''',
        "test_fewer_calls_than_tokens",
        "from tersor.testing import TableSource\n",
        """\
def test_fewer_calls_than_tokens():
    decoded = tersor.decoder("$name").decode(TableSource(4, seed=1), [1, 2, 3], 64)
    assert decoded.calls < len(decoded.tokens), "one call a token: draft several tokens and verify them in one call\"""",
    ),
}


def create(name: str, kind: str = "codec", output: str | os.PathLike[str] | None = None, family: str = "community") -> Path:
    """Write the package and return its folder.

    ``name``: lower-case letters, digits and dashes. Raises :class:`tersor.ConfigError` for another name or kind, and where the
    folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(f"name {name!r} is not allowed; allowed: lower-case letters and digits, with single dashes between")
    if kind not in _METHOD:
        raise ConfigError(f"kind {kind!r} is not allowed; allowed: {', '.join(_METHOD)}")
    target = Path(output or f"tersor-{name}")
    if target.exists():
        raise ConfigError(f"{target} exists; choose another folder")
    from tersor import __version__

    domains, method, failing, imports, test = _METHOD[kind]
    cls = "".join(w.capitalize() for w in name.split("-"))
    major, minor = __version__.split(".")[:2]
    words = {
        "name": name,
        "kind": kind,
        "distribution": f"tersor-{name}",
        "module": "tersor_" + name.replace("-", "_"),
        "title": name.replace("-", " ").capitalize(),
        "cls": cls + "_" if keyword.iskeyword(cls) else cls,
        "family": family,
        "domains": ", ".join(f'"domain:{d}"' for d in re.findall(r'"([^"]+)"', domains)),
        "version": f"{major}.{minor}",
        "next": f"{major}.{int(minor) + 1}",
        "failing": failing,
    }
    words["test"] = Template(test).substitute(words)
    words["test_imports"] = imports
    package = f"src/{words['module']}"
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{package}/__init__.py": _INIT,
        f"{package}/method.py": method,
        f"{package}/claims.py": _CLAIMS,
        f"{package}/py.typed": "",
        f"tests/test_{words['module']}.py": _TEST,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        for path, text in files.items():
            file = aside / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(text).substitute(words), "utf-8")
        aside.chmod(0o755)
        os.rename(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return target
