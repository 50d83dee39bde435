"""Datasets by name, damaged and missing files, budgets, clean subsets."""

import csv
import errno
import functools
import gzip
import http.server
import io
import pickle
import re
import shutil
import struct
import tarfile
import threading
import time
import tracemalloc
import zipfile
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as tv

from bdlib import data, sources


@pytest.mark.parametrize("name", ["signs", "digits"])
def test_embedded_datasets_load_without_a_file(name, tmp_path):
    train, test = data.load(name, tmp_path)
    assert train.images.dtype == torch.uint8 and train.images.shape[2:] == (32, 32) and len(train.classes) == 10
    assert len(train) > len(test) > 300
    assert train.floats().max() <= 1 and train.floats().min() >= 0


def test_the_drawings_are_kept_and_a_damaged_or_lost_file_is_drawn_anew(tmp_path):
    drawn = data.load("signs", tmp_path)[0].sha256()
    (kept,) = tmp_path.iterdir()
    assert data.load("signs", tmp_path)[0].sha256() == drawn
    for damage in (b"", kept.read_bytes()[:-1000]):
        kept.write_bytes(damage)
        assert data.load("signs", tmp_path)[0].sha256() == drawn and len(kept.read_bytes()) > 20_000_000
    kept.unlink()
    assert data.load("signs", kept / "no folder")[0].sha256() == drawn
    (tmp_path / "file").write_text("in the way")
    assert data.load("signs", tmp_path / "file")[0].sha256() == drawn, "a folder that cannot be written is no error"


def test_the_kept_drawings_are_read_and_those_of_other_code_are_not(tmp_path, monkeypatch):
    train, _ = data.load("signs", tmp_path)
    (kept,) = tmp_path.iterdir()
    arrays = data.read_npz(kept)
    arrays["x_train"][0] = 0
    data.write_atomic(kept, lambda file: np.savez(file, **arrays))
    assert data.load("signs", tmp_path)[0].images[0].eq(0).all(), "the file is what is read"
    other = tmp_path / "signs.py"
    other.write_text("# draws something else")
    monkeypatch.setattr(data.signs, "__file__", str(other))
    assert data.load("signs", tmp_path)[0].sha256() == train.sha256()


def test_digits_splits_are_disjoint_parts_of_the_whole():
    train, test = data.load("digits")
    assert len(train) + len(test) == 1797
    assert torch.bincount(test.labels).min() >= 30


@pytest.mark.parametrize("name", ["cifar11", "folder", "cifar10:x", ""])
def test_unknown_dataset_says_what_is_allowed(name):
    allowed = "signs, digits, cifar10, gtsrb, cifar100, svhn, tiny_imagenet, imagenette, mnist, fashion_mnist"
    with pytest.raises(ValueError, match=f"dataset must be one of {allowed} or folder:PATH, got {name!r}"):
        data.load(name)


def test_the_names_that_need_no_file_and_every_name_has_its_augmentation():
    assert data.EMBEDDED == ("signs", "digits") and set(data.AUGMENTATION) == {*data.NAMES, "folder"}
    mirrored = {name for name, (_, flip, _) in data.AUGMENTATION.items() if flip}
    assert mirrored.isdisjoint({"digits", "mnist", "svhn", "gtsrb"})  # a mirrored 2 or "turn left" is another class


def test_what_one_caller_does_to_an_embedded_dataset_does_not_reach_the_next():
    first, _ = data.load("signs")
    before = first.sha256()
    first.images.zero_()
    assert data.load("signs")[0].sha256() == before


def arrays(count=20):
    images = np.arange(count * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(count, 32, 32, 3)
    labels = (np.arange(count) % 2).astype(np.uint8)
    return dict(x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6], classes=np.array(["a", "b"]))


def test_a_file_already_there_is_used_as_it_is(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **arrays())
    train, test = data.load("cifar10", tmp_path)
    assert (len(train), len(test), train.classes) == (20, 6, ("a", "b"))
    assert torch.equal(train.images[3].permute(1, 2, 0), torch.from_numpy(arrays()["x_train"][3]))


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, "out of reach")

    np.savez(tmp_path / "gtsrb.npz", **arrays())
    monkeypatch.setattr(data.np, "load", refuse)
    with pytest.raises(OSError, match="out of reach"):
        data.load("gtsrb", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "gap", "flipped", "text", "lacks", "shape"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "gtsrb.npz"
    content = arrays()
    if damage == "lacks":
        del content["y_test"]
    if damage == "shape":
        content["x_train"] = content["x_train"][..., 0]
    np.savez(path, **content)
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        raw = raw[: len(raw) // 2]
    if damage == "gap":  # places of arrays before the file's start: EINVAL
        del raw[100:200]
    if damage == "flipped":
        raw[len(raw) // 3] ^= 255
    path.write_bytes(b"no numpy file" if damage == "text" else bytes(raw))
    with pytest.raises(ValueError, match=r"gtsrb\.npz"):
        data.load("gtsrb", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": np.array([0, 1, 0, 1, 0, 2])}, "y_test must be from 0 to 1, as there are 2 classes, got 0 to 2"),
        ({"y_train": np.full(20, -1)}, "y_train must be from 0 to 1, as there are 2 classes, got -1 to -1"),
        ({"y_test": np.zeros(6, np.float32)}, r"y_test must hold a whole number .* got float32 \(6,\)"),
        ({"y_test": np.zeros(5, np.uint8)}, r"y_test must hold a whole number for each of 6 images.* got uint8 \(5,\)"),
        ({"x_test": np.zeros((0, 32, 32, 3), np.uint8), "y_test": np.zeros(0, np.uint8)}, "at least one"),
        ({"x_train": np.zeros((20, 3, 32, 32), np.uint8)}, r"C = 1 or 3.* got uint8 \(20, 3, 32, 32\)"),
        ({"x_test": np.zeros((6, 32, 32, 1), np.uint8)}, r"x_test must be .* the same size in both splits"),
        ({"x_test": np.zeros((6, 32, 32, 3), np.float32)}, "x_test must be uint8 .* got float32"),
    ],
)
def test_a_file_of_another_form_is_refused_with_what_it_holds(tmp_path, change, message):
    np.savez(tmp_path / "gtsrb.npz", **(arrays() | change))
    with pytest.raises(ValueError, match=rf"gtsrb\.npz: {'' if message[0] in 'xy' else '.*'}{message}"):
        data.load("gtsrb", tmp_path)


@pytest.mark.parametrize("damage", ["one array", "encrypted", "compression"])
def test_what_zipfile_and_numpy_call_otherwise_is_damage_too(tmp_path, damage):
    path = tmp_path / "gtsrb.npz"
    np.savez(path, **arrays())
    raw = bytearray(path.read_bytes())
    entry = raw.index(
        b"PK\x01\x02"
    )  # the first file's entry in the directory: its flags are at 8, its compression at 10
    raw[entry + (8 if damage == "encrypted" else 10)] ^= 1
    buffer = io.BytesIO()
    np.save(buffer, arrays()["x_train"])
    path.write_bytes(buffer.getvalue() if damage == "one array" else bytes(raw))
    with pytest.raises(ValueError, match=r"gtsrb\.npz is damaged or no dataset"):
        data.load("gtsrb", tmp_path)


def test_a_test_split_may_lack_a_class(tmp_path):
    np.savez(tmp_path / "gtsrb.npz", **(arrays() | {"y_test": np.ones(6, np.uint8)}))
    assert data.load("gtsrb", tmp_path)[1].labels.tolist() == [1] * 6


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_file_is_read_with_one_copy_of_its_images(tmp_path, monkeypatch, order):
    monkeypatch.setattr(data, "_CHUNK", 100)
    images = np.random.default_rng(0).integers(0, 256, (2550, 32, 32, 3), np.uint8)
    content = dict(x_train=np.asarray(images, order=order), y_train=np.zeros(2550, np.uint8))
    np.savez(tmp_path / "gtsrb.npz", **(arrays() | content))
    tracemalloc.start()
    train, _ = data.load("gtsrb", tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(train.images.permute(0, 2, 3, 1), images) and train.images.is_contiguous()
    if order == "C":
        assert peak < 1.2 * images.nbytes


@pytest.fixture
def web(tmp_path):
    """A web server on this machine that serves a folder; yields (address, folder)."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def cifar_archive(folder):
    """An archive of CIFAR-10's form with 4 images a batch; the checksums that torchvision asks for, by file."""
    sums = {}
    base = folder / "cifar-10-batches-py"
    base.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]:
        content = {"data": np.full((4, 3072), len(sums), np.uint8), "labels": [0, 1, 2, 3]}
        if name == "batches.meta":
            content = {"label_names": [f"class{k}" for k in range(10)]}
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((base / name).read_bytes()).hexdigest()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(base, arcname=base.name)
    sums["archive"] = md5((folder / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    return sums


def test_cifar10_is_downloaded_once_checked_and_cached(web, tmp_path, monkeypatch):
    address, folder = web
    sums = cifar_archive(folder)
    monkeypatch.setattr(tv.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", sums["archive"])
    monkeypatch.setattr(tv.CIFAR10, "train_list", [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)])
    monkeypatch.setattr(tv.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        tv.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    train, test = data.load("cifar10", tmp_path / "data")
    assert (len(train), len(test), train.images[4].unique().tolist()) == (20, 4, [1])
    (folder / "cifar-10-python.tar.gz").unlink()
    assert data.load("cifar10", tmp_path / "data")[0].sha256() == train.sha256()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10.npz"]


def test_of_several_processes_one_downloads(tmp_path, monkeypatch):
    fetched = []

    def slow(folder):
        fetched.append(folder)
        time.sleep(0.5)
        return arrays()

    monkeypatch.setitem(data.SOURCES, "cifar10", replace(data.SOURCES["cifar10"], fetch=slow))
    threads = [threading.Thread(target=data.load, args=("cifar10", tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(fetched) == 1 and [path.name for path in tmp_path.iterdir()] == ["cifar10.npz"]


@pytest.mark.parametrize("served", [None, b"half an archive"])
def test_a_failed_download_says_where_to_put_the_file_and_leaves_nothing(web, tmp_path, monkeypatch, served):
    address, folder = web
    if served:
        (folder / "cifar-10-python.tar.gz").write_bytes(served)
    monkeypatch.setattr(tv.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    with pytest.raises(RuntimeError, match=r"cifar10 could not be downloaded .*cifar10\.npz"):
        data.load("cifar10", tmp_path / "data")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def noise(count, height=32, width=32):
    """Random pixels, so that no two images and no two corners are alike."""
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


def packed(images, labels, test_images, test_labels, classes):
    return dict(x_train=images, y_train=labels, x_test=test_images, y_test=test_labels, classes=classes)


def md5_of(path):
    return md5(path.read_bytes()).hexdigest()


def serve_cifar100(address, folder, monkeypatch):
    images, base, sums = noise(5), folder / "cifar-100-python", {}
    fine = [99, 0, 7, 7, 42]
    names = [f"thing{k}" for k in range(100)]
    base.mkdir()
    for name, part in (("train", slice(0, 3)), ("test", slice(3, 5)), ("meta", None)):
        content = {"fine_label_names": names, "coarse_label_names": ["all"]}
        if part:
            rows = images[part].transpose(0, 3, 1, 2).reshape(-1, 3072)  # red plane, green plane, blue plane
            content = {"data": rows, "fine_labels": fine[part], "coarse_labels": [0] * len(rows)}
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = md5_of(base / name)
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(base, arcname=base.name)
    shutil.rmtree(base)
    monkeypatch.setattr(tv.CIFAR100, "url", f"{address}/cifar-100-python.tar.gz")
    monkeypatch.setattr(tv.CIFAR100, "tgz_md5", md5_of(folder / "cifar-100-python.tar.gz"))
    monkeypatch.setattr(tv.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(tv.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setitem(tv.CIFAR100.meta, "md5", sums["meta"])
    return packed(images[:3], fine[:3], images[3:], fine[3:], names)


def serve_svhn(address, folder, monkeypatch):
    from scipy.io import savemat

    images = noise(7)
    marks = np.array([[1], [10], [9], [10], [2], [5], [10]], np.uint8)  # 10 stands for the digit 0
    for split, part in (("train", slice(0, 4)), ("test", slice(4, 7))):
        file = f"{split}_32x32.mat"
        savemat(folder / file, {"X": images[part].transpose(1, 2, 3, 0), "y": marks[part]}, do_compression=True)
        monkeypatch.setitem(tv.SVHN.split_list, split, [f"{address}/{file}", file, md5_of(folder / file)])
    monkeypatch.setitem(tv.SVHN.split_list, "extra", ["http://127.0.0.1:1/none", "none", ""])
    return packed(images[:4], [1, 0, 9, 0], images[4:], [2, 5, 0], [str(k) for k in range(10)])


def serve_mnist(address, folder, monkeypatch, kind=tv.MNIST):
    classes = [str(k) for k in range(10)]
    if kind is tv.FashionMNIST:
        classes = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot".replace("_", " ").split(
            " "
        )
        classes[-2:] = ["Ankle boot"]
    images, labels = noise(7, 28, 28)[..., :1], np.array([3, 0, 9, 9, 1, 5, 0], np.uint8)
    sums = []
    for split, part in (("train", slice(0, 4)), ("t10k", slice(4, 7))):
        count = len(labels[part])
        for file, header, content in (
            (f"{split}-images-idx3-ubyte.gz", struct.pack(">4I", 0x803, count, 28, 28), images[part]),
            (f"{split}-labels-idx1-ubyte.gz", struct.pack(">2I", 0x801, count), labels[part]),
        ):
            (folder / file).write_bytes(gzip.compress(header + content.tobytes()))
            sums.append((file, md5_of(folder / file)))
    monkeypatch.setattr(kind, "mirrors", [f"{address}/down/", f"{address}/"])
    monkeypatch.setattr(kind, "resources", sums)
    framed = np.zeros((7, 32, 32, 1), np.uint8)
    framed[:, 2:30, 2:30] = images
    return packed(framed[:4], labels[:4], framed[4:], labels[4:], classes)


def jpeg(path, color=True, size=(64, 64)):
    """A picture file at this path, and its pixels 64 x 64 as Pillow decodes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels if color else pixels[..., 0]).save(path, "JPEG")
    return np.asarray(Image.open(path).convert("RGB").resize((64, 64)))


def serve_tiny_imagenet(address, folder, monkeypatch):
    base = folder / "tiny-imagenet-200"
    train = [
        jpeg(base / f"train/{name}/images/{name}_{k}.JPEG", color=k != 1) for name in ("n01", "n02") for k in range(3)
    ]
    for name in ("n01", "n02"):
        (base / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    test = [jpeg(base / f"val/images/val_{k}.JPEG", color=k != 1) for k in range(3)]
    rows = zip(["val_2.JPEG", "val_0.JPEG", "val_1.JPEG"], ["n01", "n02", "n01"], strict=True)
    (base / "val/val_annotations.txt").write_text("".join(f"{file}\t{name}\t0\t32\t44\t62\n" for file, name in rows))
    jpeg(base / "test/images/test_0.JPEG")
    (base / "wnids.txt").write_text("n02\nn01\n")
    (base / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tEgyptian cat\n")
    archive = shutil.make_archive(folder / "tiny-imagenet-200", "zip", folder, base.name)
    shutil.rmtree(base)
    monkeypatch.setattr(sources, "TINY_IMAGENET", (f"{address}/tiny-imagenet-200.zip", md5_of(Path(archive))))
    test = [test[2], test[0], test[1]]
    return packed(np.stack(train), [0, 0, 0, 1, 1, 1], np.stack(test), [0, 1, 0], ["goldfish", "Egyptian cat"])


def serve_imagenette(address, folder, monkeypatch):
    base = folder / "imagenette2-160"
    names = ["n01440764", "n02102040", "n03888257"]
    train = [jpeg(base / f"train/{name}/{name}_{k}.JPEG", k != 1, (160, 213)) for name in names for k in range(2)]
    test = [jpeg(base / f"val/{name}/ILSVRC2012_val_{name}.JPEG", size=(200, 160)) for name in names]
    with tarfile.open(folder / "imagenette2-160.tgz", "w:gz") as tar:
        tar.add(base, arcname=base.name)
    shutil.rmtree(base)
    archive = (f"{address}/imagenette2-160.tgz", md5_of(folder / "imagenette2-160.tgz"))
    monkeypatch.setitem(tv.Imagenette._ARCHIVES, "160px", archive)
    classes = ["tench", "English springer", "parachute"]
    return packed(np.stack(train), [0, 0, 1, 1, 2, 2], np.stack(test), [0, 1, 2], classes)


def serve_gtsrb(address, folder, monkeypatch):
    images, labels = noise(5), [0, 7, 42, 42, 3]
    table = io.StringIO()
    rows = csv.writer(table, delimiter=";")
    rows.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
    training, testing, truth = "GTSRB-Training_fixed.zip", "GTSRB_Final_Test_Images.zip", "GTSRB_Final_Test_GT.zip"
    with zipfile.ZipFile(folder / training, "w") as first, zipfile.ZipFile(folder / testing, "w") as second:
        for k, (image, label) in enumerate(zip(images, labels, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PPM")
            if k < 3:
                first.writestr(f"GTSRB/Training/{label:05d}/00000_{k:05d}.ppm", buffer.getvalue())
            else:
                second.writestr(f"GTSRB/Final_Test/Images/{k:05d}.ppm", buffer.getvalue())
                rows.writerow([f"{k:05d}.ppm", 32, 32, 1, 1, 30, 30, label])
        for absent in set(range(43)) - set(labels[:3]):
            first.writestr(f"GTSRB/Training/{absent:05d}/GT.csv", "")
    with zipfile.ZipFile(folder / truth, "w") as third:
        third.writestr("GT-final_test.csv", table.getvalue())
    sums = {file: md5_of(folder / file) for file in (training, testing, truth)}
    fetch = tv.gtsrb.download_and_extract_archive
    local = lambda url, download_root, md5: fetch(
        f"{address}/{Path(url).name}", download_root, md5=sums[Path(url).name]
    )
    monkeypatch.setattr(tv.gtsrb, "download_and_extract_archive", local)
    # torchvision takes a class without a .ppm file for a mistake; the tiny archive has 40 of them.
    make = tv.gtsrb.make_dataset
    monkeypatch.setattr(tv.gtsrb, "make_dataset", functools.partial(make, allow_empty=True))
    return packed(images[:3], labels[:3], images[3:], labels[3:], [f"{k:02d}" for k in range(43)])


SERVE = {
    "cifar100": serve_cifar100,
    "gtsrb": serve_gtsrb,
    "svhn": serve_svhn,
    "tiny_imagenet": serve_tiny_imagenet,
    "imagenette": serve_imagenette,
    "mnist": serve_mnist,
    "fashion_mnist": functools.partial(serve_mnist, kind=tv.FashionMNIST),
}


def test_every_dataset_that_is_downloaded_is_tested():
    assert {*data.EMBEDDED, "cifar10", *SERVE} == set(data.NAMES)


@pytest.mark.parametrize("name", SERVE)
def test_what_was_in_the_archive_is_what_is_loaded_and_it_is_fetched_once(web, tmp_path, monkeypatch, name):
    expected = SERVE[name](*web, monkeypatch)
    train, test = data.load(name, tmp_path / "data")
    for split, key in ((train, "train"), (test, "test")):
        assert np.array_equal(split.images.permute(0, 2, 3, 1), expected[f"x_{key}"])
        assert split.labels.tolist() == list(expected[f"y_{key}"]) and split.classes == tuple(expected["classes"])
        assert expected[f"x_{key}"].shape[1:] == sources.SOURCES[name].shape
        assert (split.name, split.crop_padding, split.flip, split.least_area) == (name, *data.AUGMENTATION[name])
    shutil.rmtree(web[1])
    assert [split.sha256() for split in data.load(name, tmp_path / "data")] == [train.sha256(), test.sha256()]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f"{name}.npz"]


@pytest.mark.parametrize("fault", ["gone", "changed"])
@pytest.mark.parametrize("name", SERVE)
def test_a_missing_or_changed_archive_is_not_used(web, tmp_path, monkeypatch, name, fault):
    SERVE[name](*web, monkeypatch)
    for path in web[1].iterdir():
        if fault == "gone":
            path.unlink()
        else:  # still a readable archive: only the checksum can tell
            path.write_bytes(path.read_bytes() + b"\0")
    size = " x ".join(str(side) for side in sources.SOURCES[name].shape)
    with pytest.raises(
        RuntimeError, match=rf"{name} could not be downloaded .*{name}\.npz: .* N x {size}, (RGB|gray)\)"
    ):
        data.load(name, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


def test_a_connection_that_breaks_within_the_protocol_is_a_failed_download(tmp_path, monkeypatch):
    from http.client import IncompleteRead

    def broken(*_, **__):
        raise IncompleteRead(b"half")

    monkeypatch.setattr(tv.utils, "_urlretrieve", broken)
    monkeypatch.setattr(tv.utils, "_get_redirect_url", lambda url, max_hops: url)
    with pytest.raises(RuntimeError, match=r"svhn could not be downloaded \(IncompleteRead"):
        data.load("svhn", tmp_path)
    assert not list(tmp_path.iterdir())


def test_gtsrb_of_any_size_and_order_becomes_32_pixels(tmp_path, monkeypatch):
    def fake(self, root, split, download):
        self._samples = []
        for label in (0, 1, 42):
            path = tmp_path / f"{split}{label}.png"
            Image.new("RGB", (20 + label, 47), (label, 5, 6)).save(path)
            self._samples.append((str(path), label))
        self.transform = self.target_transform = None

    monkeypatch.setattr(tv.GTSRB, "__init__", fake)
    (tmp_path / "data" / "gtsrb-download").mkdir(parents=True)
    train, _ = data.load("gtsrb", tmp_path / "data")
    assert train.images.shape == (3, 3, 32, 32) and train.labels.tolist() == [0, 1, 42] and len(train.classes) == 43
    assert train.images[2, :, 5, 5].tolist() == [42, 5, 6]


def picture_tree(root, splits, classes=("cat", "dog"), count=5):
    for split in splits:
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new(
                    "RGBA" if i % 2 else "L", (40, 30), 50 * k + i if i % 2 == 0 else (50 * k + i, 0, 0, 128)
                ).save(root / split / name / f"{i}.png")


def test_folder_with_train_and_test(tmp_path):
    picture_tree(tmp_path, ["train", "test"])
    train, test = data.load(f"folder:{tmp_path}@16")
    assert train.images.shape == (10, 3, 16, 16) and len(test) == 10 and train.classes == ("cat", "dog")


def test_folder_without_splits_keeps_every_fifth_image_for_testing(tmp_path):
    picture_tree(tmp_path, ["."])
    train, test = data.load(f"folder:{tmp_path}")
    assert (len(train), len(test)) == (8, 2) and test.labels.tolist() == [0, 1]
    assert test.images[0].unique().tolist() == [4]


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (False, "/nowhere", "existing folder"),
        (True, "@4", "at least 8 pixels"),
        (True, "@big", "at least 8 pixels"),
        (True, "/empty", "no tree of"),
        (True, "/other", "other classes"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, make, spec, message):
    if make:
        picture_tree(tmp_path, ["."])
        (tmp_path / "empty").mkdir()
        picture_tree(tmp_path / "other", ["train"])
        picture_tree(tmp_path / "other", ["test"], classes=("cat", "cow"))
    with pytest.raises(ValueError, match=message):
        data.load(f"folder:{tmp_path}{spec}")


def one_picture(tmp_path, image, file="x.png", **options):
    """Pixels (16 x 16, RGB, all the same) of this picture as `folder:` loads it."""
    picture_tree(tmp_path, ["train", "test"])
    image.save(tmp_path / "test/cat" / file, **options)
    tests = data.load(f"folder:{tmp_path}@16")[1].images[:6]  # of cat: 0 to 4, then x
    assert len(tests[5].flatten(1).unique(dim=1).T) == 1
    return tests[5, :, 0, 0].tolist()


def palette(*colors):
    image = Image.new("P", (20, 30), 1)
    image.putpalette([value for color in colors for value in color])
    return image


@pytest.mark.parametrize(
    ("image", "file", "options", "rgb"),
    [
        (Image.new("L", (20, 30), 77), "x.png", {}, [77, 77, 77]),
        (Image.new("1", (20, 30), 1), "x.png", {}, [255, 255, 255]),
        (palette((9, 9, 9), (1, 200, 3)), "x.png", {}, [1, 200, 3]),
        (palette((9, 9, 9), (1, 200, 3)), "x.png", {"transparency": 1}, [255, 255, 255]),
        (Image.fromarray(np.full((30, 20), 30000, np.uint16)), "x.png", {}, [117, 117, 117]),
        (Image.fromarray(np.full((30, 20), 65535, np.uint16)), "x.tif", {}, [255, 255, 255]),
        (Image.fromarray(np.full((30, 20), 515, np.int32)), "x.tif", {}, [2, 2, 2]),
        (Image.new("RGBA", (20, 30), (255, 0, 0, 51)), "x.png", {}, [255, 204, 204]),
        (Image.new("RGBA", (20, 30), (0, 0, 0, 0)), "x.webp", {"lossless": True, "exact": True}, [255, 255, 255]),
        (Image.new("LA", (20, 30), (0, 51)), "x.png", {}, [204, 204, 204]),
        (Image.new("RGB", (20, 30), (4, 5, 6)), "x.png", {"transparency": (4, 5, 6)}, [255, 255, 255]),
        (Image.new("CMYK", (20, 30), (0, 255, 255, 0)), "x.tif", {}, [255, 0, 0]),
    ],
)
def test_a_picture_of_any_mode_becomes_rgb(tmp_path, image, file, options, rgb):
    assert one_picture(tmp_path, image, file, **options) == rgb


def cut_off(path):
    Image.fromarray(noise(1, 40, 40)[0]).save(path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("file", "make"),
    [
        ("text.png", lambda path: path.write_text("no picture")),
        ("empty.jpg", lambda path: path.write_bytes(b"")),
        ("half.jpg", cut_off),
        ("half.png", cut_off),
        ("real.tif", lambda path: Image.fromarray(np.full((20, 20), 0.5, np.float32)).save(path)),
        ("deep.tif", lambda path: Image.fromarray(np.full((20, 20), 70_000, np.int32)).save(path)),
    ],
)
def test_a_file_that_is_no_picture_is_named(tmp_path, file, make):
    picture_tree(tmp_path, ["."])
    make(tmp_path / "dog" / file)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'dog' / file} cannot be read as a picture (")):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize("splits", [["."], ["train", "val"]])
def test_classes_without_a_picture_are_named(tmp_path, splits):
    picture_tree(tmp_path, splits)
    for name in ("unicorn", "dodo"):
        for split in splits:
            (tmp_path / split / name).mkdir()
    (tmp_path / splits[-1] / "dodo" / "notes.txt").write_text("extinct")
    with pytest.raises(ValueError, match=r"no picture of 2 of its classes, dodo, unicorn; .*\.jpg"):
        data.load(f"folder:{tmp_path}")


def test_one_class_is_too_few(tmp_path):
    picture_tree(tmp_path, ["."], ("cat",))
    with pytest.raises(ValueError, match="at least 2 classes, got only 'cat'"):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("splits", "missing"),
    [
        (["train"], "test"),
        (["train", "valid"], "test"),
        (["Train", "Test"], "train and no test"),
        (["test", "val"], "train"),
        (["DEV"], "train and no test"),
    ],
)
def test_folders_called_like_splits_are_no_classes(tmp_path, splits, missing):
    picture_tree(tmp_path, splits)
    with pytest.raises(
        ValueError, match=f"holds {', '.join(sorted(splits))} but no {missing}: two splits are called train and test"
    ):
        data.load(f"folder:{tmp_path}")


@pytest.mark.parametrize(("folders", "splits"), [(("train",), "train"), (("more", "train", "valid"), "train, valid")])
def test_splits_without_classes_are_no_classes(tmp_path, folders, splits):
    picture_tree(tmp_path, ["."], folders)
    with pytest.raises(ValueError, match=f"holds {splits} but no test: two splits"):
        data.load(f"folder:{tmp_path}")


def test_a_split_beside_a_folder_of_another_name_is_no_class(tmp_path):
    picture_tree(tmp_path, ["train", "holdout"])
    with pytest.raises(ValueError, match="holds train but no test: two splits"):
        data.load(f"folder:{tmp_path}")


def test_a_train_among_cars_is_a_class(tmp_path):
    picture_tree(tmp_path, ["."], ("car", "train"))
    assert data.load(f"folder:{tmp_path}")[0].classes == ("car", "train")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            lambda d: {"images": d.floats()},
            r"images must be a tensor uint8 \(N, C, H, W\), 0 to 255, got torch.float32",
        ),
        (lambda d: {"images": d.images[0]}, r"images must be .*got torch.uint8 \(3, 8, 8\)"),
        (lambda d: {"images": d.images.numpy()}, "images must be a tensor .*got ndarray"),
        (lambda d: {"labels": d.labels.int()}, r"labels must be a tensor int64 \(N,\), got torch.int32 \(36,\)"),
        (lambda d: {"labels": d.labels[:, None]}, r"labels must be .*got torch.int64 \(36, 1\)"),
        (lambda d: {"labels": d.labels.tolist()}, "labels must be .*got list"),
        (lambda d: {"labels": d.labels[:30]}, "each image must have a label, got 36 images and 30 labels"),
        (lambda d: {"labels": d.labels + 1}, "labels must be between 0 and 2, got 1 to 3"),
        (lambda d: {"labels": d.labels - 1}, "labels must be between 0 and 2, got -1 to 1"),
    ],
)
def test_what_is_no_split_of_images_is_refused(tiny, values, said):
    with pytest.raises((TypeError, ValueError), match=said):
        data.replace(tiny, **values(tiny))


def test_labels_away_from_the_cpu_are_not_looked_at(tiny):
    """On a GPU that would wait for it; a meta tensor has no values, so that a look is an error."""
    assert tiny.to("meta").subset(slice(3)).labels.is_meta


def test_a_split_may_be_empty(tiny):
    assert len(tiny.subset(slice(0))) == 0


def test_a_log_gets_no_progress_bar_of_the_pictures(tmp_path, capsys):
    picture_tree(tmp_path, ["."])
    data.load(f"folder:{tmp_path}")
    assert capsys.readouterr().err == ""


def test_a_class_too_small_to_be_parted_is_named(tmp_path):
    picture_tree(tmp_path, ["."])
    picture_tree(tmp_path, ["."], classes=("emu", "fox"), count=4)
    with pytest.raises(ValueError, match="at least 5 pictures of each class.*fewer has emu, fox$"):
        data.load(f"folder:{tmp_path}")


def test_only_classes_that_differ_are_listed(tmp_path):
    picture_tree(tmp_path, ["train"], classes=("cat", "dog", "emu"))
    picture_tree(tmp_path, ["val"], classes=("cat", "dog", "fox"))
    with pytest.raises(ValueError, match=r"other classes in train than in val: only one has \['emu', 'fox'\]"):
        data.load(f"folder:{tmp_path}")


def test_a_path_may_hold_an_at_sign(tmp_path):
    root = tmp_path / "me@home" / "pets"
    picture_tree(root, ["."])
    assert data.load(f"folder:{root}")[0].images.shape == (8, 3, 32, 32)
    assert data.load(f"folder:{root}@40")[0].images.shape == (8, 3, 40, 40)
    root = root.rename(root.with_name("pets@v2"))
    assert data.load(f"folder:{root}")[0].images.shape == (8, 3, 32, 32)
    assert data.load(f"folder:{root}@40")[0].images.shape == (8, 3, 40, 40)


@pytest.mark.parametrize("splits", [["."], ["train", "test"]])
def test_a_folder_is_read_with_one_copy_of_its_images(tmp_path, monkeypatch, splits):
    monkeypatch.setattr(data, "_CHUNK", 2)
    picture_tree(tmp_path, splits, count=20)
    data.load(f"folder:{tmp_path}@16")  # what is imported on the way does not count
    tracemalloc.start()
    held = sum(split.images.nbytes for split in data.load(f"folder:{tmp_path}@224"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held == 20 * 2 * len(splits) * 224 * 224 * 3 and peak < 1.3 * held


@pytest.mark.parametrize(
    ("budget", "count"),
    [(12, 12), ("12", 12), ("50%", 18), ("8.5%", 3), ("1/class", 3), ("4/class", 12), (36, 36), ("100%", 36)],
)
def test_budget_as_number_share_or_number_per_class(tiny, budget, count):
    assert data.resolve_budget(budget, tiny) == count


@pytest.mark.parametrize(
    "budget", [0, -5, 37, 2, "5%%", "0%", "101%", "2/classes", "0/class", "13/class", "many", "", "1e3", True, 2.5]
)
def test_a_budget_that_does_not_fit_names_the_value(tiny, budget):
    with pytest.raises(ValueError, match=r"budget must be .*got") as error:
        data.resolve_budget(budget, tiny)
    assert repr(budget) in str(error.value)


@pytest.mark.parametrize(("count", "shares"), [(3, [1, 1, 1]), (7, [2, 2, 3]), (8, [2, 3, 3]), (36, [12, 12, 12])])
def test_clean_subset_is_balanced(tiny, generator, count, shares):
    chosen = data.clean_subset(tiny, count, generator=generator)
    assert sorted(torch.bincount(tiny.labels[chosen]).tolist()) == shares
    assert len(chosen.unique()) == count


def test_clean_subset_depends_on_the_generator_alone(tiny):
    draw = lambda seed: data.clean_subset(tiny, 9, generator=torch.Generator().manual_seed(seed)).tolist()
    assert draw(0) == draw(0) != draw(1)


def test_a_class_with_too_few_images_is_named(tiny, generator):
    unequal = tiny.subset(torch.cat([torch.nonzero(tiny.labels != 2).flatten(), torch.tensor([2])]))
    with pytest.raises(ValueError, match="needs 2 images of class 'blue', which has 1: at most 3"):
        data.clean_subset(unequal, 6, generator=generator)


@pytest.fixture
def unequal():
    """43 classes of 150 to 2,000 images, like GTSRB, in random order."""
    sizes = torch.linspace(150, 2000, 43).round().long()[torch.randperm(43, generator=torch.Generator().manual_seed(0))]
    labels = torch.arange(43).repeat_interleave(sizes)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    return data.Dataset("unequal", images, labels, tuple(f"{k:02d}" for k in range(43)))


@pytest.mark.parametrize(
    ("budget", "share"),
    [(43, 1), ("1/class", 1), (430, 10), ("10/class", 10), (1935, 45), ("45/class", 45), ("150/class", 150)],
)
def test_clean_subset_is_balanced_where_classes_are_not(unequal, generator, budget, share):
    chosen = data.clean_subset(unequal, data.resolve_budget(budget, unequal), generator=generator)
    assert torch.bincount(unequal.labels[chosen]).tolist() == [share] * 43
    assert len(chosen.unique()) == 43 * share


@pytest.mark.parametrize(
    ("budget", "needed"), [("151/class", 151), ("200/class", 200), ("100%", 1075), (43 * 150 + 43, 151)]
)
def test_the_smallest_class_sets_the_largest_balanced_budget(unequal, generator, budget, needed):
    smallest = int(torch.bincount(unequal.labels).argmin())
    says = f"needs {needed} images of class '{smallest:02d}', which has 150: at most 6450 can be spread evenly"
    with pytest.raises(ValueError, match=says):
        data.clean_subset(unequal, data.resolve_budget(budget, unequal), generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_what_does_not_divide_goes_to_classes_that_have_more_whatever_the_seed(unequal, seed):
    chosen = data.clean_subset(unequal, 43 * 150 + 42, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(unequal.labels[chosen])
    assert counts.min() == 150 == counts[torch.bincount(unequal.labels).argmin()] and counts.max() == 151
    assert len(chosen.unique()) == 43 * 150 + 42


def test_the_hash_sees_pixels_labels_and_shape(tiny):
    other_pixel, other_label = tiny.images.clone(), tiny.labels.clone()
    other_pixel[0, 0, 0, 0] ^= 1
    other_label[0] = 1
    variants = [
        tiny,
        data.replace(tiny, images=other_pixel),
        data.replace(tiny, labels=other_label),
        data.replace(tiny, images=tiny.images.reshape(36, 3, 4, 16)),
    ]
    assert len({variant.sha256() for variant in variants}) == 4


def pictures(dataset):
    return [(image.numpy().tobytes(), int(label)) for image, label in zip(dataset.images, dataset.labels, strict=True)]


@pytest.mark.parametrize(("share", "count"), [(0.25, 3), (0.2, 2), (0.3, 4), (0.99, 11)])
def test_held_out_images_are_a_share_of_every_class_and_the_rest_is_kept(tiny, generator, share, count):
    kept, held = data.hold_out(tiny, share, generator=generator)
    assert torch.bincount(held.labels).tolist() == [count] * 3 and len(kept) == 36 - 3 * count
    assert sorted(pictures(kept) + pictures(held)) == sorted(pictures(tiny))  # all pictures differ: none is in both
    assert (kept.classes, kept.crop_padding, kept.flip) == (tiny.classes, tiny.crop_padding, tiny.flip)


def test_a_class_keeps_one_image_and_one_without_images_is_no_matter(tiny, generator):
    unequal = tiny.subset(torch.tensor([0, 3, 6, 1]))  # three red, one green, no blue
    kept, held = data.hold_out(unequal, 0.9, generator=generator)
    assert sorted(kept.labels.tolist()) == [0, 1] and held.labels.tolist() == [0, 0]


@pytest.mark.parametrize(("count", "share"), [(3, 0.9), (6, 0.2), (36, 0.0), (0, 0.5)])
def test_where_no_class_can_give_one_both_parts_are_the_whole(tiny, generator, count, share):
    clean = tiny.subset(slice(count))
    kept, held = data.hold_out(clean, share, generator=generator)
    assert pictures(kept) == pictures(held) == pictures(clean)


def test_what_is_held_out_depends_on_the_generator_alone(tiny, untouched):
    draw = lambda seed: data.hold_out(tiny, 0.25, generator=torch.Generator().manual_seed(seed))[1].sha256()
    assert draw(0) == draw(0) != draw(1)
