"""A training by two processes as of torchrun, with a callback: ``training.py LIBRARY FOLDER``.

Each process writes what it has into the folder.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpkit.objective.fully_sharded import gathered
from hvpkit.train import SpectrumTracker

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(44, 5, generator=G), torch.randint(0, 3, (44,), generator=G)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tracker(folder: Path) -> SpectrumTracker:
    return SpectrumTracker.for_module(
        F.cross_entropy, (X, Y), tol=1e-4, path=folder / "spectrum.jsonl", batch_size=9
    )


def with_lightning(folder: Path, *, sharded: bool = False) -> dict[str, Any]:
    import lightning
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader, TensorDataset

    from hvpkit.train.lightning import SpectrumCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def configure_model(self) -> None:
            if sharded:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    lightning.seed_everything(1, verbose=False)
    own, module = tracker(folder), Module()
    best = ModelCheckpoint(folder, "{epoch}", monitor="spectrum/largest", mode="max", save_top_k=1)
    stop = EarlyStopping("spectrum/largest", stopping_threshold=-1e9, mode="max", patience=9)
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        strategy=ModelParallelStrategy(2, 1) if sharded else "ddp",
        devices=2,
        callbacks=[SpectrumCallback(own), stop, best],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 6, shuffle=True))
    return found(own, module, trainer.global_rank) | {
        "epochs": trainer.current_epoch,
        "best": Path(best.best_model_path).name,
    }


def with_transformers(folder: Path) -> dict[str, Any]:
    import transformers

    from hvpkit.train.transformers import SpectrumCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.net(x)
            return (
                {"logits": logits}
                if labels is None
                else {"loss": F.cross_entropy(logits, labels), "logits": logits}
            )

    def of_logits(outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="none")

    torch.manual_seed(1)
    model, path = Model(), folder / "spectrum.jsonl"
    own = SpectrumTracker.for_module(of_logits, {"x": X, "labels": Y}, tol=1e-4, path=path, batch_size=9)
    args = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        num_train_epochs=2,
        per_device_train_batch_size=6,
        disable_tqdm=True,
    )
    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    trainer = transformers.Trainer(model, args, train_dataset=examples)
    trainer.add_callback(SpectrumCallback(own, trainer))
    trainer.train()
    logged = [
        record["spectrum/largest"] for record in trainer.state.log_history if "spectrum/largest" in record
    ]
    return found(own, model, args.process_index) | {"logged": logged}


def found(own: SpectrumTracker, model: nn.Module, rank: int) -> dict[str, Any]:
    state = {name: gathered(value).tolist() for name, value in model.state_dict().items()}
    numbers = [[step, ex.largest.value, ex.smallest.value, ex.num_matvecs] for step, ex in own.results]
    return {"rank": rank, "numbers": numbers, "state": state}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    libraries = {
        "lightning": with_lightning,
        "lightning-fsdp2": partial(with_lightning, sharded=True),
        "transformers": with_transformers,
    }
    result = libraries[sys.argv[1]](target)
    (target / f"rank{result['rank']}.json").write_text(json.dumps(result))
