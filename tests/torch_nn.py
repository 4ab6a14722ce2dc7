"""Every module of torch.nn as a small problem in float64, away from kinks, and the table of covered modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
Make = Callable[[], nn.Module]


class Call(nn.Module):
    """Module called as ``how(module, x)``."""

    def __init__(self, module: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.how = module, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.module, x)


def first(module: nn.Module) -> nn.Module:
    """Return only the first output of the module."""
    return Call(module, lambda module, x: module(x)[0])


def halves(module: nn.Module) -> nn.Module:
    """Call the module on the two halves of the input."""
    return Call(module, lambda module, x: module(*x.chunk(2, dim=1)))


def function(how: Callable[[Tensor], Tensor]) -> nn.Module:
    """Wrap a function without parameters as a module."""
    return Call(nn.Identity(), lambda _, x: how(x))


def attention(**options: bool) -> nn.Module:
    heads = nn.MultiheadAttention(2, 2, 0.5, batch_first=True)
    return Call(heads, lambda module, x: module(x, x, x, **options)[0])


def unpool(n: int) -> nn.Module:
    pool = getattr(F, f"max_pool{n}d")
    return Call(getattr(nn, f"MaxUnpool{n}d")(2), lambda module, x: module(*pool(x, 2, return_indices=True)))


BLOCK = {
    "d_model": 2,
    "nhead": 1,
    "dim_feedforward": 1,
    "activation": "gelu",
    "batch_first": True,
    "bias": False,
}
SHAPES = {1: (2, 4), 2: (1, 4, 4), 3: (1, 2, 2, 4)}

TOKENS = torch.tensor([[0, 3, 1], [2, 0, 0], [1, 1, 3]])

FIRST: dict[str, tuple[Make, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(3, 2), (3,)),
    "Bilinear": (lambda: halves(nn.Bilinear(2, 2, 2)), (4,)),
    "Conv1d": (lambda: nn.Conv1d(2, 2, 2), (2, 3)),
    "Conv1d circular": (lambda: nn.Conv1d(2, 2, 2, padding=1, padding_mode="circular"), (2, 3)),
    "Conv2d": (lambda: nn.Conv2d(2, 2, 2, stride=2, padding=1), (2, 3, 3)),
    "Conv2d grouped": (lambda: nn.Conv2d(2, 4, 2, groups=2, dilation=2), (2, 3, 3)),
    "Conv2d reflected": (lambda: nn.Conv2d(1, 2, 2, padding=1, padding_mode="reflect"), (1, 3, 3)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 2, 3, 2)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 2, 2), (2, 2)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 1, 2, stride=2, output_padding=1), (2, 2, 2)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2)),
    "RNN": (lambda: first(nn.RNN(2, 2, batch_first=True)), (3, 2)),
    "RNN relu": (lambda: first(nn.RNN(2, 2, nonlinearity="relu", batch_first=True)), (2, 2)),
    "LSTM": (lambda: first(nn.LSTM(1, 2, batch_first=True)), (3, 1)),
    "LSTM projected": (lambda: first(nn.LSTM(1, 2, proj_size=1, batch_first=True)), (2, 1)),
    "LSTM of two layers": (lambda: first(nn.LSTM(1, 1, 2, dropout=0.5, batch_first=True)), (3, 1)),
    "GRU": (lambda: first(nn.GRU(1, 2, batch_first=True)), (3, 1)),
    "GRU both ways": (lambda: first(nn.GRU(1, 1, bidirectional=True, batch_first=True)), (3, 1)),
    "RNNCell": (lambda: nn.RNNCell(2, 2), (2,)),
    "LSTMCell": (lambda: first(nn.LSTMCell(1, 2)), (1,)),
    "GRUCell": (lambda: nn.GRUCell(1, 2), (1,)),
    "MultiheadAttention": (attention, (3, 2)),
    "MultiheadAttention without weights": (lambda: attention(need_weights=False), (3, 2)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(**BLOCK), (3, 2)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**BLOCK), 1, enable_nested_tensor=False),
        (2, 2),
    ),
    "TransformerDecoderLayer": (lambda: halves(nn.TransformerDecoderLayer(norm_first=True, **BLOCK)), (4, 2)),
    "TransformerDecoder": (
        lambda: halves(nn.TransformerDecoder(nn.TransformerDecoderLayer(**BLOCK), 1)),
        (4, 2),
    ),
    "Transformer": (
        lambda: halves(nn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **BLOCK)),
        (4, 2),
    ),
    "Embedding": (lambda: nn.Embedding(4, 3), ()),
    "Embedding padded": (lambda: nn.Embedding(4, 3, padding_idx=0), ()),
    "Embedding sparse": (lambda: nn.Embedding(4, 3, sparse=True), ()),
    "Embedding scaled by frequency": (lambda: nn.Embedding(4, 3, scale_grad_by_freq=True), ()),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(4, 3), ()),
    "EmbeddingBag sum": (lambda: nn.EmbeddingBag(4, 3, mode="sum"), ()),
    "EmbeddingBag max": (lambda: nn.EmbeddingBag(4, 3, mode="max"), ()),
    "EmbeddingBag padded": (lambda: nn.EmbeddingBag(4, 3, padding_idx=0), ()),
    "EmbeddingBag weighted": (
        lambda: Call(nn.EmbeddingBag(4, 3, mode="sum"), lambda bag, x: bag(x, None, 0.5 + x.double() / 4)),
        (),
    ),
    "ParameterList": (
        lambda: Call(
            nn.ParameterList([torch.ones(2), torch.ones(2)]), lambda p, x: torch.tanh(x * p[0]) * p[1]
        ),
        (2,),
    ),
    "ParameterDict": (
        lambda: Call(nn.ParameterDict({"a": torch.ones(2)}), lambda p, x: torch.tanh(x * p["a"])),
        (2,),
    ),
    "ModuleList": (lambda: Call(nn.ModuleList([nn.Linear(2, 2)]), lambda m, x: torch.tanh(m[0](x))), (2,)),
    "ModuleDict": (
        lambda: Call(nn.ModuleDict({"a": nn.Linear(2, 2)}), lambda m, x: torch.tanh(m["a"](x))),
        (2,),
    ),
    "Sequential": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (2,)),
    "utils.weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 2)), (3,)),
    "utils.spectral_norm": (lambda: spectral_norm(nn.Linear(3, 2)), (3,)),
    "utils.parametrizations.weight_norm": (
        lambda: parametrizations.weight_norm(nn.Conv1d(2, 2, 2), dim=1),
        (2, 3),
    ),
    "utils.parametrizations.spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), (3,)),
    "utils.parametrizations.orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (3,)),
}
"""Modules with parameters, with the shape of an input; an empty shape: the inputs are tokens."""

ELEMENTWISE = (
    *(
        "CELU",
        "ELU",
        "GELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "LeakyReLU",
        "LogSigmoid",
        "Mish",
    ),
    *(
        "PReLU",
        "RReLU",
        "ReLU",
        "ReLU6",
        "SELU",
        "SiLU",
        "Sigmoid",
        "Softplus",
        "Softshrink",
        "Softsign",
        "Tanh",
    ),
    *("Tanhshrink", "Identity", "Flatten", "Dropout", "Dropout1d", "AlphaDropout"),
)

LATER: dict[str, tuple[Make, tuple[int, ...]]] = {
    **{name: (getattr(nn, name), (2, 3)) for name in ELEMENTWISE},
    "GELU tanh": (lambda: nn.GELU("tanh"), (2, 3)),
    "GLU": (lambda: nn.GLU(1), (4, 2)),
    "Threshold": (lambda: nn.Threshold(0.1, 2.0), (4,)),
    **{name: (partial(getattr(nn, name), 1), (4,)) for name in ("Softmax", "Softmin", "LogSoftmax")},
    **{name: (getattr(nn, name), (2, 2, 2)) for name in ("Softmax2d", "Dropout2d", "FeatureAlphaDropout")},
    "Dropout3d": (nn.Dropout3d, (2, 1, 2, 2)),
    **{
        f"{norm}Norm{n}d": (partial(getattr(nn, f"{norm}Norm{n}d"), 2, **options), (2, 3, 1, 2)[: n + 1])
        for norm, options in {"Batch": {}, "Instance": {"affine": True}}.items()
        for n in (1, 2, 3)
    },
    "InstanceNorm1d tracked": (lambda: nn.InstanceNorm1d(2, track_running_stats=True), (2, 3)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(2), (2, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(3), (2, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 2)),
    "RMSNorm": (lambda: nn.RMSNorm(3), (2, 3)),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2, alpha=1.0), (3, 2)),
    **{
        f"{pool}Pool{n}d": (partial(getattr(nn, f"{pool}Pool{n}d"), *arguments), SHAPES[n])
        for pool, arguments in {"Avg": (2,), "Max": (2,), "LP": (2, 2)}.items()
        for n in (1, 2, 3)
    },
    **{
        f"Adaptive{pool}Pool{n}d": (
            partial(getattr(nn, f"Adaptive{pool}Pool{n}d"), 2),
            (1, 2, 3, 2)[-n - 1 :],
        )
        for pool in ("Avg", "Max")
        for n in (1, 2, 3)
    },
    "FractionalMaxPool2d": (
        lambda: nn.FractionalMaxPool2d(2, 2, _random_samples=torch.full((3, 1, 2), 0.3).double()),
        (1, 4, 4),
    ),
    "FractionalMaxPool3d": (
        lambda: nn.FractionalMaxPool3d((1, 2, 2), 1, _random_samples=torch.full((3, 1, 3), 0.3).double()),
        (1, 2, 3, 3),
    ),
    **{f"MaxUnpool{n}d": (partial(unpool, n), SHAPES[n]) for n in (1, 2, 3)},
    **{
        f"{pad}Pad{n}d": (partial(getattr(nn, f"{pad}Pad{n}d"), 1, *value), (1, 3, 2, 2)[: n + 1])
        for pad, value in {
            "Circular": (),
            "Constant": (0.5,),
            "Reflection": (),
            "Replication": (),
            "Zero": (),
        }.items()
        for n in (1, 2, 3)
    },
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (4, 1, 2)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, 2, 2)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 4)),
    "Fold": (lambda: nn.Fold((3, 3), 2), (4, 4)),
    "Unfold": (lambda: nn.Unfold(2), (1, 3, 3)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 2)), (4,)),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), (2, 3)),
    "Upsample bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (1, 3, 3)),
    "UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), (1, 2, 2)),
    "UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), (1, 2, 2)),
    "CosineSimilarity": (lambda: halves(nn.CosineSimilarity()), (6, 1)),
    "PairwiseDistance": (
        lambda: Call(nn.PairwiseDistance(keepdim=True), lambda d, x: d(*x.chunk(2, 1))),
        (6,),
    ),
    "functional.scaled_dot_product_attention": (
        lambda: function(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        (3, 2),
    ),
    "functional.normalize": (lambda: function(F.normalize), (4,)),
    "functional.grid_sample": (
        lambda: function(
            lambda x: F.grid_sample(x[:, :1], x[:, 1:].permute(0, 2, 3, 1), align_corners=False)
        ),
        (3, 2, 2),
    ),
    "functional.cdist": (lambda: function(lambda x: torch.cdist(x[:, :2], x[:, 2:])), (4, 2)),
}
"""Modules tested after a linear map and a tanh, with the shape of their input."""

G = torch.Generator().manual_seed(3)
REALS = torch.randn(3, 4, generator=G, dtype=torch.float64)
SIGNS, CHANCES = REALS.sign(), REALS.softmax(1)
CLASSES, PAIRS = torch.tensor([1, 3, 0]), torch.tensor([1.0, -1.0, 1.0]).double()


def of_thirds(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, _: loss(*outputs.chunk(3, dim=1))


def as_they_are(losses: Tensor, _: Tensor) -> Tensor:
    return losses


def ctc(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = outputs.view(len(outputs), 5, 3).transpose(0, 1).log_softmax(2)
    lengths = [torch.full((len(outputs),), length) for length in (5, 2)]
    return nn.CTCLoss(reduction="none")(scores, targets, *lengths)


IDENTITY, LOG_SOFTMAX = nn.Identity, partial(nn.LogSoftmax, 1)
ONE_OF_FOUR = (4, CLASSES, IDENTITY)
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, Tensor, Make]] = {
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), *ONE_OF_FOUR),
    "CrossEntropyLoss smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), *ONE_OF_FOUR),
    "CrossEntropyLoss weighted": (nn.CrossEntropyLoss(CHANCES[0], reduction="sum"), *ONE_OF_FOUR),
    "CrossEntropyLoss of chances": (nn.CrossEntropyLoss(), 4, CHANCES, IDENTITY),
    "LinearCrossEntropyLoss": (
        as_they_are,
        2,
        CLASSES,
        lambda: Call(nn.LinearCrossEntropyLoss(2, 4, reduction="none"), lambda loss, z: loss(z, CLASSES)),
    ),
    "AdaptiveLogSoftmaxWithLoss": (
        as_they_are,
        2,
        CLASSES,
        lambda: Call(nn.AdaptiveLogSoftmaxWithLoss(2, 4, [2], 1.0), lambda loss, z: -loss(z, CLASSES).output),
    ),
    "MultiMarginLoss": (nn.MultiMarginLoss(weight=CHANCES[0]), *ONE_OF_FOUR),
    "MultiMarginLoss squared": (nn.MultiMarginLoss(p=2), *ONE_OF_FOUR),
    "MultiLabelMarginLoss": (
        nn.MultiLabelMarginLoss(),
        4,
        torch.tensor([[1, -1, 0, 0], [3, 0, -1, 1], [2, 1, 0, -1]]),
        IDENTITY,
    ),
    "NLLLoss": (nn.NLLLoss(), 4, CLASSES, LOG_SOFTMAX),
    "KLDivLoss": (nn.KLDivLoss(reduction="batchmean"), 4, CHANCES, LOG_SOFTMAX),
    "BCELoss": (nn.BCELoss(), 4, (SIGNS > 0).double(), nn.Sigmoid),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=CHANCES[0]), 4, (SIGNS > 0).double(), IDENTITY),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), 4, (SIGNS > 0).double(), IDENTITY),
    "SoftMarginLoss": (nn.SoftMarginLoss(), 4, SIGNS, IDENTITY),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), 4, SIGNS, IDENTITY),
    "MSELoss": (nn.MSELoss(), 4, REALS, IDENTITY),
    "L1Loss": (nn.L1Loss(), 4, REALS, IDENTITY),
    "SmoothL1Loss": (nn.SmoothL1Loss(beta=1.5), 4, REALS, IDENTITY),
    "HuberLoss": (nn.HuberLoss(delta=1.5), 4, REALS, IDENTITY),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), 4, CHANCES, IDENTITY),
    "GaussianNLLLoss": (
        lambda z, y: nn.GaussianNLLLoss(reduction="none")(z[:, :2], y[:, :2], z[:, 2:].exp()).mean(1),
        4,
        REALS,
        IDENTITY,
    ),
    "CosineEmbeddingLoss": (
        lambda z, y: nn.CosineEmbeddingLoss(-2.0, reduction="none")(*z.chunk(2, dim=1), y),
        6,
        PAIRS,
        IDENTITY,
    ),
    "MarginRankingLoss": (
        lambda z, y: nn.MarginRankingLoss(3.0, reduction="none")(*z.unbind(1), y),
        2,
        PAIRS,
        IDENTITY,
    ),
    "TripletMarginLoss": (of_thirds(nn.TripletMarginLoss(2.0, reduction="none")), 6, PAIRS, IDENTITY),
    "TripletMarginWithDistanceLoss": (
        of_thirds(nn.TripletMarginWithDistanceLoss(margin=2.0, reduction="none")),
        6,
        PAIRS,
        IDENTITY,
    ),
    "CTCLoss": (ctc, 15, torch.tensor([[1, 2], [2, 2], [1, 1]]), IDENTITY),
}
"""Losses, with the number of outputs, the targets, and the function applied to the outputs."""

ROWS = (*FIRST, *LATER, *LOSSES)

LACKING = {
    "functional.grid_sample": MODES[:1],
    "functional.cdist": MODES[:2],
}
"""Modes in which torch has no derivative and raises an error."""

NOT_COVERED = {
    **dict.fromkeys(("Container", "Module", "RNNBase", "RNNCellBase"), "base classes"),
    "DataParallel": "unwrapped",
    "NLLLoss2d": "an old name of `NLLLoss`",
    "CrossMapLRN2d": "refused: torch's gradient of it is wrong",
    **{
        name: "refused before their first call, which changes their class"
        for name in dir(nn)
        if name.startswith("Lazy")
    },
}

ABOUT = """# What is covered

Matvecs with the Hessian and with the generalised Gauss-Newton matrix (GGN) of small models in float64, compared with
fourth-order central differences of the gradient, of the outputs and of the loss's gradient, for every module of
`torch.nn` with floating-point input. "yes": the matvec is right, to 1e-7 of the norms of both matrices. "no": torch
lacks the derivative, and the error names the modes that do not need it.

Layers are tested with a smooth loss; activations, normalisation, pooling and other layers without weights of their own
follow a linear map and a tanh, as do losses. Inputs are away from kinks. Dropout is off, and batch normalisation uses
running statistics.

This file is written by `python tests/torch_nn.py` and tested by `tests/coverage/`.
"""


def modules_of_torch() -> list[str]:
    """Return the names of all module classes in torch.nn."""
    return [name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)]


def document() -> str:
    """Return the text of docs/coverage.md."""
    columns = [f"{kind}, {mode}" for kind in ("Hessian", "GGN") for mode in MODES]
    lines = [ABOUT, f"| | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for row in ROWS:
        cells = ["no" if mode in LACKING.get(row, ()) else "yes" for _ in range(2) for mode in MODES]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", "## Not in the table", ""]
    for reason in dict.fromkeys(NOT_COVERED.values()):
        lines.append(
            f"- {', '.join(f'`{name}`' for name in NOT_COVERED if NOT_COVERED[name] == reason)}: {reason}."
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Case:
    """Model, criterion and one batch, and the same as functions that share no code with the package."""

    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    batch: tuple[Tensor, Tensor]
    plain: nn.Module

    def outputs(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        constants = {}
        for name, module in self.plain.named_modules():
            if getattr(module, "padding_idx", None) is not None:
                weight = f"{name}.weight".lstrip(".")
                is_padding = torch.arange(len(params[weight])).unsqueeze(1) == module.padding_idx
                constants[weight] = torch.where(is_padding, module.weight.detach(), params[weight])
        return torch.func.functional_call(self.plain, params | constants, (batch[0],))

    def losses(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of each example by itself."""
        rows = zip(outputs.split(1), batch[1].split(1), strict=True)
        return torch.stack([self.criterion(z, y).sum() for z, y in rows])


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute a convex loss per example that has derivatives of every order."""
    return torch.log(torch.cosh(outputs.flatten(1) - targets.unsqueeze(1))).mean(1)


def model_of(name: str) -> nn.Module:
    """Make the model of a row of the table in float64, the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        if name in LOSSES:
            _, width, _, link = LOSSES[name]
            model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), link())
        elif name in LATER:
            make, shape = LATER[name]
            model = nn.Sequential(nn.Linear(1, prod(shape)), nn.Unflatten(1, shape), nn.Tanh(), make())
        else:
            model = FIRST[name][0]()
        for tensor in (*model.double().parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data += 0.3 * torch.rand_like(tensor)
    return model


def case(name: str) -> Case:
    """Make the problem of a row of the table."""
    shape = FIRST[name][1] if name in FIRST else (2,) if name in LOSSES else (1,)
    inputs = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    criterion, targets = log_cosh, torch.full((3,), 0.3, dtype=torch.float64)
    if name in LOSSES:
        criterion, _, targets, _ = LOSSES[name]
    plain = model_of(name).eval()
    for module in plain.modules():
        if hasattr(module, "sparse"):  # the same function with another gradient
            module.sparse = module.scale_grad_by_freq = False
    return Case(model_of(name), criterion, (inputs if shape else TOKENS, targets), plain)


if __name__ == "__main__":
    DOCUMENT.write_text(document())
