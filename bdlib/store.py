"""Content-addressed store of trained weights: made once, checked on every read, shared by all notebooks and processes."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bdlib import locks
from bdlib.files import on_disk, write_atomic

log = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]  # by name


def key(fields: dict) -> str:
    """Hash of everything that decides the bits; the order of the fields does not matter."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:24]


def fetch(folder: Path, fields: dict, make: Callable[[], nn.Module]) -> Weights:
    """The stored state of the model that `fields` describe; `make` trains it if it is not there or does not pass its checksum.

    folder: on a disk or an object store.  A lock keeps two processes from making the same one.  Weights are safetensors, `about` is
    JSON beside it; the JSON is written last, so an artifact without it does not count.  What is complete is read without the lock,
    so that a class can share a read-only store.  Raises PermissionError where the model is not in such a store.
    """
    name = key(fields)
    if found := _read(folder, name):
        return found
    if on_disk(folder) and folder.exists() and not os.access(folder, os.W_OK):
        raise PermissionError(
            f"model {name} is not in {folder}, which cannot be written; BDLIB_HOME names another place"
        )
    waiting = functools.partial(log.warning, "another process is making model %s: waiting for it", name)
    with locks.hold(folder / f"{name}.lock", waiting):
        return _read(folder, name) or _write(folder, name, fields, make())


def _write(folder: Path, name: str, fields: dict, model: nn.Module) -> Weights:
    from safetensors.torch import save

    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    payload = save(weights)
    about = {**fields, "sha256": hashlib.sha256(payload).hexdigest(), "torch": torch.__version__}
    write_atomic(folder / f"{name}.safetensors", lambda file: file.write(payload))
    write_atomic(folder / f"{name}.json", lambda file: file.write(json.dumps(about, indent=1, sort_keys=True).encode()))
    return weights


def _read(folder: Path, name: str) -> Weights | None:
    """The stored weights, or None if they are not complete; damaged ones are named in a warning and not used."""
    from safetensors.torch import load

    try:
        about = json.loads((folder / f"{name}.json").read_bytes())
        payload = (folder / f"{name}.safetensors").read_bytes()
        if hashlib.sha256(payload).hexdigest() != about["sha256"]:
            raise ValueError("its checksum does not match")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): making it anew", folder / f"{name}.safetensors", error)
        return None
    return load(payload)
