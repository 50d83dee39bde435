"""The store: made once, checked on every read, whole or not there at all."""

import errno
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn

from bdlib import files, store
from tests.conftest import same

FIELDS = {"arch": "linear", "seed": 0}


def model(value=1.0):
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.constant_(layer[0].weight, value)
    return layer


def refuse():
    raise AssertionError("made again")


def files_of(folder):
    return sorted(path.suffix for path in folder.iterdir() if path.suffix != ".lock")


def test_made_once_then_read(tmp_path):
    first = store.fetch(tmp_path, FIELDS, lambda: model(3.0))
    again = store.fetch(tmp_path, dict(reversed(FIELDS.items())), refuse)
    assert same(first, again) and again["0.weight"][0, 0] == 3
    assert files_of(tmp_path) == [".json", ".safetensors"]


def test_other_fields_another_artifact(tmp_path):
    store.fetch(tmp_path, FIELDS, model)
    assert store.fetch(tmp_path, FIELDS | {"seed": 1}, lambda: model(2.0))["0.weight"][0, 0] == 2


@pytest.mark.parametrize(
    "damage", ["flip a weight", "truncate weights", "truncate json", "no json", "other json", "empty"]
)
def test_a_damaged_artifact_is_made_anew(tmp_path, damage, caplog):
    store.fetch(tmp_path, FIELDS, lambda: model(1.0))
    weights, about = next(tmp_path.glob("*.safetensors")), next(tmp_path.glob("*.json"))
    raw = bytearray(weights.read_bytes())
    if damage == "flip a weight":
        raw[-1] ^= 1
        weights.write_bytes(raw)
    elif damage == "truncate weights":
        weights.write_bytes(raw[:-7])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "truncate json":
        about.write_bytes(about.read_bytes()[:40])
    elif damage == "other json":
        about.write_text("[]")
    else:
        about.unlink()
    assert store.fetch(tmp_path, FIELDS, lambda: model(2.0))["0.weight"][0, 0] == 2
    assert damage == "no json" or "damaged" in caplog.text
    assert store.fetch(tmp_path, FIELDS, refuse)["0.weight"][0, 0] == 2


def test_a_failure_while_making_leaves_nothing_and_frees_the_lock(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        store.fetch(tmp_path, FIELDS, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert files_of(tmp_path) == []
    store.fetch(tmp_path, FIELDS, model)
    assert files_of(tmp_path) == [".json", ".safetensors"]


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"no free disk space for .*safetensors: free some and run again"):
        store.fetch(tmp_path, FIELDS, model)
    assert files_of(tmp_path) == []


def _make_slowly(folder, log):
    def make():
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.5)
        return model()

    store.fetch(folder, FIELDS, make)


def test_two_processes_make_it_once(tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_make_slowly, args=(tmp_path / "store", log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert log.read_text() == "made\n"


def _killed_while_writing(folder):
    replace = os.replace

    def stop(source, target):
        if str(target).endswith(".json"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = stop
    store.fetch(folder, FIELDS, lambda: model(1.0))


def test_a_kill_between_the_two_files_leaves_no_artifact(tmp_path):
    worker = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(tmp_path,))
    worker.start()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
    assert store.fetch(tmp_path, FIELDS, lambda: model(2.0))["0.weight"][0, 0] == 2


def test_what_is_known_stands_beside_the_weights(tmp_path):
    store.fetch(tmp_path, FIELDS, model)
    about = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert about["arch"] == "linear" and about["torch"] == torch.__version__ and len(about["sha256"]) == 64


def test_a_read_only_store_is_read_and_a_missing_model_named(tmp_path, monkeypatch):
    """As a class shares it.  The system lets root write anywhere, so that its refusal is played here."""
    store.fetch(tmp_path, FIELDS, lambda: model(3.0))

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store.locks, "hold", refused)
    monkeypatch.setattr(store.os, "access", lambda path, mode: mode != os.W_OK)
    assert store.fetch(tmp_path, FIELDS, refuse)["0.weight"][0, 0] == 3
    with pytest.raises(PermissionError, match=r"model \w+ is not in .*which cannot be written; BDLIB_HOME"):
        store.fetch(tmp_path, {"arch": "other"}, refuse)
