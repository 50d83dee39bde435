"""Datasets by name, damaged and missing files, budgets, clean subsets."""

import functools
import http.server
import pickle
import tarfile
import threading
from hashlib import md5

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as tv

from bdlib import data


@pytest.mark.parametrize("name", ["signs", "digits"])
def test_embedded_datasets_load_without_a_file(name, tmp_path):
    train, test = data.load(name, tmp_path)
    assert train.images.dtype == torch.uint8 and train.images.shape[2:] == (32, 32) and len(train.classes) == 10
    assert len(train) > len(test) > 300 and not list(tmp_path.iterdir())
    assert train.floats().max() <= 1 and train.floats().min() >= 0


def test_digits_splits_are_disjoint_parts_of_the_whole():
    train, test = data.load("digits")
    assert len(train) + len(test) == 1797
    assert torch.bincount(test.labels).min() >= 30


def test_unknown_dataset_says_what_is_allowed():
    with pytest.raises(
        ValueError, match="dataset must be one of signs, digits, cifar10, gtsrb or folder:PATH, got 'cifar11'"
    ):
        data.load("cifar11")


def arrays(count=20):
    images = np.arange(count * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(count, 32, 32, 3)
    labels = (np.arange(count) % 2).astype(np.uint8)
    return dict(x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6], classes=np.array(["a", "b"]))


def test_a_file_already_there_is_used_as_it_is(tmp_path):
    np.savez(tmp_path / "cifar10.npz", **arrays())
    train, test = data.load("cifar10", tmp_path)
    assert (len(train), len(test), train.classes) == (20, 6, ("a", "b"))
    assert torch.equal(train.images[3].permute(1, 2, 0), torch.from_numpy(arrays()["x_train"][3]))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "lacks", "shape"])
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
    if damage == "flipped":
        raw[len(raw) // 3] ^= 255
    path.write_bytes(b"no numpy file" if damage == "text" else bytes(raw))
    with pytest.raises(ValueError, match=r"gtsrb\.npz"):
        data.load("gtsrb", tmp_path)


@pytest.fixture
def web(tmp_path):
    """A web server on this machine that serves a folder; yields (address, folder)."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
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


@pytest.mark.parametrize("served", [None, b"half an archive"])
def test_a_failed_download_says_where_to_put_the_file_and_leaves_nothing(web, tmp_path, monkeypatch, served):
    address, folder = web
    if served:
        (folder / "cifar-10-python.tar.gz").write_bytes(served)
    monkeypatch.setattr(tv.CIFAR10, "url", f"{address}/cifar-10-python.tar.gz")
    with pytest.raises(RuntimeError, match=r"cifar10 could not be downloaded .*cifar10\.npz"):
        data.load("cifar10", tmp_path / "data")
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


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
