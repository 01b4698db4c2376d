"""Folders that are either whole or absent: written beside their place, checked, flushed, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from scamo.errors import ScaMoError

HEADER_BYTES = 128  # of every .npy written here: room for any shape, and aligned for memory mapping
CHUNK_BYTES = 1 << 22
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES}


@contextlib.contextmanager
def whole_folder(
    folder: Path,
    *,
    overwrite: bool = False,
    verify: Callable[[Path], object] | None = None,
    keep: Callable[[], bool] | None = None,
) -> Iterator[Path]:
    """Yield an empty temporary sibling of `folder`; on a clean exit it is verified, flushed and renamed.

    After any exception the temporary folder is removed and an existing `folder` is untouched. An existing
    folder is replaced only with `overwrite`, in one step, and only if it holds a manifest.json (so that a
    mistyped path never deletes something else). What a killed writer left behind is removed by the next one.

    With `keep` the temporary folder is .NAME.unfinished and the next writer gets it as a killed one left it,
    or one with an exception after which keep() is true. The caller sees to it that only one writes there.

    Raises:
        ScaMoError: `folder` exists and may not be replaced, or cannot be written (the disk is full, ...).
    """
    _check_replaceable(folder, overwrite)
    prefix = f".{folder.name}.writing-{socket.gethostname()}-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(f"{glob.escape(prefix)}*"):
            if not _alive(old.name[len(prefix) :].split("-")[0]):
                shutil.rmtree(old, ignore_errors=True)
        if keep is None:
            temporary = folder.parent / f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}"
        else:
            temporary = folder.parent / f".{folder.name}.unfinished"
        temporary.mkdir(exist_ok=keep is not None)
    except OSError as error:
        raise ScaMoError(f"{folder}: cannot be written: {error.strerror}") from None
    whole = False
    try:
        yield temporary
        if verify is not None:
            verify(temporary)
        for path in sorted(temporary.rglob("*"), reverse=True):
            _fsync(path)
        _fsync(temporary)
        _check_replaceable(folder, overwrite)
        if folder.exists():
            _exchange(temporary, folder)
        else:
            os.rename(temporary, folder)
        whole = True
        _fsync(folder.parent)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise ScaMoError(f"{folder}: cannot be written: {error.strerror}") from error
        raise
    finally:
        # The name now holds the unfinished folder, the replaced one, or nothing.
        if whole or keep is None or not keep():
            shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise ScaMoError(f"{folder} exists: choose another name, or ask for it to be overwritten")
    if folder.is_symlink() or not (folder / "manifest.json").is_file():
        raise ScaMoError(f"{folder} exists and has no manifest.json: it was not written here, so it is kept")


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step where the system can (Linux's renameat2), else in two renames."""
    at_cwd, swap = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), swap) == 0:
        return
    aside = second.with_name(f"{first.name}.old")
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def npy_header(dtype: DTypeLike, shape: tuple[int, ...]) -> bytes:
    """The .npy header of a C-ordered array, padded so that the shape can be filled in later."""
    described = np.lib.format.dtype_to_descr(np.dtype(dtype))
    text = repr({"descr": described, "fortran_order": False, "shape": shape}).encode()
    body = text.ljust(HEADER_BYTES - 11) + b"\n"
    if len(body) != HEADER_BYTES - 10:
        raise ValueError(f"array of shape {shape}: its header exceeds {HEADER_BYTES} bytes")
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


class ArrayStream:
    """A .npy file (rows, *row_shape) that grows by `append`; `close` fills in the number of rows.

    keep: an existing file's rows stay until `cut`; `peek` reads them, `append` takes them over.
    """

    def __init__(
        self, path: Path, dtype: DTypeLike, row_shape: tuple[int, ...] = (), *, keep: bool = False
    ) -> None:
        self.path, self.dtype, self.row_shape = path, np.dtype(dtype), row_shape
        self.rows = 0
        self._hash = hashlib.sha256()
        self._file: BinaryIO = open(path, "r+b" if keep and path.exists() else "w+b")  # noqa: SIM115
        self._file.write(npy_header(self.dtype, (0, *row_shape)))

    def append(self, rows: NDArray, *, stored: bool = False) -> None:
        """Append rows (n, *row_shape); `stored` says that the file has these very rows next already."""
        if rows.shape[1:] != self.row_shape:
            raise ValueError(f"{self.path.name}: rows of shape {rows.shape[1:]}, expected {self.row_shape}")
        data = np.ascontiguousarray(rows, dtype=self.dtype).reshape(-1).view(np.uint8)
        if stored:
            self._file.seek(len(data), os.SEEK_CUR)
        else:
            self._file.write(data)
        self._hash.update(data)
        self.rows += rows.shape[0]

    def peek(self, first: int, count: int) -> NDArray:
        """`count` rows an earlier writer left, `first` behind those appended; fewer at the file's end."""
        row = self.dtype.itemsize * math.prod(self.row_shape)
        data = os.pread(self._file.fileno(), count * row, HEADER_BYTES + (self.rows + first) * row)
        return np.frombuffer(data[: len(data) // row * row], self.dtype).reshape(-1, *self.row_shape)

    def cut(self) -> None:
        """Forget what an earlier writer left behind the rows appended."""
        self._file.truncate(self._file.tell())

    def flush(self) -> None:
        """Hand what was appended to the system: it outlives this process, but not a loss of power."""
        self._file.flush()

    def close(self) -> dict[str, Any]:
        """Finish the file; returns its record (bytes, sha256, dtype, shape) after reading it back.

        Raises OSError when the disk holds other bytes than were written.
        """
        shape = (self.rows, *self.row_shape)
        self._file.seek(0)
        self._file.write(npy_header(self.dtype, shape))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        whole = hashlib.sha256()
        body = hashlib.sha256()
        with open(self.path, "rb") as file:
            whole.update(file.read(HEADER_BYTES))
            while chunk := file.read(CHUNK_BYTES):
                whole.update(chunk)
                body.update(chunk)
        if body.digest() != self._hash.digest():
            raise OSError(f"{self.path.name}: the bytes read back differ from those written")
        record = {"bytes": self.path.stat().st_size, "sha256": whole.hexdigest()}
        return record | {"dtype": self.dtype.str, "shape": list(shape)}

    def abandon(self) -> None:
        self._file.close()


class Journal:
    """What is done of a long work: a JSON line each, in a file that one process at a time can have.

    Args:
        path: the file; made if it is not there.
        header: JSON values that its records depend on.
        overwrite: begin again where the file has another header.

    Raises:
        ScaMoError: another process has the file, or its header is another one.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.count = path, 0  # records
        self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ScaMoError(f"{path.parent}: another process is writing it") from None
        self._file.seek(0)
        header = json.loads(json.dumps(header))
        found = self._read()
        if found is not None and found != header and not overwrite:
            self._file.close()
            raise ScaMoError(
                f"{path.parent}: was left unfinished with other settings ({_differences(found, header)}): "
                "give the same ones, or ask for it to be overwritten"
            )
        self.fresh = found != header
        self._end = 0 if self.fresh else self._file.tell()
        if self.fresh:
            self.cut()
            self._write(header)
            self._end = self._file.tell()

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of an earlier process, up to a torn one. The last that was asked for is not counted
        as kept until the next is asked for."""
        self._file.seek(self._end)
        while (record := self._read()) is not None:
            end = self._file.tell()
            yield record
            self._end = end
            self.count += 1

    def cut(self) -> None:
        """Forget the records that were not kept."""
        self._file.truncate(self._end)

    def append(self, record: dict[str, Any]) -> None:
        self._write(record)
        self.count += 1

    def remove(self) -> None:
        """Take the file away; the lock stays until `close`."""
        self.path.unlink()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> dict[str, Any] | None:
        line = self._file.readline()
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    shown = [f"{key} {_short(old.get(key))}, now {_short(new.get(key))}" for key in keys]
    return "; ".join(shown)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_array(path: Path, array: NDArray) -> dict[str, Any]:
    """Write a whole array; returns its record."""
    stream = ArrayStream(path, array.dtype, array.shape[1:])
    stream.append(array)
    return stream.close()


def sha256_of(path: Path, update: Callable[[int], object] = lambda count: None) -> str:
    """Hex SHA-256 of a file; `update` is told how many bytes were read each time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            update(len(chunk))
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with one line per record of a list."""
    (folder / "manifest.json").write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


def read_manifest(folder: Path, *, format: str, schema_version: int) -> dict[str, Any]:
    """Read folder/manifest.json and check what it says it is.

    Raises ScaMoError naming the file: missing, not JSON, of another format or of another schema version.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScaMoError(f"{path}: no such file; {folder} is not a finished {format} folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScaMoError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ScaMoError(f"{path}: format {found!r}, expected {format!r}")
    if manifest.get("schema_version") != schema_version:
        raise ScaMoError(
            f"{path}: schema_version {manifest.get('schema_version')!r}, this version reads {schema_version}"
        )
    return manifest


def check_files(folder: Path, manifest: dict[str, Any], *, hashes: bool) -> None:
    """Compare every file that the manifest lists with its size (and SHA-256).

    Raises ScaMoError naming the first file that is missing, cut, or changed.
    """
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ScaMoError(f"{path}: missing; the manifest lists it with {record['bytes']} bytes")
        size = path.stat().st_size
        if size != record["bytes"]:
            what = "truncated" if size < record["bytes"] else "too long"
            raise ScaMoError(f"{path}: {what}: {size} bytes, expected {record['bytes']}")
        if hashes and sha256_of(path) != record["sha256"]:
            raise ScaMoError(f"{path}: corrupt: its SHA-256 is not the one in the manifest")


def decode_utf8(data: bytes, label: str) -> str:
    """Text without a byte order mark; ScaMoError naming `label`, the line and the byte that is none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ScaMoError(f"{label}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from None


def json_lines(text: str, label: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of JSON lines, and its place `label:line`; blank lines are skipped. Raises ScaMoError."""
    # Not splitlines: a sentence may hold U+2028, which JSON does not escape.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{label}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ScaMoError(f"{where}: not valid JSON: {error.msg}") from None
        if not isinstance(entry, dict):
            raise ScaMoError(f"{where}: expected an object, got {type(entry).__name__}")
        yield where, entry


def not_finite(path: Path, record: dict[str, Any]) -> int | None:
    """The first row of a float .npy that is not finite; mapped pages would count as memory, so it is read."""
    rows, *shape = record["shape"]
    width = math.prod(shape)
    step = max(1, CHUNK_BYTES // (np.dtype(record["dtype"]).itemsize * max(1, width)))
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        for first in range(0, rows, step):
            values = np.fromfile(file, record["dtype"], min(step, rows - first) * width)
            bad = ~np.isfinite(values)
            if bad.any():
                return first + int(bad.argmax()) // width
    return None


def map_array(folder: Path, name: str, manifest: dict[str, Any]) -> NDArray:
    """Memory-map folder/name read-only; dtype and shape must be those of the manifest.

    Raises ScaMoError naming the file and what was found and expected.
    """
    path, record = folder / name, manifest["files"].get(name)
    if record is None:
        raise ScaMoError(f"{folder / 'manifest.json'}: does not list {name}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged bytes make NumPy raise nearly anything, tokenize.TokenError too
        size = path.stat().st_size if path.is_file() else 0
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ScaMoError(f"{path}: unreadable ({size} bytes, expected {record['bytes']}): {reason}") from None
    if array.dtype.str != record["dtype"] or list(array.shape) != record["shape"]:
        raise ScaMoError(
            f"{path}: {array.dtype.str} {list(array.shape)}, expected {record['dtype']} {record['shape']}"
        )
    return np.asarray(array)
