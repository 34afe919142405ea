"""What methods give back. One result type per kind, the same for every method."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import attrs
import numpy as np

if TYPE_CHECKING:
    from tersor.kinds import Method


@attrs.frozen
class Spec:
    """What was encoded: ``domain`` name, ``shape``, ``dtype`` name, and ``rate`` (Hz, or frames per second) or None."""

    domain: str
    shape: tuple[int, ...]
    dtype: str
    rate: float | None = None

    @property
    def size(self) -> int:
        """Number of elements (of bytes, in the domains ``bytes`` and ``text``)."""
        return math.prod(self.shape)


@attrs.define(eq=False)
class Payload:
    """What a codec's ``encode`` gives: the method with its configuration, what was encoded, and the parts of the file.

    ``parts``: names to bytes, arrays or tensors; ``meta``: the method's scalars.
    """

    method: Method
    spec: Spec
    parts: dict[str, Any]
    meta: dict[str, Any] = attrs.field(factory=dict)
    state: bytes | None = None
    check: int | None = None

    def _header(self) -> Any:
        from tersor.config import changed
        from tersor.container import Header

        m = self.method
        distribution, version = m.origin()
        return Header(
            kind=m.kind, method=m.name, distribution=distribution, version=version, config_version=m.config_version,
            config=changed(m), meta=self.meta, spec=self.spec, bitwise=m.bitwise, state=self.state, check=self.check,
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        """The ``.tsr`` file as bytes."""
        from tersor.container import dumps

        return dumps(self._header(), self.parts)

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the ``.tsr`` file (to a temporary file, then renamed); returns its size in bytes. Raises OSError."""
        from tersor.container import write

        return write(path, self._header(), self.parts)

    @property
    def nbytes(self) -> int:
        """The length of the file in bytes, headers and checksum included: exactly ``len(self.to_bytes())``."""
        from tersor.container import size

        return size(self._header(), self.parts)

    @property
    def bits_per_element(self) -> float:
        """Bits of the file for each element of what was encoded."""
        return 8 * self.nbytes / self.spec.size if self.spec.size else math.inf

    @classmethod
    def from_bytes(cls, source: Any, **options: Any) -> Self:
        """The payload in bytes or in a file; see :func:`tersor.decompress` for the options and the errors."""
        from tersor.api import load_payload

        return load_payload(source, **options)  # type: ignore[return-value]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.spec.shape))
        return f"<{type(self).__name__} {self.method}: {self.spec.domain} {shape} {self.spec.dtype} in {self.nbytes} bytes>"


class Codes(Payload):
    """What a quantizer's ``quantize`` gives: as :class:`Payload`, the parts being codes, scales, codebooks."""


@attrs.define(eq=False)
class Mask:
    """What a pruner's ``prune`` gives: for each tensor a boolean array, True where the element is kept.

    ``masks``: names to boolean arrays; a single tensor stands under the name ``""``.
    """

    method: Method
    masks: dict[str, Any]

    @property
    def keep(self) -> float:
        """The fraction of elements kept, over all tensors."""
        total = sum(math.prod(m.shape) for m in self.masks.values())
        return sum(int(m.sum()) for m in self.masks.values()) / total if total else 1.0

    def __getitem__(self, name: str) -> Any:
        return self.masks[name]

    @property
    def mask(self) -> Any:
        """The one mask, where a single tensor was pruned; ValueError for several."""
        if len(self.masks) != 1:
            raise ValueError(f"this result has {len(self.masks)} masks ({', '.join(self.masks)}); take one by name")
        return next(iter(self.masks.values()))

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        from tersor.sparse import pack_mask

        packed = {f"m/{name}": pack_mask(mask) for name, mask in self.masks.items()}
        return packed, {"shapes": {name: list(mask.shape) for name, mask in self.masks.items()}}

    def to_bytes(self) -> bytes:
        """The masks alone as a ``.tsr`` file (read back by :func:`tersor.decompress` as a Mask)."""
        parts, meta = self._parts()
        return Payload(self.method, Spec("array", (), "bool"), parts, meta).to_bytes()

    @property
    def nbytes(self) -> int:
        """``len(self.to_bytes())``."""
        return len(self.to_bytes())

    def __repr__(self) -> str:
        return f"<Mask {self.method}: {len(self.masks)} tensors, keeps {self.keep:.4f}>"


@attrs.define(eq=False)
class Decoded:
    """What a decoder gives: the output and what it cost.

    ``tokens``: the new tokens (int64 array). ``calls``: forward calls of the source (the prompt's included).
    ``steps``: rounds of the decoder's own loop. ``accepted``: drafted tokens that were kept. ``drafted``: tokens drafted.
    ``draft_calls``: calls of a drafting model. ``seconds``: wall time.
    """

    tokens: np.ndarray
    calls: int = 0
    steps: int = 0
    accepted: int = 0
    drafted: int = 0
    draft_calls: int = 0
    seconds: float = 0.0
    output: Any = None


class Session(Protocol):
    """One decoding session of a source: a sequence that grows, with whatever cache the model keeps for it."""

    length: int
    calls: int

    def extend(self, tokens: Sequence[int], last: int | None = None) -> np.ndarray:
        """Append ``tokens``; the logits after each of them (of the ``last`` so many), float32 n x vocabulary. One model call."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        ...


class TreeSession(Session, Protocol):
    """A session that also scores several continuations of its sequence in one call, as a tree of tokens.

    Optional for a source: :func:`branching` gives any session these two functions.
    """

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> np.ndarray:
        """Add nodes to the tree; the logits after each of them, float32 n x vocabulary. One model call.

        Nodes are numbered from 0 in the order of their coming. ``parents``: for each token the node that it follows, which is
        older, or -1, the end of the sequence. ``length`` stays.
        """
        ...

    def keep(self, nodes: Sequence[int]) -> None:
        """Append the path ``nodes`` (from a child of the sequence on; may be empty) to the sequence, and drop the tree."""
        ...


class _OneByOne:
    """A session's tree where the session knows sequences only: one call for each path to a new leaf."""

    def __init__(self, session: Session) -> None:
        self.session, self.root = session, session.length
        self.lines: list[list[int]] = []
        self.tokens: list[int] = []
        self.laid: list[int] = []  # the path that the session holds behind its sequence

    @property
    def length(self) -> int:
        return self.root

    @property
    def calls(self) -> int:
        return self.session.calls

    def extend(self, tokens: Sequence[int], last: int | None = None) -> np.ndarray:
        if self.lines:
            self.keep([])
        logits = self.session.extend(tokens, last)
        self.root = self.session.length
        return logits

    def rewind(self, length: int) -> None:
        self.session.rewind(length)
        self.root, self.lines, self.tokens, self.laid = length, [], [], []

    def _lay(self, line: list[int]) -> np.ndarray | None:
        """Let the session hold ``line``; the logits after its new tokens."""
        same = 0
        while same < min(len(line), len(self.laid)) and line[same] == self.laid[same]:
            same += 1
        if same < len(self.laid):
            self.session.rewind(self.root + same)
        self.laid = line
        return self.session.extend([self.tokens[n] for n in line[same:]]) if same < len(line) else None

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> np.ndarray:
        first = len(self.lines)
        for token, parent in zip(tokens, parents, strict=True):
            self.lines.append([*(self.lines[parent] if parent >= 0 else []), len(self.lines)])
            self.tokens.append(int(token))
        inner = set(parents)
        rows: dict[int, np.ndarray] = {}
        for node in range(first, len(self.lines)):
            if node not in inner:
                line = self.lines[node]
                logits = self._lay(line)
                for place in range(1, 1 + (0 if logits is None else len(logits))):
                    rows[line[-place]] = logits[-place]  # type: ignore[index]
        return np.stack([rows[node] for node in range(first, len(self.lines))])

    def keep(self, nodes: Sequence[int]) -> None:
        line = list(nodes)
        if self.laid[: len(line)] == line:
            self.session.rewind(self.root + len(line))
        else:
            self._lay(line)
        self.root, self.lines, self.tokens, self.laid = self.session.length, [], [], []


def branching(session: Session) -> TreeSession:
    """The session itself where it scores trees, else the same with a call for each continuation."""
    return session if callable(getattr(session, "branch", None)) else _OneByOne(session)  # type: ignore[return-value]


class Source(Protocol):
    """A sequence model that a decoder draws from.

    ``vocabulary``: number of tokens; ``stop``: tokens that end the output (may be empty). A source may state ``weights``, the
    number of weights read for a token, from which a drafting decoder estimates what its calls cost.
    """

    vocabulary: int
    stop: frozenset[int]

    def open(self) -> Session:
        """A new, empty session."""
        ...


@attrs.frozen(eq=False)
class Uniform:
    """A quantized matrix as evenly spaced levels: what inference engines and their kernels load.

    A value is ``(codes - zero) * scale``, scale and zero being those of the group. ``codes``: uint8, out x in, below 2^bits.
    ``scale``: float32, out x groups. ``zero``: float32, out x groups; None: 2^(bits-1) everywhere (symmetric levels).
    ``bits``: 1 to 8. ``group_size``: columns in a group, above 0; the last group may be shorter. ``index``: int64, the group of
    every column, or None where groups are consecutive. All are torch tensors.
    """

    codes: Any
    scale: Any
    zero: Any
    bits: int
    group_size: int
    index: Any = None

    def regrouped(self, group_size: int) -> Uniform:
        """The same values in smaller groups, which ``group_size`` columns form; ValueError where old groups do not consist of such."""
        if group_size == self.group_size and self.index is None:
            return self
        columns = self.codes.shape[1]
        if self.index is not None or (self.group_size % group_size and self.group_size < columns):
            raise ValueError(f"groups of {self.group_size} do not consist of groups of {group_size}")
        import torch

        place = torch.arange(0, columns, group_size, device=self.codes.device) // self.group_size
        zero = None if self.zero is None else self.zero[:, place]
        return Uniform(self.codes, self.scale[:, place], zero, self.bits, group_size)

    def dense(self) -> Any:
        """The values, float32, out x in."""
        import torch

        columns = self.codes.shape[1]
        index = self.index
        if index is None:
            index = torch.arange(columns, device=self.codes.device) // self.group_size
        zero: Any = 2.0 ** (self.bits - 1) if self.zero is None else self.zero[:, index]
        return (self.codes.float() - zero) * self.scale[:, index]


@attrs.frozen(eq=False)
class Calibration:
    """Data that a weight method is calibrated with.

    ``inputs``: float samples x in, the inputs of the layer. ``gram``: their sum of outer products X^T X, float in x in, over
    ``count`` samples, where the samples themselves are not kept. ``gradients``: of the shape of the weight (mean squared
    gradients, for the methods that ask for them). ``layer``: the name of the layer. ``extra``: whatever else a driver gives
    (``mean``: of the inputs), and what the method's own study of the network found.
    """

    inputs: Any = None
    gram: Any = None
    count: int = 0
    gradients: Any = None
    layer: str = ""
    extra: Mapping[str, Any] = attrs.field(factory=dict)
