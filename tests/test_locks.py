"""Locks on a disk and on an object store: one holder at a time, and a dead one's lock is free again."""

import errno
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from bdlib import files, locks


@pytest.fixture(params=["disk", "object store"])
def where(request, tmp_path):
    return tmp_path if request.param == "disk" else request.getfixturevalue("bucket")


def test_one_at_a_time(where):
    inside, most, waited = [], [], []

    def work():
        with locks.hold(where / "a.lock", lambda: waited.append(1)):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.2)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1, 1, 1] and waited, "nobody waited, or two were inside"


def test_held_says_whether_somebody_is_inside(where):
    assert not locks.held(where / "a.lock")
    with locks.hold(where / "a.lock"):
        assert locks.held(where / "a.lock")
    assert not locks.held(where / "a.lock")


def test_the_lock_is_free_after_an_error(where):
    with pytest.raises(KeyError), locks.hold(where / "a.lock"):
        raise KeyError
    assert not locks.held(where / "a.lock")


def test_a_lease_that_nobody_refreshes_is_taken_over_and_a_refreshed_one_is_not(bucket):
    (bucket / "dead.lock").write_bytes(b"a process that died")
    start = time.monotonic()
    taken = locks.Lease(bucket / "dead.lock", beat=0.2, patience=0.6)
    taken.acquire()
    assert 0.6 <= time.monotonic() - start < 10
    other = locks.Lease(bucket / "dead.lock", beat=0.2, patience=0.6)
    got = threading.Thread(target=other.acquire, daemon=True)
    got.start()
    time.sleep(1.5)
    assert got.is_alive(), "the holder refreshes it, so it is not free"
    taken.release()
    got.join(10)
    assert not got.is_alive()
    other.release()


def test_a_lease_of_a_dead_process_is_not_held(bucket, monkeypatch):
    # The clock stands from here on, as a busy machine may take seconds to get to the question.
    begun = datetime.now(UTC)
    with locks.hold(bucket / "a.lock"):
        monkeypatch.setattr(locks, "datetime", later := type("", (), {}))
        later.now = lambda zone: begun + timedelta(seconds=59)
        assert locks.held(bucket / "a.lock")
        later.now = lambda zone: datetime.now(zone) + timedelta(seconds=62)
        assert not locks.held(bucket / "a.lock")


def test_a_lease_is_not_released_by_one_who_lost_it(bucket):
    late = locks.Lease(bucket / "a.lock")
    late.acquire()
    (bucket / "a.lock").write_bytes(b"another owner")
    late.release()
    assert (bucket / "a.lock").read_bytes() == b"another owner"


def test_a_lease_goes_on_after_a_beat_that_failed(caplog):
    beats = []

    class Path:
        def write_bytes(self, content):
            beats.append(content.split()[1])
            if len(beats) == 1:
                raise OSError("the store is busy")
            lease.ended.set()

    lease = locks.Lease(Path(), beat=0.01)
    lease.refresh()
    assert beats == [b"1", b"2"] and "could not be refreshed: the store is busy" in caplog.text


def test_a_lock_of_another_user_is_asked_too(tmp_path, monkeypatch):
    """The system lets root write anywhere, so that its refusal is played here."""

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    with locks.hold(tmp_path / "a.lock"):
        monkeypatch.setattr("filelock.FileLock.acquire", refused)
        assert locks.held(tmp_path / "a.lock")
    assert not locks.held(tmp_path / "a.lock")


def test_an_object_is_written_whole_or_not_at_all(bucket):
    def broken(file):
        file.write(b"half")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        files.write_atomic(bucket / "x", broken)
    assert not (bucket / "x").exists()
    files.write_atomic(bucket / "x", lambda file: file.write(b"whole"))
    assert (bucket / "x").read_bytes() == b"whole"


@pytest.mark.parametrize("letter", ["a", "猫"])
def test_a_name_is_cut_to_what_a_disk_takes_and_names_stay_apart(tmp_path, letter):
    names = [files.file_name(letter * count) for count in (files.LONGEST // len(letter.encode()), 300, 301)]
    assert set(names[0]) == {letter}, "one that fits stays as it is"
    assert len(set(names)) == 3
    for name in names:
        files.write_atomic(tmp_path / f"{name}.csv", lambda file: file.write(b"whole"))
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unknown_kind_of_store_is_named():
    with pytest.raises(ValueError, match="cannot use nowhere://bucket"):
        files.place("nowhere://bucket/x")
