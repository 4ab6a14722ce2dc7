"""All that only a GPU shows, in one run of at most nine minutes; rehearsed without one at a tenth of the size and less.

    python benchmarks/on_gpu.py [--cifar10 FOLDER] [--minutes 9] [--parts NAME ...] [--small]

Needs torch, NumPy, SciPy and the folder of CIFAR-10 (random images without it); pytest for the tests. The parts, in the
order of their worth:

- tests: those that are marked ``gpu``, by pytest.
- headline: both ends of ResNet-18's Hessian over 50,000 images to 1 %, at three states of a short training.
- matvecs: seconds of a matvec over those of a gradient, and the peak memory of a matvec, of ResNet-18 and of a GPT-2 of
  124 million parameters: eager, compiled, channels last, TF32, bfloat16. Accuracy comes first: the distance of each
  from the eager matvec.
- synchronisation: whether a step of Lanczos waits for the device, by torch's own check, and what a profile of it says.

Each part is written to ``--out`` as it ends, and one that fails is written with its error, so that a run that is cut
leaves what it has. ``--small`` is the rehearsal, which runs on a CPU in a minute. Writes
``benchmarks/results/on_gpu.json``.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _harness as harness
import hvpkit as hk
from _harness import Record, timed
from _training import Data, recompute_batchnorm, sgd, train_pass
from hvpkit.solvers import krylov

ROOT = Path(__file__).parents[1]
REPEATS = 5
"""Matvecs that are timed, after one that is not."""

STEPS = (0, 40, 200)
"""Steps of training before each measurement of the headline."""


@dataclass(frozen=True)
class Sizes:
    """Of the networks and data."""

    images: int
    width: int
    image_batch: int
    tokens: int
    sequences: int
    gpt: Record
    tol: float


FULL = Sizes(
    images=50_000,
    width=64,
    image_batch=500,
    tokens=1024,
    sequences=8,
    gpt={"vocab_size": 50_257, "context": 1024, "width": 768, "num_layers": 12, "num_heads": 12},
    tol=1e-2,
)
SMALL = Sizes(
    images=200,
    width=2,
    image_batch=50,
    tokens=16,
    sequences=4,
    gpt={"vocab_size": 64, "context": 16, "width": 16, "num_layers": 2, "num_heads": 2},
    tol=5e-2,
)


@dataclass(frozen=True)
class Setting:
    """What a run works with."""

    device: torch.device
    sizes: Sizes
    cifar10: Path | None
    end: float

    @property
    def seconds_left(self) -> float:
        return self.end - time.perf_counter()


def images(setting: Setting) -> Data:
    """Return CIFAR-10, or random images in random classes."""
    count = setting.sizes.images
    if setting.cifar10 is not None:
        x, y = hk.zoo.cifar10(setting.cifar10, normalize=True)
        x, y = x[:count], y[:count]
    else:
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(count, 3, 32, 32, generator=g), torch.randint(10, (count,), generator=g)
    return x.to(setting.device), y.to(setting.device)


def run_tests(setting: Setting) -> Record:
    """Run the tests that are marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, setting.seconds_left), check=False
    )
    return {"exit_code": done.returncode, "last_lines": done.stdout.splitlines()[-15:]}


def headline(setting: Setting) -> Record:
    """Measure both ends at each state of a short training."""
    data, model = images(setting), hk.zoo.resnet18_cifar(width=setting.sizes.width, seed=0)
    model = model.to(setting.device)
    steps, states = training(model, data), []
    for before, number in itertools.pairwise((0, *STEPS)):
        for _ in itertools.islice(steps, number - before):
            pass
        trained = recompute_batchnorm(model, data[0], setting.sizes.image_batch)
        states.append({"steps": number, **both_ends(setting, trained, data)})
    return {"tol": setting.sizes.tol, "cifar10": setting.cifar10 is not None, "states": states}


def training(model: nn.Module, data: Data) -> Iterator[object]:
    """Train by SGD with momentum, pass after pass; yield after each step."""
    optimizer = sgd(model, {"lr": 0.05, "weight_decay": 5e-4})
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from train_pass(model, data, optimizer, generator, batch_size=128)


def both_ends(setting: Setting, model: nn.Module, data: Data) -> Record:
    """Measure both ends of a network's Hessian."""
    objective, params = hk.from_module(model, F.cross_entropy)
    size, limit = setting.sizes.image_batch, max(1.0, setting.seconds_left)
    with peak_memory(setting.device) as peak:
        H, making = timed(lambda: hk.hessian(objective, params, data, batch_size=size), setting.device)
        ex, solving = timed(
            lambda: hk.extreme_eigenvalues(H, tol=setting.sizes.tol, time_limit=limit), setting.device
        )
    return {
        "n": H.n,
        "examples": H.num_examples,
        "mode": H.mode,
        "seconds": making + solving,
        "seconds_of_making_the_operator": making,
        "passes": ex.num_matvecs,
        "peak_device_bytes": peak[0],
        "extremes": ex.to_dict(),
    }


def matvecs(setting: Setting) -> Record:
    """Time a matvec of each network in each arithmetic and layout."""
    return {name: _variants(setting, *made(setting)) for name, made in NETWORKS.items()}


def resnet18(setting: Setting) -> tuple[nn.Module, Data, int]:
    """Return ResNet-18, two batches of images, and their size."""
    x, y = images(setting)
    size = min(setting.sizes.image_batch, len(x) // 2)
    model = hk.zoo.resnet18_cifar(width=setting.sizes.width, seed=0).to(setting.device).eval()
    return model, (x[: 2 * size], y[: 2 * size]), size


def gpt2(setting: Setting) -> tuple[nn.Module, Data, int]:
    """Return a GPT-2, sequences of random tokens, and the size of a batch."""
    sizes, g = setting.sizes, torch.Generator().manual_seed(0)
    tokens = torch.randint(sizes.gpt["vocab_size"], (sizes.sequences, sizes.tokens + 1), generator=g)
    tokens = tokens.to(setting.device)
    size = max(1, sizes.sequences // 4)
    return (
        hk.zoo.tiny_gpt(**sizes.gpt, seed=0).to(setting.device).eval(),
        (tokens[:, :-1], tokens[:, 1:]),
        size,
    )


NETWORKS: dict[str, Callable[[Setting], tuple[nn.Module, Data, int]]] = {
    "ResNet-18": resnet18,
    "GPT-2": gpt2,
}

VARIANTS: dict[str, Record] = {
    "eager": {},
    "compiled": {"compile": True},
    "channels last": {},
    "tf32": {"arithmetic": "tf32"},
    "bf16": {"arithmetic": "bf16"},
}


def of_tokens(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of each sequence's tokens, or of images their loss."""
    losses = F.cross_entropy(scores.movedim(-1, 1) if scores.ndim == 3 else scores, targets, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def _variants(setting: Setting, model: nn.Module, data: Data, size: int) -> Record:
    found: Record = {}
    expected: Tensor | None = None
    for name, options in VARIANTS.items():
        if (name == "tf32" and setting.device.type != "cuda") or (
            name == "channels last" and data[0].ndim != 4
        ):
            continue
        try:
            found[name], image = _timed_variant(setting, model, data, size, name, options)
        except Exception as error:  # of torch's compilers, of memory: the others go on
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            continue
        expected = image if expected is None else expected
        found[name]["distance"] = float((image - expected).norm() / expected.norm())
    return found


def _timed_variant(
    setting: Setting, model: nn.Module, data: Data, size: int, name: str, options: Record
) -> tuple[Record, Tensor]:
    x, y = data
    if name == "channels last":
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    objective, params = hk.from_module(model, of_tokens)
    examples = hk.as_data((x, y), batch_size=size)
    H, making = timed(
        lambda: hk.hessian(objective, params, examples, memory_limit=0, **options), setting.device
    )
    v = torch.sin(torch.arange(H.n, device=setting.device, dtype=H.dtype))[:, None]
    image = H.product(v)
    with peak_memory(setting.device) as peak:
        seconds = statistics.median(timed(lambda: H.product(v), setting.device)[1] for _ in range(REPEATS))
    gradient = statistics.median(
        timed(lambda: hk.grad(objective, params, examples), setting.device)[1] for _ in range(REPEATS)
    )
    return {
        "n": H.n,
        "mode": H.mode,
        "seconds_of_making_the_operator": making,
        "seconds": seconds,
        "seconds_of_a_gradient": gradient,
        "matvec_over_gradient": seconds / gradient,
        "peak_device_bytes": peak[0],
    }, image[:, 0]


def synchronisation(setting: Setting) -> Record:
    """Step a Lanczos basis under torch's check of synchronisation, and profile a step."""
    model, data, size = resnet18(setting)
    objective, params = hk.from_module(model, F.cross_entropy)
    H = hk.hessian(objective, params, hk.as_data(data, batch_size=size), mode="reverse-over-reverse")
    with torch.no_grad():
        state = krylov.start(H, 12, 1, seed=0)
        for _ in range(3):  # graphs are kept, and memory is there
            state = krylov.step(H, state)
        waits = None
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                state, waits = krylov.step(H, state), False
            except RuntimeError as error:
                waits = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile() as profile:
            state = krylov.step(H, state)
            float(state.norm)
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    waiting = sum(
        event.count for event in events if "ynchronize" in event.key or "_local_scalar" in event.key
    )
    return {
        "step_waits": waits,
        "waits_in_profile": waiting,
        "longest": [[event.key, event.count, event.self_cpu_time_total] for event in events[:10]],
    }


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """Note the peak of the device's memory inside ``with``; None on a CPU."""
    peak: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device)


PARTS: dict[str, Callable[[Setting], Record]] = {
    "tests": run_tests,
    "headline": headline,
    "matvecs": matvecs,
    "synchronisation": synchronisation,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.parser(__doc__, out=harness.RESULTS / "on_gpu.json")
    harness.add_names(parser, "--parts", PARTS)
    parser.add_argument("--cifar10", type=Path, help="the folder that holds cifar-10-batches-py")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after this time")
    parser.add_argument("--small", action="store_true", help="the rehearsal")
    given = harness.parse(parser, argv)
    if given.report:
        print(report(harness.read(given.out)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = time.perf_counter() + 60 * given.minutes
    setting = Setting(device, SMALL if given.small else FULL, given.cifar10, end)
    name = torch.cuda.get_device_name() if device.type == "cuda" else None
    record: Record = {"machine": harness.machine(device=name), "small": given.small, "parts": {}}
    if given.resume and given.out.exists():
        record["parts"] = harness.read(given.out)["parts"]
    for part in harness.pending(given, given.parts, record["parts"]):
        if setting.seconds_left <= 0:
            print(f"{part}: no time left", flush=True)
            continue
        begin = time.perf_counter()
        try:
            found = PARTS[part](setting)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        record["parts"][part] = {**found, "seconds_of_the_part": time.perf_counter() - begin}
        harness.write(given.out, record)
        print(f"{part}: {record['parts'][part]['seconds_of_the_part']:.1f} s", flush=True)
    print(report(record))


def report(record: Record) -> str:
    """Return the headline and the matvecs as Markdown."""
    parts = record["parts"]
    states = [
        [
            f"{state['steps']}",
            *(f"{state['extremes'][end]['value']:.5g}" for end in ("smallest", "largest")),
            f"{state['passes']:g}",
            f"{state['seconds']:.1f}",
            state["extremes"]["status"],
        ]
        for state in parts.get("headline", {}).get("states", [])
    ]
    rows = [
        [
            network,
            variant,
            f"{one['seconds']:.4g}",
            f"{one['matvec_over_gradient']:.2f}",
            f"{one['distance']:.0e}",
            "-" if one["peak_device_bytes"] is None else f"{one['peak_device_bytes'] / 2**30:.2f}",
        ]
        for network in NETWORKS
        for variant, one in parts.get("matvecs", {}).get(network, {}).items()
        if "error" not in one
    ]
    head = ["network", "variant", "seconds of a matvec", "over a gradient", "distance", "peak GiB"]
    ends = ["steps", "smallest", "largest", "passes", "seconds", "status"]
    return "\n\n".join([harness.markdown(ends, states), harness.markdown(head, rows)])


if __name__ == "__main__":
    main()
