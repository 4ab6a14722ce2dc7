from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hvpkit import zoo
from hvpkit.zoo.transformer import GPT, Attention


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """With parameters so large that every part of the model shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return model


def test_scores_do_not_depend_on_later_tokens() -> None:
    model = lively(zoo.tiny_gpt())
    first = tokens(2, 12)
    second = first.clone()
    second[:, 7] = (first[:, 7] + 1) % 64
    before, after = model(first), model(second)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-12, atol=1e-12)
    assert bool(((before - after).abs().amax(-1) > 1e-3)[:, 7:].all()), "and on all the others they do"


def test_the_order_of_earlier_tokens_counts() -> None:
    model = lively(zoo.tiny_gpt(num_layers=1))  # with more the mask alone tells the order
    first = torch.tensor([[1, 2, 3, 4]])
    difference = model(first) - model(first[:, [1, 0, 2, 3]])
    assert bool((difference[:, -1].abs() > 1e-3).any())


def test_a_sequence_beyond_the_context_is_refused() -> None:
    for context in (1, 4):
        model = zoo.tiny_gpt(context=context)
        assert model(tokens(2, context)).shape == (2, context, 64)
        with pytest.raises(ValueError, match=f"context={context}"):
            model(tokens(2, context + 1))


def test_tokens_are_embedded_and_scored_by_one_matrix() -> None:
    model = zoo.tiny_gpt()
    assert isinstance(model, GPT)
    assert model.scores.weight is model.tokens.weight
    assert [name for name, _ in model.named_parameters() if "scores" in name] == []


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_a_softmax_over_scaled_products(causal: bool) -> None:
    module = lively(Attention(6, 2, causal=causal))
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    query, key, value = (x @ module.project.weight.mT + module.project.bias).split(6, dim=-1)
    mixed = torch.empty_like(x)
    for head in (slice(0, 3), slice(3, 6)):
        products = query[..., head] @ key[..., head].mT / math.sqrt(3)
        if causal:
            products = products.masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf)
        mixed[..., head] = products.softmax(-1) @ value[..., head]
    torch.testing.assert_close(module(x), mixed @ module.join.weight.mT + module.join.bias)


def test_every_pixel_and_the_place_of_a_patch_count() -> None:
    model = lively(zoo.tiny_vit(image_size=8, channels=1, patch_size=4))
    x = torch.randn(
        1, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True
    )
    gradient = torch.autograd.grad(model(x)[0, 0], x)[0]
    assert bool((gradient.abs() > 1e-9).all())
    assert float((model(x) - model(x.roll(4, dims=2))).detach().abs().max()) > 1e-3


def test_initial_parameters_are_those_of_gpt2() -> None:
    model = zoo.tiny_gpt(width=64, num_layers=8)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            std = 0.02 / 4 if name.endswith(("join.weight", "perceptron.2.weight")) else 0.02
            stderr = std / (2 * parameter.numel()) ** 0.5
            assert abs(float(parameter.detach().std()) - std) < 4.5 * stderr, name


def test_a_new_gpt_has_nearly_the_loss_of_a_guess() -> None:
    scores, targets = zoo.tiny_gpt()(tokens(8, 32)), tokens(8, 32, seed=1)
    loss = torch.nn.functional.cross_entropy(scores.mT, targets)
    assert abs(float(loss.detach()) - math.log(64)) < 0.1
