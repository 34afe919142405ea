"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends well, and leaves no trace when it does not.

    The bytes go to a hidden file beside ``path``, which is renamed at the end. Raises OSError as the system does (read-only,
    disk full, no such folder), with the old file, if any, untouched.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with open(path, "wb") as raw:  # a device or a pipe is written to, not replaced (a folder is refused by the system)
            yield raw
        return
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as raw:
            yield raw
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # what the user asked for, not what was written on the way
        raise
