from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvpkit as hk
from hvpkit.train import SpectrumTracker
from oracles import hessian_by_double_backward, relative_error

transformers = pytest.importorskip("transformers")

HOW_TO = Path(__file__).parents[1] / "docs" / "how_to" / "hugging_face.md"
f64, VOCABULARY = torch.float64, 7
SMALL = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make().double().eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=4, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def bert(kind: str, **options: Any) -> nn.Module:
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **SMALL, **options)
    return seeded(lambda: getattr(transformers, f"BertFor{kind}")(config))


def batches(lengths: list[list[int]], labels: str) -> list[dict[str, Tensor]]:
    """Return batches that are padded to the longest of their own sentences."""
    generator, made = torch.Generator().manual_seed(1), []
    for rows in lengths:
        size = (len(rows), max(rows))
        tokens, others = (torch.randint(VOCABULARY, size, generator=generator) for _ in "ab")
        mask = (torch.arange(max(rows)) < torch.tensor(rows).unsqueeze(1)).long()
        known = {
            "tokens": torch.where(mask > 0, tokens, -100),
            "others": torch.where(mask > 0, others % 3, -100),
            "classes": others[:, 0] % 3,
            "several": (others[:, :3] % 2).double(),
            "numbers": others[:, 0].double(),
        }[labels]
        made.append({"input_ids": tokens, "attention_mask": mask, "labels": known})
    return made


CASES: dict[str, tuple[Any, Any, str]] = {
    "causal": (gpt2, hk.hf.causal_lm_loss, "tokens"),
    "seq2seq": (t5, hk.hf.seq2seq_loss, "tokens"),
    "classes": (
        lambda: bert("SequenceClassification", num_labels=3),
        hk.hf.classification_loss,
        "classes",
    ),
    "tokens": (lambda: bert("TokenClassification", num_labels=3), hk.hf.classification_loss, "others"),
    "several labels": (
        lambda: bert("SequenceClassification", num_labels=3),
        hk.hf.classification_loss,
        "several",
    ),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        hk.hf.classification_loss,
        "numbers",
    ),
    "masked tokens": (lambda: bert("MaskedLM"), hk.hf.seq2seq_loss, "tokens"),
}


def num_labels(batch: dict[str, Tensor], shifted: bool) -> int:
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    return len(labels) if labels.is_floating_point() else int((labels != -100).sum())


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_models_own_over_all_labels_however_batches_are_padded(name: str) -> None:
    make, criterion, labels = CASES[name]
    model, data = make(), batches([[2, 5, 3], [7], [4, 6]], labels)
    objective, params = hk.from_module(model, criterion)
    counts = [num_labels(batch, name == "causal") for batch in data]
    with torch.no_grad():
        own = [float(model(**batch).loss) for batch in data]
    mean = sum(loss * count for loss, count in zip(own, counts, strict=True)) / sum(counts)
    # transformers computes some losses in float32
    assert float(hk.loss(objective, params, data)) == pytest.approx(mean, rel=1e-6)
    assert len(set(counts)) > 1, "batches weigh differently"


@pytest.mark.parametrize("name", ["causal", "seq2seq", "tokens"])
def test_the_hessian_is_that_of_the_mean_over_all_labels(name: str) -> None:
    make, criterion, labels = CASES[name]
    model, data = make(), batches([[2, 3], [4]], labels)
    objective, params = hk.from_module(model, criterion)
    kept = [key for key in params if "bias" in key or "norm" in key or "ln" in key]
    total = sum(num_labels(batch, name == "causal") for batch in data)

    def loss_fn(some: dict[str, Tensor], _: object) -> Tensor:
        whole = {**params, **some}
        losses = [
            torch.func.functional_call(model, whole, (), batch).logits.log_softmax(-1) for batch in data
        ]
        sums = []
        for logits, batch in zip(losses, data, strict=True):
            target = batch["labels"]
            if name == "causal":
                logits, target = logits[:, :-1], target[:, 1:]
            picked = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            sums.append(-(picked * (target != -100)).sum())
        return torch.stack(sums).sum() / total

    truth = hessian_by_double_backward(loss_fn, {key: params[key] for key in kept}, None)
    H = hk.hessian(objective, params, data, wrt=kept)
    # T5 computes its norms in float32, whatever the dtype
    assert relative_error(H @ torch.eye(H.n, dtype=f64), truth) < (1e-6 if name == "seq2seq" else 1e-10)
    G = hk.ggn(objective, params, data, wrt=kept)
    assert G.n == H.n


def test_a_decoder_reads_what_the_batch_holds_if_it_does() -> None:
    model, (batch,) = t5(), batches([[3, 5]], "tokens")
    objective, params = hk.from_module(model, hk.hf.seq2seq_loss)
    given = batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    assert torch.equal(objective(params, given), objective(params, batch))


def test_a_tracker_takes_them_and_half_precision_is_raised() -> None:
    data = batches([[2, 5, 3]], "tokens")
    tracker = SpectrumTracker.for_module(hk.hf.causal_lm_loss, data, max_matvecs=8)
    assert tracker(gpt2(), step=0) is not None
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    losses = hk.hf.causal_lm_loss(logits.bfloat16(), torch.tensor([[0, 1, 2], [0, 3, -100]]))
    assert losses.dtype == torch.float32
    steps = logits.bfloat16().float().log_softmax(-1)
    torch.testing.assert_close(losses, -torch.stack([steps[0, 0, 1] + steps[0, 1, 2], steps[1, 0, 3]]))


@pytest.mark.parametrize(
    ("criterion", "labels", "error", "said"),
    [
        (hk.hf.causal_lm_loss, torch.zeros(2, 4, dtype=torch.int64), ValueError, r"labels must .* \[2, 3\]"),
        (hk.hf.causal_lm_loss, torch.zeros(2, 3), TypeError, "labels must be a tensor of integers"),
        (hk.hf.seq2seq_loss, [1, 2], TypeError, "labels must be a tensor of integers, got list"),
        (
            hk.hf.classification_loss,
            torch.zeros(2, 5),
            ValueError,
            "labels must have the shape of the logits",
        ),
        (hk.hf.classification_loss, torch.zeros(2, dtype=torch.bool), TypeError, "labels must be a tensor"),
    ],
)
def test_labels_that_do_not_fit_are_named(criterion: Any, labels: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        criterion(torch.zeros(2, 3, 4), labels)


def test_outputs_without_logits_are_refused() -> None:
    with pytest.raises(TypeError, match="outputs must have logits"):
        hk.hf.causal_lm_loss({"loss": 3}, torch.zeros(2, 3, dtype=torch.int64))


def test_data_without_any_label_are_refused() -> None:
    (batch,) = batches([[3, 5]], "tokens")
    objective, params = hk.from_module(gpt2(), hk.hf.causal_lm_loss)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="no example has any weight"):
        hk.loss(objective, params, batch)


def test_the_how_to_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) >= 5
    scope: dict[str, Any] = {"__name__": "how_to"}
    with torch.random.fork_rng(devices=[]):
        for block in code:
            exec(block, scope)
    assert scope["ex"].converged
    assert (tmp_path / "spectrum.jsonl").exists()
    measured = [ex.largest.value for _, ex in scope["tracker"].results]
    assert len(measured) == 3
    with (tmp_path / "spectrum.csv").open() as file:
        assert [float(row["spectrum/largest"]) for row in csv.DictReader(file)] == measured
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events.parent)).Reload().Scalars("train/spectrum/largest")
    assert [event.value for event in written] == pytest.approx(measured, rel=1e-6)
