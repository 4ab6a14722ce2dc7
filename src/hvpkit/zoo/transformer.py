"""A small GPT and a small vision transformer, made of the same blocks.

Attention is ``scaled_dot_product_attention``. hvpkit's operators use its MATH backend, the only one with a second
derivative. In your own second derivatives, call the network inside ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvpkit._utils.typing import Seed
from hvpkit._utils.validation import check_count
from hvpkit.zoo.seeding import seeded


def tiny_gpt(
    *,
    vocab_size: int = 64,
    context: int = 32,
    width: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    seed: Seed = 0,
) -> GPT:
    r"""Make a small GPT-2: from tokens ``[B, T]`` to scores of the next token ``[B, T, vocab_size]``.

    Token and position embeddings, pre-norm blocks of causal attention and a perceptron of four times the width with
    GELU, a last LayerNorm, and scores by the matrix of the token embedding. No dropout. With V tokens, context C,
    width w and L layers, :math:`(V + C) w + L (12 w^2 + 13 w) + 2 w` parameters: 28,544 by default.

    Initialisation: matrices normal with standard deviation 0.02, the last ones of both branches of a block divided
    by the square root of 2 L, biases zero.

    Args:
        vocab_size: number of tokens.
        context: the largest sequence length.
        width: of the embeddings.
        num_layers: number of blocks.
        num_heads: attention heads; divides ``width``.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: a count is not positive, ``width`` is not a multiple of ``num_heads``. On call: a sequence longer
            than ``context``.

    Source:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019.

    Example:
        >>> tokens = torch.arange(10).view(2, 5)
        >>> scores = tiny_gpt()(tokens)
        >>> scores.shape
        torch.Size([2, 5, 64])
        >>> loss = F.cross_entropy(scores[:, :-1].mT, tokens[:, 1:])  # torch expects classes second
    """
    check_count("vocab_size", vocab_size, 1)
    check_count("context", context, 1)
    _check_blocks(width, num_layers, num_heads)
    with seeded(seed):
        return GPT(vocab_size, context, width, num_layers, num_heads)


def tiny_vit(
    *,
    image_size: int = 32,
    channels: int = 3,
    patch_size: int = 4,
    width: int = 48,
    num_layers: int = 4,
    num_heads: int = 4,
    num_classes: int = 10,
    seed: Seed = 0,
) -> ViT:
    r"""Make a small vision transformer for images ``[B, channels, image_size, image_size]``.

    Patches through a linear map, learned position embeddings, the blocks of :func:`tiny_gpt` without the causal
    mask, a last LayerNorm, the mean over patches, and a linear layer. No class token, no dropout. With P patches of
    D numbers, width w, L layers and K classes,
    :math:`(D + 1 + P) w + L (12 w^2 + 13 w) + 2 w + (w + 1) K` parameters: 119,098 by default.
    Initialisation as in :func:`tiny_gpt`.

    Args:
        image_size: height and width of the images.
        channels: of the images.
        patch_size: height and width of a patch; divides ``image_size``.
        width: of the embeddings.
        num_layers: number of blocks.
        num_heads: attention heads; divides ``width``.
        num_classes: number of outputs.
        seed: of the initial parameters; the global random state is not changed.

    Raises:
        ValueError: a count is not positive, ``image_size`` is not a multiple of ``patch_size`` or ``width`` of
            ``num_heads``.

    Source:
        Dosovitskiy et al., ICLR 2021, arXiv 2010.11929; the mean instead of a class token: Beyer, Zhai and
        Kolesnikov, arXiv 2205.01580.

    Example:
        >>> model = tiny_vit(image_size=8, channels=1, patch_size=2)  # for hvpkit.zoo.digits()
        >>> model(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    check_count("image_size", image_size, 1)
    check_count("channels", channels, 1)
    check_count("patch_size", patch_size, 1)
    check_count("num_classes", num_classes, 1)
    _check_blocks(width, num_layers, num_heads)
    if image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}")
    with seeded(seed):
        return ViT(image_size, channels, patch_size, width, num_layers, num_heads, num_classes)


def _check_blocks(width: int, num_layers: int, num_heads: int) -> None:
    check_count("width", width, 1)
    check_count("num_layers", num_layers, 1)
    check_count("num_heads", num_heads, 1)
    if width % num_heads:
        raise ValueError(f"width must be a multiple of num_heads, got {width} and {num_heads}")


class GPT(nn.Module):
    """Embeddings, causal blocks, and scores by the matrix of the token embedding."""

    def __init__(self, vocab_size: int, context: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, causal=True) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, vocab_size, bias=False)
        self.scores.weight = self.tokens.weight
        _initialise(self, num_layers)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > len(self.positions):
            raise ValueError(f"tokens: sequences of {length} do not fit into context={len(self.positions)}")
        x = self.blocks(self.tokens(tokens) + self.positions[:length])
        scores: Tensor = self.scores(self.norm(x))
        return scores


class ViT(nn.Module):
    """Embedded patches, blocks, and a linear layer on the mean over patches."""

    def __init__(
        self,
        image_size: int,
        channels: int,
        patch_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.empty((image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, causal=False) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        _initialise(self, num_layers)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        x = self.blocks(patches + self.positions)
        outputs: Tensor = self.head(self.norm(x).mean(1))
        return outputs


class Block(nn.Module):
    """Attention and a perceptron, each applied to its normalised input and added to it."""

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, causal=causal)
        self.perceptron_norm = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.perceptron(self.perceptron_norm(x))
        return y


class Attention(nn.Module):
    """Multi-head self-attention ``[B, T, width]``."""

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).view(*x.shape[:2], 3, self.num_heads, -1)  # [B, T, 3, heads, size]
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        joined: Tensor = self.join(mixed.transpose(1, 2).flatten(2))
        return joined


def _initialise(model: nn.Module, num_layers: int) -> None:
    """Set GPT-2's initial parameters; LayerNorms keep their own."""
    for name, parameter in model.named_parameters():
        if name.endswith(("join.weight", "perceptron.2.weight")):  # the last layer of a branch
            nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
