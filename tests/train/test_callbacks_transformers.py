from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvpkit as hk
from hvpkit.train import SpectrumTracker

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SpectrumCallback = importlib.import_module("hvpkit.train.transformers").SpectrumCallback
MODE = "reverse-over-reverse"  # "auto" is measured, and two runs could differ in their last bits

G = torch.Generator().manual_seed(0)
TOKENS = torch.randint(11, (32, 6), generator=G)
CLASSES = torch.randint(3, (32,), generator=G)
DATA = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": CLASSES}
EXAMPLES = [{name: column[i] for name, column in DATA.items()} for i in range(len(TOKENS))]


def of_logits(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="none")


def tracker(**options: Any) -> SpectrumTracker:
    return SpectrumTracker.for_module(of_logits, DATA, **{"tol": 0.05, "mode": MODE, **options})


def bert() -> nn.Module:
    """With dropout, which draws from the global generator."""
    small = {"vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 6, "max_position_embeddings": 6, "num_labels": 3}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return transformers.BertForSequenceClassification(transformers.BertConfig(**small))


class Snoop(transformers.TrainerCallback):
    """The weights and the random state before every step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_step_begin(self, args, state, control, model=None, **_: object) -> None:  # noqa: ARG002
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        self.seen += [weights, torch.get_rng_state().float(), torch.tensor(float(model.training))]


def fit(
    folder: Any,
    own: SpectrumTracker | None = None,
    per: str = "epoch",
    resume: str | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> tuple[nn.Module, list[dict[str, float]], Snoop]:
    args = transformers.TrainingArguments(
        str(folder),
        **{"num_train_epochs": 2, "save_strategy": "no", "logging_steps": 3, **options},
        per_device_train_batch_size=8,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    snoop = Snoop()
    trainer = transformers.Trainer(model or bert(), args, train_dataset=EXAMPLES, callbacks=[snoop])
    if own is not None:
        trainer.add_callback(SpectrumCallback(own, trainer, per=per))
    with torch.random.fork_rng(devices=[]):
        trainer.train(resume_from_checkpoint=resume)
    return trainer.model, trainer.state.log_history, snoop


def direct(model: nn.Module, seed: int) -> hk.ExtremeResult:
    H = hk.hessian(*hk.from_module(copy.deepcopy(model), of_logits), DATA, mode=MODE)
    return hk.extreme_eigenvalues(H, tol=0.05, seed=seed)


def of_spectrum(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in history if "spectrum/largest" in entry]


def test_logged_values_are_those_of_a_direct_solve(tmp_path) -> None:
    own = tracker(every=2, seed=5)
    model, history, _ = fit(tmp_path, own)
    assert [step for step, _ in own.results] == [0, 2]
    logged = of_spectrum(history)
    found = direct(bert(), 5), direct(model, 6)
    for entry, ex in zip(logged, found, strict=True):
        assert entry["spectrum/smallest"] == ex.smallest.value
        assert entry["spectrum/largest"] == ex.largest.value
        assert entry["spectrum/smallest_upper"] == ex.smallest.interval.upper
        assert entry["spectrum/passes"] == ex.num_matvecs
    assert [(entry["step"], entry["epoch"]) for entry in logged] == [(0, 0), (8, 2)]


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_training_is_the_same_to_the_bit(per: str, tmp_path) -> None:
    own = tracker(max_matvecs=8)
    model, history, snoop = fit(tmp_path, own, per)
    plain_model, plain, plain_snoop = fit(tmp_path)
    assert [step for step, _ in own.results] == list(range(3 if per == "epoch" else 9))
    assert len(snoop.seen) == 24
    assert all(torch.equal(*pair) for pair in zip(snoop.seen, plain_snoop.seen, strict=True))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain_model.parameters(), strict=True))
    # the loss is still logged where both fall on one step
    losses, plain_losses = ([entry for entry in log if "loss" in entry] for log in (history, plain))
    assert [entry["step"] for entry in losses] == [3, 6]
    assert losses == plain_losses


def test_an_epoch_that_was_cut_short_counts(tmp_path) -> None:
    own = tracker(max_matvecs=8)
    _, history, _ = fit(tmp_path, own, max_steps=6)
    assert [step for step, _ in own.results] == [0, 1, 2]
    assert [entry["epoch"] for entry in of_spectrum(history)] == [0, 1, 1.5]


def test_steps_are_those_of_the_optimizer_where_gradients_are_accumulated(tmp_path) -> None:
    own = tracker(max_matvecs=8, every=2)
    fit(tmp_path, own, "step", gradient_accumulation_steps=2)
    assert [step for step, _ in own.results] == [0, 2, 4]


def test_a_resumed_run_has_the_same_record(tmp_path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    whole, path = tracker(every=2), tmp_path / "run.jsonl"
    _, history, _ = fit(tmp_path / "whole", whole, "step", **options)
    fit(tmp_path, tracker(every=2, path=path), "step", **options)
    text = path.read_text().splitlines(keepends=True)
    assert len(text) == 5
    again = tracker(every=2, path=path)
    with pytest.warns(hk.UnsavedWarning, match="gone back to step 8.* 1 measurements"):
        _, resumed, _ = fit(tmp_path, again, "step", resume=str(tmp_path / "checkpoint-6"), **options)
    assert [step for step, _ in again.results] == [0, 2, 4, 6, 8]
    assert [entry["step"] for entry in of_spectrum(resumed)] == [0, 2, 4, 6, 8]
    for one, other in zip(of_spectrum(resumed)[:4], of_spectrum(history)[:4], strict=True):
        assert {**one, "spectrum/seconds": 0} == {**other, "spectrum/seconds": 0}
    last, same = of_spectrum(resumed)[4], of_spectrum(history)[4]
    assert last["spectrum/largest"] == pytest.approx(same["spectrum/largest"], rel=0.05)


def test_mixed_precision_is_of_the_training_alone(tmp_path) -> None:
    own = tracker(every=2, seed=5)
    model, _, snoop = fit(tmp_path, own, bf16=True)
    _, _, plain_snoop = fit(tmp_path, bf16=True)
    assert all(torch.equal(*pair) for pair in zip(snoop.seen, plain_snoop.seen, strict=True))
    again = bert()
    again.load_state_dict(model.state_dict())
    ex = direct(again, 6)
    assert own.results[1][1].to_dict()["largest"] == ex.to_dict()["largest"]
    assert own.results[1][1].to_dict()["smallest"] == ex.to_dict()["smallest"]

    later = tracker(every=9, seed=5)
    fit(tmp_path, later, bf16=True, model=model)  # whose forward is wrapped twice now
    assert later.results[0][1].to_dict()["smallest"] == direct(again, 5).to_dict()["smallest"]


def test_bad_argument_is_named(tmp_path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(bert(), args, train_dataset=EXAMPLES)
    with pytest.raises(TypeError, match=r"^tracker must be a SpectrumTracker, got Trainer"):
        SpectrumCallback(trainer, tracker())
    with pytest.raises(TypeError, match=r"^trainer must be a transformers.Trainer, got BertFor"):
        SpectrumCallback(tracker(), bert())
    with pytest.raises(ValueError, match=r"^per must be one of 'epoch', 'step'"):
        SpectrumCallback(tracker(), trainer, per="batch")
