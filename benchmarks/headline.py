"""The headline: both ends of ResNet-18's Hessian over all of CIFAR-10, to 1 %, along training.

    python benchmarks/headline.py --cifar10 FOLDER --cache DIR --out FILE --check

Trains 11,173,962 parameters on 50,000 images by SGD with momentum, on a GPU under bfloat16 autocast, and measures after
the given epochs: by :func:`hvpkit.extreme_eigenvalues`, in float32 unless ``--arithmetic`` is given, over the images
without augmentation. The aim is 15 s for both ends on an H200. Seconds are those of a user who has a trained network:
they include making the operator, with its trial matvecs. A matvec and a gradient are timed separately.

Without a GPU it is a narrow ResNet-18 on scikit-learn's digits, a minute on one core: it shows that the script runs.

Writes FILE, as JSON and after each measurement: settings, the script's SHA-256 and the machine; for each epoch both
ends with their intervals, passes, seconds, and the peak memory on the GPU. ``--check`` solves again by Lanczos alone,
with a tenth of the tolerance, native arithmetic and another seed, which takes about twice as long. After all is
written, the script fails where the two differ by more than the tolerance or a solve has not converged. Writes into DIR
the training after each of these epochs, from which another run continues.

BatchNorm's running statistics are computed again over all images before each measurement, as in the study of BatchNorm.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from _harness import Record, machine, save, timed, write
from _training import Data, accuracy, read_images, recompute_batchnorm, sgd, train_epoch
from hvpkit.curvature.mode_selection import ARITHMETICS, check_arithmetic

TRAINING: dict[str, Record] = {
    "full": {
        "width": 64,
        "pixels": 32,
        "examples": 50_000,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "batch_size": 128,
        "augment": 1,
    },
    "small": {
        "width": 2,
        "pixels": 8,
        "examples": 1500,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "batch_size": 50,
        "augment": 0,
    },
}
STATISTICS_BATCH = 1000
"""Examples in each of the batches over which BatchNorm's statistics are means."""

REPEATS = 3
"""Timings of a matvec and of a gradient, of which the median is reported."""


def trained(
    settings: Record, data: Data, epochs: Sequence[int], cache: Path | None
) -> Iterator[tuple[int, nn.Module]]:
    """Yield the network after each of these epochs; continue from the latest one in the cache."""
    device = data[0].device
    model = hk.zoo.resnet18_cifar(width=settings["width"]).to(device)
    optimizer = sgd(model, settings)
    done = 0
    for epoch in epochs:
        files = {number: cache / f"epoch-{number}.pt" for number in range(done + 1, epoch + 1) if cache}
        for number, file in reversed(files.items()):
            if file.exists():
                found = torch.load(file, map_location=device, weights_only=True)
                if found["settings"] != settings:
                    raise SystemExit(f"--cache: {file} is of another training; take another folder")
                model.load_state_dict(found["model"])
                optimizer.load_state_dict(found["optimizer"])
                done = number
                break
        for number in range(done, epoch):
            # without the cache of converted weights, which would outlive the step that changes them
            with torch.autocast(device.type, torch.bfloat16, enabled=data[0].is_cuda, cache_enabled=False):
                train_epoch(model, data, optimizer, settings, number)
        if cache and done < epoch:
            state = {"settings": settings, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(files[epoch], state)
        done = epoch
        yield epoch, model


def measure(model: nn.Module, data: Data, options: Record, tol: float, check: bool) -> Record:
    """Return both ends of a network in evaluation mode, and their cost; `options` of :func:`hvpkit.hessian`."""
    device = data[0].device
    objective, params = hk.from_module(model, F.cross_entropy)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    H, making = timed(lambda: hk.hessian(objective, params, data, **options), device)
    ex, solving = timed(lambda: hk.extreme_eigenvalues(H, tol=tol), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    batches, v = H.origin.data, ex.largest.vector[:, None]

    def typical(work: Callable[[], Any]) -> float:
        return statistics.median(timed(work, device)[1] for _ in range(REPEATS))

    return {
        "loss": float(hk.loss(objective, params, batches)),
        "accuracy": accuracy(model, data),
        "seconds": making + solving,
        "seconds_of_making_the_operator": making,
        "passes": ex.num_matvecs,
        "extremes": ex.to_dict(),
        "seconds_of_a_product": typical(lambda: H.product(v)),
        "seconds_of_a_gradient": typical(lambda: hk.grad(objective, params, batches)),
        "peak_device_bytes": peak,
        "batch_size": H.batch_size,
        "mode": H.mode,
        "mode_reason": H.mode_reason,
        "precision": H.precision,
        "check": checked(hk.hessian(objective, params, batches), ex, tol) if check else None,
    }


def checked(H: hk.LinearOperator, ex: hk.ExtremeResult, tol: float) -> Record:
    """Solve again, and return the errors of the first solve in units of the tolerance."""
    again = hk.extreme_eigenvalues(H, method="lanczos", tol=tol / 10, seed=1)
    errors = {
        end: abs(pair.value - exact.value) / max(tol * abs(exact.value), exact.error_bound)
        for end, pair, exact in (
            ("smallest", ex.smallest, again.smallest),
            ("largest", ex.largest, again.largest),
        )
    }
    right = again.converged and max(errors.values()) <= 1
    return {"right": right, "errors_over_tol": errors, "extremes": again.to_dict()}


def shown(found: Record) -> str:
    """Return a line on a measurement."""
    ends, check = found["extremes"], found["check"]
    verdict = "" if check is None else f", {'right' if check['right'] else 'WRONG'} by another solve"
    return (
        f"epoch {found['epoch']}: loss {found['loss']:.3f}, {ends['smallest']['value']:.4g} and "
        f"{ends['largest']['value']:.4g} in {found['seconds']:.1f} s, {found['passes']:.1f} passes, "
        f"{ends['status']}{verdict}"
    )


def gpu(device: torch.device) -> Record:
    """Return the GPU and the versions of its libraries."""
    if device.type != "cuda":
        return {}
    return {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def count_or_auto(text: str) -> int | str:
    return text if text == "auto" else count(text)


def share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {value}")
    return value


def read_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Record, Data]:
    """Return the arguments, the settings of training, and the data on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--size", choices=TRAINING, help="full on a GPU, small elsewhere")
    add("--cifar10", type=Path, help="the folder; the small size does without")
    add("--device", default="cuda" if gpu else "cpu", help="%(default)s here")
    add("--epochs", type=count, nargs="+", default=[1, 5, 15], help="after which to measure")
    add("--examples", type=count, help="the first of the images; default 50,000, or 1,500 for small")
    add("--batch-size", type=count_or_auto, default=1000, help="examples at once in a matvec, or auto")
    add("--mode", default="auto", help="mode of hvpkit.hessian")
    add("--arithmetic", choices=ARITHMETICS, default="native", help="arithmetic of hvpkit.hessian")
    add("--tol", type=share, default=1e-2, help="relative error of both ends")
    add("--out", type=Path, help="a file of JSON")
    add("--cache", type=Path, help="a folder to keep the training in")
    add("--check", action="store_true", help="solve again, by another method")
    given = parser.parse_args(argv)
    try:
        check_arithmetic(given.arithmetic, torch.empty(0, device=given.device))
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(f"--device {given.device}: {error}")
    given.size = given.size or ("full" if given.device.startswith("cuda") else "small")
    if given.size == "full" and not given.cifar10:
        parser.error("--cifar10: the full size needs the folder of CIFAR-10; or take --size small")
    for name, folder in (("--out", given.out and given.out.parent), ("--cache", given.cache)):
        if folder and not folder.is_dir():
            parser.error(f"{name}: there is no folder {folder}; make it first")
    settings = TRAINING[given.size] | {"data": "CIFAR-10" if given.cifar10 else "digits"}
    settings["examples"] = given.examples or settings["examples"]
    try:
        train, _ = read_images(given.cifar10, settings, torch.device(given.device))
    except (OSError, ValueError) as error:
        parser.error(f"--cifar10: {error}")
    return given, settings, train


def main(argv: Sequence[str] | None = None) -> None:
    given, settings, data = read_arguments(argv)
    options = {"batch_size": given.batch_size, "mode": given.mode, "arithmetic": given.arithmetic}
    record = {
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "size": given.size,
        "tol": given.tol,
        "training": settings,
        "product": options,
        "machine": machine(**gpu(data[0].device)),
        "measured": (measured := []),
    }
    for epoch, model in trained(settings, data, sorted({*given.epochs}), given.cache):
        frozen = recompute_batchnorm(model, data[0], STATISTICS_BATCH)
        measured.append({"epoch": epoch, **measure(frozen, data, options, given.tol, given.check)})
        print(shown(measured[-1]), flush=True)
        if given.out:
            write(given.out, record)
    wrong = [
        str(found["epoch"])
        for found in measured
        if not found["extremes"]["converged"] or (found["check"] and not found["check"]["right"])
    ]
    if wrong:
        raise SystemExit(f"not to {given.tol:g} after epoch {', '.join(wrong)}")


if __name__ == "__main__":
    main()
