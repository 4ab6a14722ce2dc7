"""Long work under faults: random signals, damaged files, full disks and threads, over everything that can be resumed.

    python benchmarks/soak.py --minutes 30

Each round takes a job (a solver, an estimator, a tracker, a command), runs it in a forked process with a checkpoint
that is saved at every assessment, and does something to it: signals at random times; a flipped bit or a cut in the file
that an interrupted run left; a disk that is full from a random product on; several jobs in threads at once. The answer
must have the bits of a run without faults, or the damage must be refused by its message. What is counted:

wrong   an answer with other bits, or an exit code that does not say what happened
lost    a run that does not come to an answer, a file that a signal deleted, a draft that stays

A signal may also come after its end: when the solve is done and its file deleted, and the answer is on its way.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _harness
import hvpkit as hk
from hvpkit._utils.checkpoints import digest
from hvpkit.cli import app
from hvpkit.solvers import checkpoint as solver_checkpoint
from hvpkit.train import SpectrumTracker

OUT = _harness.RESULTS / "soak.json"
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
CATCHABLE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
ENDED = "ended"
PAUSE = 0.001
REFUSALS = (
    "is damaged",
    "is not a checkpoint",
    "is not a file that SpectrumTracker wrote",
    "of another version",
)
UNTIMED = ("seconds", "num_matvecs", "history", "passes", "path", "problem")

TARGET = """
import os, resource, time, torch

calls, full_at = [], int(os.environ.get("SOAK_FULL_AT", "0"))
d = torch.linspace(-1, 3, 60, dtype=torch.float64)

def loss_fn(p, b):
    calls.append(1)
    if len(calls) == full_at:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    time.sleep(0.001)
    return (p**2 * d).sum(-1) / 2 + 0 * b.sum(-1)

def make():
    return loss_fn, torch.ones(60, dtype=torch.float64), torch.ones(3, 2)
"""

LAZY = ("torch._dynamo", "scipy.special", "matplotlib.pyplot", "PIL.PngImagePlugin", "hvpkit.plots")
"""Modules that jobs import at first use: here before any process is forked."""

Job = Callable[[Path], str]
"""Runs in a folder, from what is saved there, and returns a digest of its answer."""


@dataclass
class Disk:
    """A disk that is full from a product on; None: never."""

    full_at: int | None = None
    count: int = 0

    def product_made(self) -> None:
        self.count += 1
        if self.count == self.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


DISK = Disk()


def operator(n: int = 120) -> hk.LinearOperator:
    """Return a matrix with outliers, slow enough to be hit."""
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    d = torch.cat([torch.linspace(-1, 1, n - 3, dtype=torch.float64), torch.tensor([-5.0, 9.0, 20.0])])
    A = (Q * d) @ Q.mT

    def product(v: Tensor) -> Tensor:
        DISK.product_made()
        time.sleep(PAUSE)
        return A @ v

    return replace(hk.aslinearoperator(A), product=product)


def plain(value: Any) -> Any:
    """Return an answer without what a resumed run may change: seconds, matvecs and the history, which has both."""
    if isinstance(value, Tensor) or value is None or isinstance(value, bool | int | float | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in UNTIMED}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return plain(vars(value))


def solving(solve: Callable[..., Any], **options: Any) -> Job:
    """Return the job of a solver or estimator."""

    def job(folder: Path) -> str:
        return digest(plain(solve(operator(), checkpoint=folder / "work.pt", **options)))

    return job


def hessian(folder: Path) -> str:
    """Solve for both ends of a small network's Hessian, over batches that are kept between matvecs."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(90, 5, generator=g), torch.randint(3, (90,), generator=g)
    params = {"w": torch.randn(5, 8, generator=g), "v": torch.randn(8, 3, generator=g)}

    def loss_fn(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        DISK.product_made()
        return F.cross_entropy(torch.tanh(batch[0] @ p["w"]) @ p["v"], batch[1], reduction="none")

    H = hk.hessian(loss_fn, params, (x, y), batch_size=30, mode="reverse-over-reverse")
    found = hk.extreme_eigenvalues(H, tol=1e-2, method="lanczos", checkpoint=folder / "work.pt")
    return digest(plain({"values": [found.smallest.value, found.largest.value], "vectors": found.vectors}))


def tracking(folder: Path) -> str:
    """Track a small network through its training."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(60, 4, generator=g), torch.randint(3, (60,), generator=g)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    options = {"method": "lanczos", "mode": "reverse-over-reverse", "tol": 0.1}
    tracker = SpectrumTracker.for_module(F.cross_entropy, (x, y), path=folder / "work.pt", **options)
    known = dict(tracker.results)
    for step in range(4):
        if step not in known:
            DISK.product_made()
            tracker(model, step=step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    return digest(
        plain([[record[name] for name in ("step", "smallest", "largest")] for record in tracker.records])
    )


def command(name: str, *options: str) -> Job:
    """Return the job of a command."""

    def job(folder: Path) -> str:
        target = folder / "target.py"
        if not target.exists():
            target.write_text(TARGET)
        args = [name, f"{target}:make", "--json", "--mode", "reverse-over-reverse", *options]
        args += ["--checkpoint", str(folder / "work.pt"), "--out", str(folder / "out")]
        printed, messages = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(messages):
            code = run_command(args)
        if code >= 128:
            raise Ended(code, printed.getvalue())
        lines = printed.getvalue().splitlines()
        full = int(os.environ.get("SOAK_FULL_AT", "0"))
        if len(lines) != 1 or (code and not full):
            raise AssertionError(f"{name}: exit code {code}, {len(lines)} lines, {messages.getvalue()}")
        return digest(plain(json.loads(lines[0])))

    return job


class Ended(Exception):
    """An interrupted command: its exit code, and what it printed."""


def run_command(args: Sequence[str]) -> int:
    """Return the exit code of a command line."""
    try:
        app(list(args))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


JOBS: dict[str, Job] = {
    "lanczos": solving(hk.lanczos, k=2, which="BE", tol=1e-9),
    "lanczos, restarts": solving(hk.lanczos, k=2, which="BE", tol=1e-8, ncv=14),
    "lanczos, blocks": solving(hk.lanczos, k=2, which="SA", tol=1e-2, ncv=30, block_size=2),
    "hessian": hessian,
    "trace": solving(hk.trace, num_matvecs=90, block_size=4),
    "trace, hutchinson": solving(hk.trace, method="hutchinson", num_matvecs=60, block_size=2),
    "trace, xtrace": solving(hk.trace, method="xtrace", num_matvecs=80, tol=1e-9, block_size=4),
    "diagonal": solving(hk.diagonal, num_matvecs=60, block_size=2),
    "diagonal, xdiag": solving(hk.diagonal, method="xdiag", num_matvecs=80, block_size=4),
    "norm": solving(hk.frobenius_norm, num_matvecs=80, block_size=4),
    "density": solving(hk.spectral_density, num_steps=15, num_probes=5, block_size=2),
    "density, chebyshev": solving(
        hk.spectral_density, method="chebyshev", num_steps=20, num_probes=3, block_size=2
    ),
    "moments": solving(lambda op, **options: hk.moments(op, 6, **options), num_matvecs=60, block_size=2),
    "tracker": tracking,
    "hvpkit extremes": command("extremes", "--tol", "1e-3", "--method", "lanczos"),
    "hvpkit trace": command("trace", "--num-matvecs", "45"),
    "hvpkit density": command("density", "--num-steps", "8", "--num-probes", "3"),
    "hvpkit report": command("report", "--tol", "1e-2", "--method", "lanczos", "--num-steps", "8"),
}


@dataclass(frozen=True)
class End:
    """How a process ended: its exit code (negative: killed by that signal), and what it said."""

    code: int
    said: str


@dataclass
class Soak:
    """Counts of what was done and of what came of it."""

    random: random.Random
    expected: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def run(self, work: Callable[[], str], signal_name: str | None = None, after: float = 0.0) -> End:
        """Run in a forked process, which a signal hits after some seconds."""
        reading, writing = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, CATCHABLE)  # until the child has its handlers
        child = os.fork()
        if not child:
            os.close(reading)
            _in_child(work, writing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CATCHABLE)
        os.close(writing)
        if signal_name is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, getattr(signal, signal_name))
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read().decode()
        return End(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said)

    def learn(self) -> None:
        """Run every job without faults."""
        for name, job in JOBS.items():
            with tempfile.TemporaryDirectory() as folder:
                begin = time.perf_counter()
                end = self.run(lambda job=job, folder=folder: job(Path(folder)))
                self.seconds[name] = time.perf_counter() - begin
            if end.code:
                raise RuntimeError(f"{name} fails without faults: {end}")
            self.expected[name] = end.said

    def note(self, name: str, fault: str, outcome: str, detail: object = "") -> None:
        """Count a fault and what came of it."""
        self.faults[fault] += 1
        self.outcomes[outcome] += 1
        self.jobs[name] += 1
        if outcome in ("wrong", "lost"):
            self.failures.append(f"{outcome}: {name}, {fault}: {detail}"[:2000])

    def compare(self, name: str, end: End) -> str:
        """Return the outcome of a run that was left alone."""
        if end.code:
            return "lost"
        return "same bits" if end.said == self.expected[name] else "wrong"

    def signals(self, name: str, folder: Path) -> None:
        """Hit a job by up to five signals, and let it end."""
        for _ in range(self.random.randint(1, 5)):
            fault, after = self.random.choice(SIGNALS), self.random.uniform(0, 0.9) * self.seconds[name]
            had_file = any(folder.glob("work.pt*"))
            end = self.run(lambda: JOBS[name](folder), fault, after)
            if end.code == 0:
                self.note(name, f"{fault} too late", self.compare(name, end), end)
                return
            number = getattr(signal, fault)
            if end.code not in (-number, 128 + number):
                self.note(name, fault, "wrong", end)
                return
            outcome = "interrupted"
            if had_file and not any(folder.glob("work.pt*")):
                outcome = "after its end" if (folder / ENDED).exists() else "lost"
            self.note(name, fault, outcome, end)
        end = self.run(lambda: JOBS[name](folder))
        self.note(name, "resumed", self.compare(name, end), end)
        drafts = [path.name for path in folder.rglob("*.part")]
        if drafts:
            self.note(name, "resumed", "lost", f"drafts are left: {drafts}")

    def damage(self, name: str, folder: Path, fault: str) -> None:
        """Damage the file of an interrupted run, several times, and run each time."""
        for share in (0.5, 0.7, 0.3, 0.8):
            self.run(lambda: JOBS[name](folder), "SIGTERM", share * self.seconds[name])
            if any(folder.glob("work.pt*")):
                break
        else:
            return
        path = next(iter(sorted(folder.glob("work.pt*"))))
        whole = path.read_bytes()
        for _ in range(self.random.randint(5, 15)):
            damaged = bytearray(whole)
            if fault == "truncation":
                damaged = damaged[: self.random.randrange(len(whole))]
            else:
                for _ in range(self.random.choice((1, 1, 1, 8))):
                    bit = self.random.randrange(8 * len(whole))
                    damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with tempfile.TemporaryDirectory() as copy:
                for kept in folder.glob("*"):
                    if kept.is_file():
                        (Path(copy) / kept.name).write_bytes(kept.read_bytes())
                end = self.run(lambda: JOBS[name](Path(copy)))
            refused = end.code == 3 and any(words in end.said for words in REFUSALS)
            self.note(name, fault, "refused" if refused else self.compare(name, end), end)
        path.write_bytes(whole)
        end = self.run(lambda: JOBS[name](folder))
        self.note(name, "resumed", self.compare(name, end), end)

    def full_disk(self, name: str, folder: Path) -> None:
        """Let no file grow beyond 100 bytes from a random product on."""
        at = self.random.randint(1, 40)

        def work() -> str:
            DISK.full_at = at
            os.environ["SOAK_FULL_AT"] = str(at)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", hk.UnsavedWarning)
                return JOBS[name](folder)

        end = self.run(work)
        refused = end.code == 3 and "cannot be written" in end.said  # full before the first matvec
        self.note(name, "full disk", "refused" if refused else self.compare(name, end), end)
        self.clear(folder)
        end = self.run(lambda: JOBS[name](folder))
        self.note(name, "resumed", self.compare(name, end), end)

    @staticmethod
    def clear(folder: Path) -> None:
        """Delete the answer's files, but not what is saved."""
        for path in (folder / "out").glob("*"):
            path.unlink()

    def threads(self, names: Sequence[str], folder: Path) -> None:
        """Run several jobs in threads of one process, kill it, and run them again."""

        def work() -> str:
            found: dict[str, str] = {}
            first = threading.Lock()

            def one(number: int, name: str) -> None:
                # torch sets a new thread up at its first call, which is not safe beside another's
                with first:
                    torch.get_num_threads()
                place = folder / str(number)
                place.mkdir(exist_ok=True)
                found[str(number)] = JOBS[name](place)

            threads = [threading.Thread(target=one, args=pair) for pair in enumerate(names)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return json.dumps(found)

        longest = max(self.seconds[name] for name in names)
        killed = self.run(work, "SIGKILL", self.random.uniform(0.1, 1.2) * longest)
        end = killed if killed.code == 0 else self.run(work)
        found = json.loads(end.said) if end.code == 0 else {}
        for number, name in enumerate(names):
            same = found.get(str(number)) == self.expected[name]
            outcome = "same bits" if same else "wrong" if str(number) in found else "lost"
            self.note(name, "SIGKILL in threads", outcome, end)

    def round(self) -> None:
        """Do one thing to one job, or to some in threads."""
        name = self.random.choice(list(JOBS))
        kind = self.random.choice(("signals", "signals", "flip", "truncation", "full disk", "threads"))
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if kind == "signals":
                self.signals(name, folder)
            elif kind == "full disk":
                self.full_disk(name, folder)
            elif kind == "threads":
                in_threads = [
                    job for job in JOBS if not job.startswith("hvpkit")
                ]  # commands have the process's output
                self.threads(self.random.choices(in_threads, k=3), folder)
            else:
                self.damage(name, folder, kind)

    def record(self, seconds: float) -> dict[str, Any]:
        """Return the counts for JSON."""
        done = {name: count for name, count in self.faults.items() if name != "resumed"}
        return {
            "seconds": round(seconds),
            "num_faults": sum(done.values()),
            "faults": dict(sorted(done.items())),
            "outcomes": dict(sorted(self.outcomes.items())),
            "jobs": dict(sorted(self.jobs.items())),
            "wrong": self.outcomes["wrong"],
            "lost": self.outcomes["lost"],
            "failures": self.failures[:20],
        }


def _in_child(work: Callable[[], str], writing: int) -> None:
    """Run in the forked process and end it: 0 with the answer, 128 + a signal, or 3 with the error."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    code, said = 3, ""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CATCHABLE)
        said, code = work(), 0
    except Ended as ended:
        code, said = ended.args
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        said = traceback.format_exc()
    with contextlib.suppress(BaseException), os.fdopen(writing, "wb") as pipe:
        pipe.write(said.encode())
    os._exit(code)


def mark_ends() -> None:
    """Let a solve that deletes its file at the end leave a mark beside it."""
    clear = solver_checkpoint.Checkpoint.clear

    def marked(self: Any) -> None:
        (self.path.parent / ENDED).touch()
        clear(self)

    solver_checkpoint.Checkpoint.clear = marked  # type: ignore[method-assign]


def table(record: dict[str, Any]) -> str:
    """Return the counts as a table."""
    rows = [(name, f"{count:,}") for name, count in record["faults"].items()]
    rows += [
        ("all", f"{record['num_faults']:,}"),
        ("wrong", str(record["wrong"])),
        ("lost", str(record["lost"])),
    ]
    return _harness.markdown(("fault", "count"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak for some minutes; return 1 if anything was wrong or lost."""
    parser = _harness.parser(__doc__, out=OUT)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--rounds", type=int, help="instead of minutes: as many rounds, however long they take"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = _harness.parse(parser, argv)
    if not given.report:
        torch.set_num_threads(1)
        mark_ends()
        solver_checkpoint.SAVE_INTERVAL = solver_checkpoint.SAVE_COST_FACTOR = 0.0
        for module in LAZY:
            importlib.import_module(module)
        soak, begin = Soak(random.Random(given.seed)), time.perf_counter()
        soak.learn()
        header = {"machine": _harness.machine(), "seed": given.seed}
        for number in itertools.count():
            seconds = time.perf_counter() - begin
            if number == given.rounds or (given.rounds is None and seconds >= 60 * given.minutes):
                break
            soak.round()
            _harness.write(given.out, {**header, **soak.record(seconds)})
    record = _harness.read(given.out)
    print(table(record))
    for failure in record["failures"]:
        print(failure, file=sys.stderr)
    return 1 if record["wrong"] or record["lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
