"""Files and folders on a disk or an object store; a file is written whole or not at all."""

import errno
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

LONGEST = 233  # bytes of a name: file systems take 255, of which a suffix of 4 and `write_atomic` need 22


def place(where: str | Path) -> Path:
    """A path, or a URL on an object store (`s3://bucket/folder`), with the methods of pathlib either way.

    Raises ValueError for a URL whose kind of store has no driver installed.
    """
    where = str(where).removeprefix("file://")
    if "://" not in where:
        return Path(where)
    from upath import UPath

    try:
        found = UPath(where)
        found.fs  # noqa: B018 - loads the driver
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot use {where}: {error}") from error
    return found


def require_reachable(path: Path) -> None:
    """Raises ValueError that names the place if the object store that it is on does not answer."""
    try:
        path.exists()
    except Exception as error:  # each driver raises kinds of its own
        raise ValueError(f"cannot reach {path}: {error}") from error


def file_name(text: str) -> str:
    """The text as a name of a file: whatever a path or a URL might not take becomes a hyphen.

    One that is too long for a file system is cut, and a hash of all of it put behind, so that names stay apart.
    """
    name = re.sub(r"[^\w.-]+", "-", text)
    whole = name.encode()
    if len(whole) <= LONGEST:
        return name
    ending = f"-{hashlib.sha256(whole).hexdigest()[:8]}"
    return whole[: LONGEST - len(ending)].decode(errors="ignore") + ending


def on_disk(path: Path) -> bool:
    """Whether the path lies on a disk or a shared folder, not on an object store."""
    return isinstance(path, Path)


def read_json(text: bytes) -> dict:
    """The object that a JSON file holds; a damaged one, or one that holds something else, says nothing."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomic(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file beside `path`, then put it in its place at once; folders are made.

    A kill or a full disk leaves the old file, or none.  Raises OSError that names the folder if the disk is full.
    """
    if not on_disk(path):  # an object appears when all of it has arrived
        whole = io.BytesIO()
        write(whole)
        path.write_bytes(whole.getvalue())
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC, f"no free disk space for {path}: free some and run again, finished work is kept"
            ) from error
        raise
