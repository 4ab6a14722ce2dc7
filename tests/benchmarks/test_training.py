import pytest
import torch
from torch.nn import functional as F

import _problems as problems
from hvpkit.zoo import digits, digits_cnn


def plainly(make, data, num_epochs, lr):
    """Adam in random order, written out: the parameters and the losses of all steps."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make()
    x, y = data
    optimizer, g, losses = torch.optim.Adam(model.parameters(), lr=lr), torch.Generator().manual_seed(0), []
    for _ in range(num_epochs):
        for chosen in torch.randperm(len(x), generator=g).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return model.state_dict(), losses


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_recipe_gives_the_parameters_of_a_plain_loop(capsys):
    state, losses = plainly(digits_cnn, digits(), 2, 3e-3)
    torch.manual_seed(5)  # global random state has no part in it
    model = problems.train("digits CNN, early", problems.RECIPES["digits CNN, early"])
    assert same(model.state_dict(), state)
    recent = losses[0]
    for loss in losses[1:]:
        recent = 0.98 * recent + 0.02 * loss
    assert f"epoch 2, loss {recent:.3f}" in capsys.readouterr().out
    assert recent == pytest.approx(1.602, abs=2e-3)  # as when the references were made


def test_training_stops_in_the_step_that_reaches_the_target():
    data = digits()
    _, losses = plainly(digits_cnn, data, 1, 3e-3)
    recipe = problems.Recipe(lambda: data, digits_cnn, 3, target_loss=losses[0] + 1e-6)
    one_step = problems.train("one step", recipe)
    few = problems.Recipe(lambda: (data[0][:64], data[1][:64]), digits_cnn, 1)
    assert not same(one_step.state_dict(), problems.train("one batch", few).state_dict())
    moved = one_step.state_dict()["0.weight"] - digits_cnn().state_dict()["0.weight"]
    assert float(moved.abs().max()) <= 3e-3 * 1.001  # one step of Adam moves by at most lr


def test_training_by_epochs_stops_at_the_mean_loss_of_one(two_layers):
    x, y = two_layers.data()
    state, losses = plainly(two_layers.model, (x, y), 2, 3e-3)
    assert same(problems.train_by_epochs(two_layers.model, (x, y), 2).state_dict(), state)
    assert losses[0] > 0.01


def test_checkpoints_are_those_of_each_epoch_and_kept(two_layers, tmp_path):
    states = problems.checkpoints("two layers", tmp_path, 3)
    for num_epochs, state in enumerate(states, 1):
        assert same(state, plainly(two_layers.model, two_layers.data(), num_epochs, 1e-3)[0])
    assert (tmp_path / "epochs_two_layers.pt").exists()
    assert len(problems.checkpoints("two layers", tmp_path, 99)) == 3


def test_parameters_are_trained_once_and_kept(two_layers, tmp_path, monkeypatch):
    first = problems.load("two layers", tmp_path)
    monkeypatch.setattr(problems, "train", lambda *_: pytest.fail("trained again"))
    again = problems.load("two layers", tmp_path, torch.float64)
    assert not again.model.training
    assert again.x.dtype == again.model[0].weight.dtype == torch.float64
    assert torch.equal(again.model[0].weight.float(), first.model[0].weight)
    assert first.num_examples == len(two_layers.data()[1])


def test_problems_without_cifar10_are_those_without_its_folder(monkeypatch):
    monkeypatch.delenv("CIFAR10", raising=False)
    assert len(problems.available()) == len(problems.RECIPES) - 1
    monkeypatch.setenv("CIFAR10", "/somewhere")
    assert problems.available() == list(problems.RECIPES)
