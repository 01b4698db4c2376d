"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scamo.errors import ScaMoError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix; on leaving it takes the place of `path`.

    After an exception nothing is left and an older file stays. Raises ScaMoError if `path` is a folder or its
    folder does not exist or cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ScaMoError(f"{path}: is a folder, expected a file name")
    partial = path.with_name(f".{path.stem[:32]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        partial.touch(exist_ok=False)
    except OSError as error:
        raise ScaMoError(f"{path}: cannot write there: {error.strerror}") from error
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
