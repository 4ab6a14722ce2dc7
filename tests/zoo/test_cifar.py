from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hvpkit.zoo import cifar10, cifar100

Loader = Callable[..., tuple[Tensor, Tensor]]
BATCHES = {10: [f"data_batch_{k}" for k in range(1, 6)], 100: ["train"]}
TEST = {10: "test_batch", 100: "test"}
FOLDERS = {
    (10, "python"): "cifar-10-batches-py",
    (10, "binary"): "cifar-10-batches-bin",
    (100, "python"): "cifar-100-python",
    (100, "binary"): "cifar-100-binary",
}
LOADERS: dict[int, Loader] = {10: cifar10, 100: cifar100}
every_form = pytest.mark.parametrize(("classes", "form"), FOLDERS)


def pixels(batch: int) -> np.ndarray:
    """Four images ``[4, 3, 32, 32]``, none like another."""
    return np.random.default_rng(batch).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)


def labels(batch: int, classes: int) -> list[int]:
    return np.random.default_rng(100 + batch).integers(0, classes, 4).tolist()


def content(batch: int, classes: int, form: str) -> bytes:
    rows, own = pixels(batch).reshape(4, 3072), labels(batch, classes)
    if form == "python":
        key = b"labels" if classes == 10 else b"fine_labels"
        return pickle.dumps({b"data": rows, key: own, b"coarse_labels": [0] * 4, b"filenames": [b"x"] * 4}, 2)
    columns = [np.array(own, np.uint8)[:, None], rows]
    return np.hstack(columns if classes == 10 else [np.full((4, 1), 99, np.uint8), *columns]).tobytes()


def make_folder(parent: Path, classes: int, form: str, name: str | None = None) -> Path:
    folder = parent / (name or FOLDERS[classes, form])
    folder.mkdir(parents=True)
    suffix = ".bin" if form == "binary" else ""
    for batch, file in enumerate([*BATCHES[classes], TEST[classes]]):
        (folder / f"{file}{suffix}").write_bytes(content(batch, classes, form))
    (folder / "batches.meta").write_bytes(b"not read")
    return folder


def make_archive(parent: Path, classes: int, form: str) -> Path:
    folder = make_folder(parent / "elsewhere", classes, form)
    archive = parent / f"cifar-{classes}-{form}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


def check(found: tuple[Tensor, Tensor], classes: int, *, train: bool) -> None:
    count = len(BATCHES[classes])
    batches = range(count) if train else [count]
    x, y = found
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    expected = torch.from_numpy(np.concatenate([pixels(batch) for batch in batches]))
    assert torch.equal(x, expected.to(torch.float32) / 255)
    assert y.tolist() == [label for batch in batches for label in labels(batch, classes)]


@every_form
@pytest.mark.parametrize("train", [True, False])
def test_a_folder_is_read_whether_it_or_its_parent_is_named(
    tmp_path: Path, classes: int, form: str, train: bool
) -> None:
    folder = make_folder(tmp_path, classes, form)
    for dir in (folder, tmp_path, str(tmp_path)):
        check(LOADERS[classes](dir, train=train), classes, train=train)


@every_form
@pytest.mark.parametrize("train", [True, False])
def test_an_archive_is_read_and_not_unpacked(tmp_path: Path, classes: int, form: str, train: bool) -> None:
    archive = make_archive(tmp_path, classes, form)
    before = sorted(tmp_path.rglob("*"))
    for dir in (archive, tmp_path):
        check(LOADERS[classes](dir, train=train), classes, train=train)
    assert sorted(tmp_path.rglob("*")) == before


@every_form
def test_a_folder_of_another_name_is_known_by_its_files(tmp_path: Path, classes: int, form: str) -> None:
    folder = make_folder(tmp_path, classes, form, name="images")
    check(LOADERS[classes](folder), classes, train=True)


def test_training_images_are_the_default(tmp_path: Path) -> None:
    make_folder(tmp_path, 10, "python")
    check(cifar10(tmp_path), 10, train=True)


def test_a_folder_comes_before_an_archive(tmp_path: Path) -> None:
    make_folder(tmp_path, 10, "binary")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half a download")
    check(cifar10(tmp_path), 10, train=True)


@pytest.mark.parametrize(
    ("classes", "mean", "std"),
    [
        (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_normalized_channels_are_shifted_and_scaled(
    tmp_path: Path, classes: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    make_folder(tmp_path, classes, "python")
    x, y = LOADERS[classes](tmp_path)
    z, same = LOADERS[classes](tmp_path, normalize=True)
    assert torch.equal(y, same)
    for channel in range(3):
        torch.testing.assert_close(z[:, channel] * std[channel] + mean[channel], x[:, channel])


def test_batches_with_text_keys_and_array_labels_are_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 10, "python")
    for batch, name in enumerate(BATCHES[10]):
        data = {"data": pixels(batch).reshape(4, 3072), "labels": np.array(labels(batch, 10), np.int32)}
        (folder / name).write_bytes(pickle.dumps(data))
    check(cifar10(folder), 10, train=True)


def test_an_empty_batch_among_others_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 10, "python")
    rewrite(folder, {b"data": np.zeros((0, 3072), np.uint8), b"labels": []})
    assert len(cifar10(folder)[0]) == 16


@every_form
def test_an_empty_place_is_told_what_to_get_and_where_to_put_it(
    tmp_path: Path, classes: int, form: str
) -> None:
    (tmp_path / FOLDERS[classes, form]).mkdir()
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError) as caught:
            LOADERS[classes](place)
        message = str(caught.value)
        assert message.startswith(f"dir: no CIFAR-{classes} in {place}; get cifar-{classes}-python.tar.gz")
        assert "https://www.cs.toronto.edu/~kriz/cifar.html" in message
        assert FOLDERS[classes, "python"] in message


def test_one_data_set_is_not_taken_for_the_other(tmp_path: Path) -> None:
    make_folder(tmp_path, 10, "python")
    make_archive(tmp_path, 10, "binary")
    with pytest.raises(FileNotFoundError, match="no CIFAR-100"):
        cifar100(tmp_path)


@pytest.mark.parametrize("form", ["python", "binary"])
def test_a_missing_batch_is_named(tmp_path: Path, form: str) -> None:
    folder = make_folder(tmp_path, 10, form)
    next(folder.glob("data_batch_3*")).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^dir: .*data_batch_3(\.bin)? is missing; replace .*https://"
    ):
        cifar10(tmp_path)
    check(cifar10(tmp_path, train=False), 10, train=False)


@pytest.mark.parametrize("form", ["python", "binary"])
def test_an_archive_without_a_batch_is_refused(tmp_path: Path, form: str) -> None:
    archive = make_archive(tmp_path, 10, form)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(next((tmp_path / "elsewhere").rglob("test_batch*")), "test_batch")
    with pytest.raises(ValueError, match=r"^dir: .*holds no data_batch_1"):
        cifar10(tmp_path)


@every_form
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, classes: int, form: str, keep: int) -> None:
    folder = make_folder(tmp_path, classes, form)
    path = next(folder.glob(BATCHES[classes][-1] + "*"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"^dir: {path}: its .*; replace .*https://"):
        LOADERS[classes](folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_archive_is_refused(tmp_path: Path, share: float) -> None:
    archive = make_archive(tmp_path, 100, "python")
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ValueError, match=r"^dir: .*; replace .*https://"):
        cifar100(tmp_path)


def test_a_flipped_bit_in_an_archive_is_refused(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, 100, "binary")
    raw = bytearray(archive.read_bytes())
    for place in range(60, len(raw), len(raw) // 40):
        raw[place] ^= 1
        archive.write_bytes(raw)
        with pytest.raises(ValueError, match="truncated or corrupt"):
            cifar100(tmp_path)
        raw[place] ^= 1


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    for raw in (b"<html>404</html>", gzip.compress(b"no tar at all" * 100)):
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(raw)
        with pytest.raises(ValueError, match="truncated or corrupt"):
            cifar10(tmp_path)


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    secret = make_folder(tmp_path / "private", 100, "binary") / "train.bin"
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-100-binary/train.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(link, io.BytesIO())
    with pytest.raises(ValueError, match=r"^dir: "):
        cifar100(tmp_path)


def rewrite(folder: Path, batch: object) -> Path:
    path = folder / "data_batch_2"
    path.write_bytes(pickle.dumps(batch))
    return path


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([1, 2], "it holds a list, not a dict"),
        ({b"labels": [0]}, "it has no 'data'"),
        ({b"data": np.zeros((1, 3072), np.uint8)}, "it has no 'labels'"),
        ({b"data": [[0] * 3072], b"labels": [0]}, r"must be uint8\[N, 3072\], got list"),
        ({b"data": np.zeros((1, 3072)), b"labels": [0]}, r"got float64\[1, 3072\]"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 0]}, r"got uint8\[2, 3071\]"),
        ({b"data": np.zeros((1, 3, 32, 32), np.uint8), b"labels": [0]}, r"got uint8\[1, 3, 32, 32\]"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, r"2 images and labels of shape \[1\]"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "from 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "from 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0.5]}, "from 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"cat"]}, "from 0 to 9"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": None}, "labels of shape"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [[0], [0, 1]]}, "inhomogeneous"),
    ],
)
def test_a_batch_of_another_form_is_refused(tmp_path: Path, batch: object, words: str) -> None:
    path = rewrite(make_folder(tmp_path, 10, "python"), batch)
    with pytest.raises(ValueError, match=f"^dir: {path}: .*{words}"):
        cifar10(tmp_path)


def test_a_label_beyond_the_classes_of_a_binary_file_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, 10, "binary")
    (folder / "data_batch_1.bin").write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(ValueError, match="from 0 to 9"):
        cifar10(tmp_path)


def test_no_image_at_all_is_refused(tmp_path: Path) -> None:
    empty = {b"data": np.zeros((0, 3072), np.uint8), b"fine_labels": []}
    (tmp_path / "train").write_bytes(pickle.dumps(empty))
    with pytest.raises(ValueError, match=r"^dir: .*no images"):
        cifar100(tmp_path)


class MakesFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_batch_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = rewrite(make_folder(tmp_path, 10, "python"), {b"data": MakesFile(tmp_path / "made")})
    with pytest.raises(ValueError, match=f"^dir: {path}: its pickle .*mkdir.*refused"):
        cifar10(tmp_path)
    assert not (tmp_path / "made").exists()
