"""Networks as they are used, small: products over ragged batches against oracles that go another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvpkit as hk
from oracles import ggn_product, product_by_double_backward, relative_error

MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
TOLERANCE = {mode: 1e-8 for mode in MODES[:2]} | {"finite-difference": 1e-5}
BATCH_SIZE = 3


class C1(nn.Sequential):
    """Convolutions, pooling and dense layers, as in Keskar et al., arXiv:1609.04836."""

    def __init__(self) -> None:
        features = (
            *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(3)),
            *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(3, 2, 1)),
        )
        super().__init__(*features, nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.second, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        projection = (nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Sequential(*projection) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)), inplace=True)))
        return F.relu(inner.add_(self.shortcut(x)))


class ResNet(nn.Sequential):
    def __init__(self) -> None:
        stem = (nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
        super().__init__(*stem, Block(4, 4, 1), Block(4, 6, 2), *head)


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8) / 5)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.places
        return self.head(self.norm(self.encoder(tokens))[:, 0])


class GptBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attend, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.norm1(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        drop = 0.1 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, dropout_p=drop)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Scores of the next token by the same matrix that embeds tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks, self.norm = nn.Sequential(GptBlock(), GptBlock()), nn.LayerNorm(8)
        self.scores = nn.Linear(8, 11, bias=False)
        self.scores.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.scores(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))


class LstmLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 5, padding_idx=0)
        self.lstm, self.scores = nn.LSTM(5, 6, 2, dropout=0.2, batch_first=True), nn.Linear(6, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.lstm(self.tokens(tokens))[0])


class Messages(nn.Module):
    """Nodes that send messages along edges, summed where they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.send, self.keep = nn.Linear(2, 6), nn.Linear(12, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        graphs, count, _ = nodes.shape
        offsets = count * torch.arange(graphs, device=nodes.device).view(-1, 1, 1)
        sources, targets = (edges + offsets).flatten(0, 1).unbind(1)
        h = torch.tanh(self.embed(nodes)).flatten(0, 1)
        for _ in range(2):
            sent = F.silu(self.send(torch.cat([h[sources], h[targets]], dim=1)))
            h = torch.tanh(self.keep(h).index_add(0, targets, sent))
        return self.head(h.view(graphs, count, -1).mean(1))


def of_tokens(scores: Any, targets: Tensor) -> Tensor:
    """Mean cross entropy of each sequence, padding left out."""
    scores = getattr(scores, "logits", scores)
    losses = F.cross_entropy(scores.mT, targets, reduction="none", ignore_index=0)
    return losses.sum(1) / (targets != 0).sum(1)


def of_classes(scores: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(getattr(scores, "logits", scores), targets, reduction="none")


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 11, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, bos_token_id=0, eos_token_id=0))


def bert(attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_labels": 3,
    }
    more = {"intermediate_size": 12, "max_position_embeddings": 6, "attn_implementation": attention}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**small, **more))


G = torch.Generator().manual_seed(0)
IMAGES, TOKENS = (
    torch.randn(7, 3, 8, 8, generator=G, dtype=torch.float64),
    torch.randint(1, 11, (7, 6), generator=G),
)
TOKENS[1, 4:] = TOKENS[5, 2:] = 0
CLASSES = torch.arange(7) % 3
NODES, EDGES = (
    torch.randn(7, 4, 2, generator=G, dtype=torch.float64),
    torch.randint(0, 4, (7, 5, 2), generator=G),
)
SENTENCES = {"input_ids": TOKENS, "attention_mask": (TOKENS != 0).long()}

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], Any]] = {
    "c1": (C1, of_classes, (IMAGES, CLASSES)),
    "resnet": (ResNet, of_classes, (IMAGES, CLASSES)),
    "resnet by batch statistics": (ResNet, of_classes, (IMAGES[:6], CLASSES[:6])),
    "vit": (ViT, of_classes, (IMAGES, CLASSES)),
    "gpt": (Gpt, of_tokens, (TOKENS[:, :-1], TOKENS[:, 1:])),
    "lstm language model": (LstmLanguageModel, of_tokens, (TOKENS[:, :-1], TOKENS[:, 1:])),
    "graph": (Messages, of_classes, (NODES, EDGES, CLASSES)),
    "transformers gpt2": (gpt2, of_tokens, SENTENCES | {"labels": TOKENS.roll(-1, 1)}),
    "transformers bert": (lambda: bert("sdpa"), of_classes, SENTENCES | {"labels": CLASSES}),
    "transformers bert eager": (lambda: bert("eager"), of_classes, SENTENCES | {"labels": CLASSES}),
}


@dataclass(frozen=True)
class Problem:
    objective: hk.Objective
    params: dict[str, Tensor]
    data: Any
    v: Tensor
    hessian: Tensor
    ggn: Tensor


@cache
def problem(name: str) -> Problem:
    """The model with its products by the oracles: sums over batches by the module itself."""
    make, criterion, data = MODELS[name]
    policy = "batch" if "batch" in name else "eval"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().double()
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer += torch.rand_like(buffer) / 2
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        module.training = policy == "batch" and isinstance(module, nn.BatchNorm2d)
    objective, params = hk.from_module(model, criterion, batchnorm=policy)
    v = torch.randn(sum(p.numel() for p in params.values()), dtype=torch.float64, generator=G)
    if "tokens.weight" in params and isinstance(model, LstmLanguageModel):
        v[:5] = 0.0  # the padding row is a constant, which differences by the module would move

    def targets(batch: Any) -> Tensor:
        return batch["labels"] if isinstance(batch, dict) else batch[-1]

    def outputs(params: dict[str, Tensor], batch: Any) -> Tensor:
        inputs = () if isinstance(batch, dict) else tuple(batch[:-1])
        named = (
            {key: value for key, value in batch.items() if key != "labels"} if isinstance(batch, dict) else {}
        )
        buffers = {key: buffer.clone() for key, buffer in plain.named_buffers()}
        found = torch.func.functional_call(plain, params | buffers, inputs, named)
        return getattr(found, "logits", found)

    def losses(outputs: Tensor, batch: Any) -> Tensor:
        return criterion(outputs, targets(batch))

    hessian, ggn = torch.zeros_like(v), torch.zeros_like(v)
    for batch in hk.as_data(data, batch_size=BATCH_SIZE):
        share = len(targets(batch)) / len(targets(data))
        with sdpa_kernel(SDPBackend.MATH):
            hessian += share * product_by_double_backward(
                lambda p, b: losses(outputs(p, b), b), params, batch, v
            )
            ggn += share * ggn_product(outputs, losses, params, batch, v)
    return Problem(objective, params, data, v, hessian, ggn)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_products_with_whole_models_equal_oracles(name: str, mode: str) -> None:
    p = problem(name)
    for kind, oracle in ((hk.hessian, p.hessian), (hk.ggn, p.ggn)):
        operator = kind(p.objective, p.params, p.data, batch_size=BATCH_SIZE, mode=mode)
        assert relative_error(operator @ p.v, oracle) < TOLERANCE[mode], operator
