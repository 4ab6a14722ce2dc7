"""The headline: both ends of ResNet-18's Hessian over all of CIFAR-10, to 1 %, along training.

    python benchmarks/headline.py --cifar10 FOLDER --cache DIR --out FILE --check

Trains 11,173,962 parameters on 50,000 images by SGD with momentum, on a GPU under bfloat16 autocast, and measures after
the epochs asked for: by :func:`hvpkit.extreme_eigenvalues`, in float32 unless ``--arithmetic`` says otherwise, over the
images as they are. The aim is 15 s for both ends on an H200. Seconds are those of a user who has a trained network: the
operator is made in them, its trial products with it. A product and a gradient are timed apart.

Without a GPU it is a narrow ResNet-18 on scikit-learn's digits, a minute on one core: it shows that the script runs.

Into FILE, as JSON and after each measurement: settings, the script's SHA-256 and the machine; of each epoch both ends
with their intervals, passes, seconds, and the most memory on the GPU. ``--check`` solves again by Lanczos alone, with a
tenth of the tolerance, native arithmetic and another seed, which takes about twice as long. The script fails, once
all is written, where the two differ by more than the tolerance or a solve has not converged. Into DIR: the training
after each of these epochs, from which another run goes on.

BatchNorm's running statistics are taken anew over all images before each measurement, as in the study of BatchNorm.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit._utils.files import atomic_write
from hvpkit.curvature.mode_selection import ARITHMETICS, check_arithmetic
from study_batchnorm_residual import Data, accuracy, read_data, save, train_epoch, with_statistics_of

TRAINING: dict[str, dict[str, Any]] = {
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
"""Examples at once for BatchNorm's statistics, which are means over such batches."""

REPEATS = 3
"""Of what is timed apart; the median counts."""


def trained(
    settings: dict[str, Any], data: Data, epochs: Sequence[int], cache: Path | None
) -> Iterator[tuple[int, nn.Module]]:
    """The network after each of these epochs, from what the cache has."""
    device = data[0].device
    model = hk.zoo.resnet18_cifar(width=settings["width"]).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), settings["lr"], momentum=0.9, weight_decay=settings["weight_decay"]
    )
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
            with atomic_write(files[epoch]) as draft:
                torch.save(state, draft)
        done = epoch
        yield epoch, model


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What the work gives, and how long it takes, the device's part with it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    found = work()
    wait()
    return found, time.perf_counter() - begin


def measure(model: nn.Module, data: Data, options: dict[str, Any], tol: float, check: bool) -> dict[str, Any]:
    """Both ends of a network in evaluation, and what they cost; ``options`` are of :func:`hvpkit.hessian`."""
    device = data[0].device
    objective, params = hk.from_module(model, F.cross_entropy)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    H, making = seconds(lambda: hk.hessian(objective, params, data, **options), device)
    ex, solving = seconds(lambda: hk.extreme_eigenvalues(H, tol=tol), device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    batches, v = H.origin.data, ex.largest.vector[:, None]

    def typical(work: Callable[[], Any]) -> float:
        return statistics.median(seconds(work, device)[1] for _ in range(REPEATS))

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


def checked(H: hk.LinearOperator, ex: hk.ExtremeResult, tol: float) -> dict[str, Any]:
    """Another solve, and by how much the first one is off, over what it may be."""
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


def shown(found: dict[str, Any]) -> str:
    ends, check = found["extremes"], found["check"]
    verdict = "" if check is None else f", {'right' if check['right'] else 'WRONG'} by another solve"
    return (
        f"epoch {found['epoch']}: loss {found['loss']:.3f}, {ends['smallest']['value']:.4g} and "
        f"{ends['largest']['value']:.4g} in {found['seconds']:.1f} s, {found['passes']:.1f} passes, "
        f"{ends['status']}{verdict}"
    )


def machine(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "hvpkit": hk.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
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


def read_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any], Data]:
    """The arguments, the settings of training, and the data on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--size", choices=TRAINING, help="full on a GPU, small elsewhere")
    add("--cifar10", type=Path, help="the folder; the small size does without")
    add("--device", default="cuda" if gpu else "cpu", help="%(default)s here")
    add("--epochs", type=count, nargs="+", default=[1, 5, 15], help="after which to measure")
    add("--examples", type=count, help="the first of the images; full 50,000, small 1,500")
    add("--batch-size", type=count_or_auto, default=1000, help="examples at once in a product, or auto")
    add("--mode", default="auto", help="of products, as hvpkit.hessian has it")
    add("--arithmetic", choices=ARITHMETICS, default="native", help="of products")
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
        train, _ = read_data(given.cifar10, settings, torch.device(given.device))
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
        "machine": machine(data[0].device),
        "measured": (measured := []),
    }
    for epoch, model in trained(settings, data, sorted({*given.epochs}), given.cache):
        frozen = with_statistics_of(model, data[0], STATISTICS_BATCH)
        measured.append({"epoch": epoch, **measure(frozen, data, options, given.tol, given.check)})
        print(shown(measured[-1]), flush=True)
        if given.out:
            save(given.out, record)
    wrong = [
        str(found["epoch"])
        for found in measured
        if not found["extremes"]["converged"] or (found["check"] and not found["check"]["right"])
    ]
    if wrong:
        raise SystemExit(f"not to {given.tol:g} after epoch {', '.join(wrong)}")


if __name__ == "__main__":
    main()
