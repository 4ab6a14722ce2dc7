from __future__ import annotations

import copy
import csv
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hvpkit as hk
from hvpkit.train import SpectrumTracker
from hvpkit.train.tensorboard import scalars
from hvpkit.zoo import mlp

lightning = pytest.importorskip("lightning.pytorch")
SpectrumCallback = importlib.import_module("hvpkit.train.lightning").SpectrumCallback
MODE = "reverse-over-reverse"  # "auto" is measured, and two runs could differ in their last bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Net(lightning.LightningModule):
    """Dropout draws from the global generator, BatchNorm keeps statistics: both would show a trace."""

    def __init__(self) -> None:
        super().__init__()
        body = mlp(in_features=4, hidden=[6], num_classes=3)
        self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2), body)
        self.states: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert all(module.training for module in self.modules())
        self.states.append(self.weights())
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True)
        return loss

    def weights(self) -> torch.Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in self.state_dict().values()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Log(lightning.loggers.logger.Logger):
    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *_: object) -> None: ...

    def steps(self, name: str) -> list[int]:
        return [step for step, metrics in self.lines if name in metrics]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g)


def tracker(**options: object) -> SpectrumTracker:
    return SpectrumTracker.for_module(F.cross_entropy, data(), mode=MODE, **options)


def fit(
    *callbacks: object, model: Net | None = None, epochs: int = 3, ckpt: str | None = None, **options: object
) -> tuple[Net, Log, object]:
    log, model = Log(), model or Net()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"enable_checkpointing": False, "log_every_n_steps": 2, **quiet, **options}
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[*callbacks], logger=log, **options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        loader = DataLoader(TensorDataset(*data()), batch_size=10, shuffle=True)
        trainer.fit(model, loader, ckpt_path=ckpt)
        model.states.append(torch.get_rng_state().float())
    return model, log, trainer


def without_seconds(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.endswith("seconds")}


def direct(model: Net, seed: int) -> hk.ExtremeResult:
    H = hk.hessian(*hk.from_module(copy.deepcopy(model), F.cross_entropy), data(), mode=MODE)
    return hk.extreme_eigenvalues(H, tol=1e-2, seed=seed)


def test_logged_values_are_those_of_a_direct_solve() -> None:
    own = tracker(every=2, seed=5)
    model, log, trainer = fit(SpectrumCallback(own), epochs=2)
    assert [step for step, _ in own.results] == [0, 2]
    first, last = direct(Net(), 5), direct(model, 6)
    logged = [metrics for _, metrics in log.lines if "spectrum/largest" in metrics]
    for metrics, ex in zip(logged, (first, last), strict=True):
        assert metrics["spectrum/smallest"] == ex.smallest.value
        assert metrics["spectrum/largest"] == ex.largest.value
        assert metrics["spectrum/largest_lower"] == ex.largest.interval.lower
        assert metrics["spectrum/passes"] == ex.num_matvecs
    assert log.steps("spectrum/largest") == [0, 8]
    assert float(trainer.callback_metrics["spectrum/largest"]) == pytest.approx(last.largest.value, rel=1e-6)


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_training_is_the_same_to_the_bit(per: str) -> None:
    own = tracker()
    with_callback, log, _ = fit(SpectrumCallback(own, per=per))
    without, plain, _ = fit()
    assert len(own.results) == (4 if per == "epoch" else 13)
    assert len(without.states) == 13
    assert all(torch.equal(*pair) for pair in zip(with_callback.states, without.states, strict=True))
    assert torch.equal(with_callback.weights(), without.weights())
    assert [line for line in log.lines if "loss" in line[1]] == plain.lines


def test_no_measurement_falls_between_the_steps_that_the_trainer_logs() -> None:
    own = tracker(every=3)
    _, log, _ = fit(SpectrumCallback(own, per="step"))
    assert [step for step, _ in own.results] == [0, 3, 6, 9, 12]
    assert log.steps("spectrum/smallest") == [0, 3, 6, 9, 12]


def test_steps_are_those_of_the_optimizer_where_gradients_are_accumulated() -> None:
    own = tracker(every=2)
    _, log, _ = fit(SpectrumCallback(own, per="step"), accumulate_grad_batches=2)
    assert [step for step, _ in own.results] == [0, 2, 4, 6]
    assert log.steps("spectrum/largest") == [0, 2, 4, 6]  # once each


def test_a_resumed_run_has_the_same_record(tmp_path) -> None:
    whole = tracker()
    fit(SpectrumCallback(whole), epochs=4)

    path = tmp_path / "run.jsonl"
    saving = lightning.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    model, _, trainer = fit(SpectrumCallback(tracker(path=path)), saving, epochs=2, enable_checkpointing=True)
    again = tracker(path=path)
    assert [step for step, _ in again.results] == [0, 1, 2]
    resumed, log, _ = fit(
        SpectrumCallback(again), saving, epochs=4, enable_checkpointing=True, ckpt=str(tmp_path / "last.ckpt")
    )
    assert [step for step, _ in again.results] == [0, 1, 2, 3, 4]
    assert log.steps("spectrum/largest") == [12, 16]
    assert not torch.equal(resumed.weights(), model.weights())
    assert trainer.global_step == 8
    for one, other in zip(again.records[:3], whole.records[:3], strict=True):
        assert without_seconds(one) == without_seconds(other)
    assert scalars(again.records[4])["spectrum/largest"] == pytest.approx(
        direct(resumed, 0).largest.value, rel=2e-2
    )


def test_early_stopping_can_watch_an_end() -> None:
    stop = lightning.callbacks.EarlyStopping("spectrum/largest", stopping_threshold=1e9, mode="min")
    own = tracker()
    _, _, trainer = fit(stop, SpectrumCallback(own))
    assert trainer.current_epoch == 1
    assert [step for step, _ in own.results] == [0, 1]


def test_another_process_than_the_first_measures_and_logs_nothing(monkeypatch) -> None:
    own = tracker()
    monkeypatch.setattr(lightning.Trainer, "is_global_zero", False)
    _, log, trainer = fit(SpectrumCallback(own))
    assert len(own.results) > 1
    assert "spectrum/largest" in trainer.callback_metrics
    assert log.steps("spectrum/largest") == []


def test_bad_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"^tracker must be a SpectrumTracker, got function"):
        SpectrumCallback(F.cross_entropy)
    with pytest.raises(ValueError, match=r"^per must be one of 'epoch', 'step'"):
        SpectrumCallback(tracker(), per="batch")


def test_files_in_csv_hold_the_measurements(tmp_path) -> None:
    logger = lightning.loggers.CSVLogger(tmp_path)
    own = tracker(every=2, max_matvecs=8)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 2}
    trainer = lightning.Trainer(max_epochs=2, callbacks=[SpectrumCallback(own)], logger=logger, **quiet)
    with torch.random.fork_rng(devices=[]):
        trainer.fit(Net(), DataLoader(TensorDataset(*data()), batch_size=10))
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        found = [float(row["spectrum/largest"]) for row in csv.DictReader(file) if row["spectrum/largest"]]
    assert found == [ex.largest.value for _, ex in own.results]
