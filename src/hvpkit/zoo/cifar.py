"""CIFAR-10 and CIFAR-100, read from the folders and archives in which they are published.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvpkit._utils.validation import check_path
from hvpkit.zoo.pickles import load_plain

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class Distribution:
    """A published form of a data set: the archive, the folder it unpacks to, and the files there."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    parse: Callable[[bytes], tuple[Any, Any]]


@dataclass(frozen=True)
class DataSet:
    """A data set, with the channels' means and standard deviations over its training images."""

    name: str
    num_classes: int
    forms: tuple[Distribution, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def cifar10(
    dir: str | os.PathLike[str], *, train: bool = True, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 from a folder: 50,000 training images or 10,000 test images in 10 classes.

    Reads the folder ``cifar-10-batches-py`` or ``cifar-10-batches-bin``, or the archive ``cifar-10-python.tar.gz`` or
    ``cifar-10-binary.tar.gz`` without unpacking it, the first of these that exists. Nothing is downloaded. Batches
    may have fewer images. Pickles are read by :func:`~hvpkit.zoo.pickles.load_plain`, which runs no code in them.

    Args:
        dir: the folder of batches, the archive, or the folder that holds either.
        train: read the training images; if False, the test images.
        normalize: subtract (0.4914, 0.4822, 0.4465) from the channels and divide them by
            (0.2470, 0.2435, 0.2616), their mean and standard deviation over the training images.

    Returns:
        Images ``[N, 3, 32, 32]``, float32, in [0, 1] unless normalised, and their classes ``[N]``, int64.

    Raises:
        FileNotFoundError: ``dir`` has none of these, or a folder without one of the batches.
        ValueError: a file is truncated or corrupt, holds something else, or is a pickle that asks for code.

    Cost:
        614 MB of memory for the training images, and 450 MB more while reading.

    Source:
        https://www.cs.toronto.edu/~kriz/cifar.html

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as dir:
        ...     blank = bytes([7]) + bytes(3072)  # class 7, black
        ...     _ = pathlib.Path(dir, "test_batch.bin").write_bytes(2 * blank)
        ...     x, y = cifar10(dir, train=False)
        >>> x.shape, y
        (torch.Size([2, 3, 32, 32]), tensor([7, 7]))
    """
    return _load(CIFAR10, check_path("dir", dir), train, normalize)


def cifar100(
    dir: str | os.PathLike[str], *, train: bool = True, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Read CIFAR-100 from a folder: 50,000 training images or 10,000 test images in 100 (fine) classes.

    Reads ``cifar-100-python`` or ``cifar-100-binary``, or the archive ``cifar-100-python.tar.gz`` or
    ``cifar-100-binary.tar.gz``, as :func:`cifar10` reads its own.

    Args:
        dir: the folder with ``train`` and ``test``, the archive, or the folder that holds either.
        train: read the training images; if False, the test images.
        normalize: subtract (0.5071, 0.4865, 0.4409) from the channels and divide them by
            (0.2673, 0.2564, 0.2762), their mean and standard deviation over the training images.

    Returns:
        As :func:`cifar10`.

    Raises:
        FileNotFoundError: as :func:`cifar10`.
        ValueError: as :func:`cifar10`.

    Cost:
        As :func:`cifar10`.

    Source:
        https://www.cs.toronto.edu/~kriz/cifar.html

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as dir:
        ...     blank = bytes([4, 72]) + bytes(3072)  # coarse class 4, fine class 72, black
        ...     _ = pathlib.Path(dir, "test.bin").write_bytes(blank)
        ...     x, y = cifar100(dir, train=False)
        >>> x.shape, y
        (torch.Size([1, 3, 32, 32]), tensor([72]))
    """
    return _load(CIFAR100, check_path("dir", dir), train, normalize)


def _load(data_set: DataSet, place: Path, train: bool, normalize: bool) -> tuple[Tensor, Tensor]:
    form, files = _read(data_set, place, train)
    rows, classes = [], []
    for path, raw in files.items():
        try:
            images, labels = form.parse(raw)
            rows.append(_checked_rows(images))
            classes.append(_checked_classes(labels, len(images), data_set.num_classes))
        except ValueError as error:
            raise ValueError(f"dir: {path}: {error}; {_remedy(form, path.parent)}") from error
    if not sum(map(len, rows)):
        raise ValueError(f"dir: {path.parent} holds no images; {_remedy(form, path.parent)}")
    x = torch.from_numpy(np.concatenate(rows)).view(-1, 3, 32, 32).to(torch.float32).div_(255)
    if normalize:
        mean, std = torch.tensor([data_set.mean, data_set.std]).view(2, 3, 1, 1)
        x.sub_(mean).div_(std)
    return x, torch.from_numpy(np.concatenate(classes))


def _read(data_set: DataSet, place: Path, train: bool) -> tuple[Distribution, dict[Path, bytes]]:
    """Find the distribution that exists, and read its files."""
    for form in data_set.forms:
        for folder in (place, place / form.folder):
            if any((folder / name).is_file() for name in (*form.train, *form.test)):
                return form, _read_folder(form, folder, train)
    for form in data_set.forms:
        archive = place if place.name == form.archive else place / form.archive
        if archive.is_file():
            return form, _read_archive(form, archive, train)
    form = data_set.forms[0]
    raise FileNotFoundError(
        f"dir: no {data_set.name} in {place.absolute()}; get {form.archive} from {PAGE} and put it there, or the "
        f"folder {form.folder} that it unpacks to"
    )


def _read_folder(form: Distribution, folder: Path, train: bool) -> dict[Path, bytes]:
    paths = [folder / name for name in (form.train if train else form.test)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"dir: {path} is missing; {_remedy(form, folder)}")
    return {path: path.read_bytes() for path in paths}


def _read_archive(form: Distribution, archive: Path, train: bool) -> dict[Path, bytes]:
    wanted = form.train if train else form.test
    found: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    file, name = tar.extractfile(member), PurePosixPath(member.name).name
                    if file and name in wanted:
                        found[name] = file.read()
            while stream.read(2**20):  # so that the checksum at its end is verified
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"dir: {archive} is truncated or corrupt ({error}); {_remedy(form, archive)}"
        ) from error
    for name in wanted:
        if name not in found:
            raise ValueError(f"dir: {archive} holds no {name}; {_remedy(form, archive)}")
    return {archive / name: found[name] for name in wanted}


def _remedy(form: Distribution, broken: Path) -> str:
    return f"replace {broken.absolute()} by a fresh copy, from {form.archive} at {PAGE}"


def _parse_pickle(raw: bytes, *, label_key: str) -> tuple[Any, Any]:
    batch = load_plain(raw)
    if not isinstance(batch, dict):
        raise ValueError(f"it holds a {type(batch).__name__}, not a dict")
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    for key in ("data", label_key):
        if key not in batch:
            raise ValueError(f"it has no {key!r}")
    return batch["data"], batch[label_key]


def _parse_binary(raw: bytes, *, num_labels: int) -> tuple[Any, Any]:
    size = num_labels + 3072
    if not raw or len(raw) % size:
        raise ValueError(f"its {len(raw)} bytes are not a multiple of the {size} of an image")
    records = np.frombuffer(raw, np.uint8).reshape(-1, size)
    return records[:, num_labels:], records[:, num_labels - 1]  # the finest label comes last


def _checked_rows(images: object) -> NDArray[np.uint8]:
    """Return images ``[N, 3072]``: red, green, blue, each row by row."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,):
        kind = f"{images.dtype}{[*images.shape]}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"its images must be uint8[N, 3072], got {kind}")
    return images


def _checked_classes(labels: object, num_images: int, num_classes: int) -> NDArray[np.int64]:
    classes = np.asarray(labels)
    if classes.shape != (num_images,):
        raise ValueError(f"it has {num_images} images and labels of shape {list(classes.shape)}")
    if num_images and (classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() >= num_classes):
        raise ValueError(f"its labels must be whole numbers from 0 to {num_classes - 1}")
    return classes.astype(np.int64)


CIFAR10 = DataSet(
    "CIFAR-10",
    10,
    (
        Distribution(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            tuple(f"data_batch_{k}" for k in range(1, 6)),
            ("test_batch",),
            partial(_parse_pickle, label_key="labels"),
        ),
        Distribution(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
            ("test_batch.bin",),
            partial(_parse_binary, num_labels=1),
        ),
    ),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = DataSet(
    "CIFAR-100",
    100,
    (
        Distribution(
            "cifar-100-python.tar.gz",
            "cifar-100-python",
            ("train",),
            ("test",),
            partial(_parse_pickle, label_key="fine_labels"),
        ),
        Distribution(
            "cifar-100-binary.tar.gz",
            "cifar-100-binary",
            ("train.bin",),
            ("test.bin",),
            partial(_parse_binary, num_labels=2),
        ),
    ),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)
