"""Locks that processes agree on: on one machine, over a shared folder, or over an object store."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from bdlib.files import on_disk

log = logging.getLogger(__name__)


@contextmanager
def hold(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock at this path while the block runs.  Waits for whoever has it, after one call of `on_wait`.

    On a disk the system frees the lock of a process that dies; on an object store it is free once nobody refreshes it (see `Lease`).
    """
    from filelock import FileLock, Timeout

    if on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path) if on_disk(path) else Lease(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def held(path: Path) -> bool:
    """Whether somebody holds the lock at this path now."""
    from filelock import FileLock, Timeout

    if not on_disk(path):
        return Lease(path).alive()
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except PermissionError:
        return _held_by_another(path)


def _held_by_another(path: Path) -> bool:
    """Whether somebody holds this lock, which somebody else made: it can be read, not written."""
    import fcntl  # Windows has none

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # NFS wants a writable file for LOCK_EX
        except BlockingIOError:
            return True
    return False


class Lease:
    """A lock on an object store: an object that only one process can create, and that its holder rewrites every `beat` seconds.

    One that did not change for `patience` seconds of the waiting process's own clock belonged to a dead process, and is taken over.
    If two processes take over at the same instant both go on: work is then done twice, with the same result, never lost.
    """

    def __init__(self, path: Path, *, beat: float = 10.0, patience: float = 60.0) -> None:
        self.path, self.beat, self.patience = path, beat, patience
        self.owner = secrets.token_hex(8)
        self.ended = threading.Event()
        self.refresher: threading.Thread | None = None

    def acquire(self, timeout: float = -1) -> None:
        """Wait for the lock: for ever, or raise filelock.Timeout at once where timeout is 0."""
        from filelock import Timeout

        seen, since = None, time.monotonic()
        while not self.created():
            if timeout == 0:
                raise Timeout(str(self.path))
            content = self.content()
            if content != seen:
                seen, since = content, time.monotonic()
            elif content is not None and time.monotonic() - since > self.patience:
                self.path.unlink(missing_ok=True)
                continue
            time.sleep(min(1.0, self.beat / 4))
        self.ended.clear()
        self.refresher = threading.Thread(target=self.refresh, daemon=True)
        self.refresher.start()

    def release(self) -> None:
        self.ended.set()
        self.refresher.join()
        if (self.content() or b"").startswith(self.owner.encode()):
            self.path.unlink(missing_ok=True)

    def created(self) -> bool:
        try:
            self.path.fs.pipe_file(self.path.path, self.owner.encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def alive(self) -> bool:
        """Whether its holder refreshed it within `patience` seconds, by the store's clock and ours."""
        try:
            changed = self.path.fs.modified(self.path.path)
        except FileNotFoundError:
            return False
        return (datetime.now(UTC) - changed).total_seconds() < self.patience

    def content(self) -> bytes | None:
        try:
            return self.path.fs.cat_file(self.path.path)  # one request: what it finds cannot change under it
        except FileNotFoundError:
            return None

    def refresh(self) -> None:
        count = 0
        while not self.ended.wait(self.beat):
            count += 1
            try:
                self.path.write_bytes(f"{self.owner} {count}".encode())
            except Exception as error:  # each driver raises kinds of its own; the next beat may get through
                log.warning("the lock %s could not be refreshed: %s", self.path, error)
