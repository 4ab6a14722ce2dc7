from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import hvpkit as hk
from hvpkit.block_spectra import grouped
from hvpkit.curvature.batches import MODES
from hvpkit.curvature.block_diagonal import BlockDiagonal
from hvpkit.results.eigen import Status


def network(dtype=torch.float64):
    torch.manual_seed(3)
    layers = [nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)]
    net = nn.Sequential(*layers).to(dtype)
    x, y = torch.randn(90, 6, dtype=torch.float64).to(dtype), torch.randint(0, 3, (90,))
    objective, params = hk.from_module(net, nn.CrossEntropyLoss())
    return objective, params, (x, y)


@pytest.fixture(scope="module")
def args():
    return network()


@pytest.fixture(scope="module")
def found(args):
    return hk.blocks(*args, density=True, num_steps=40, batch_size=32)


def dense(args, names):
    """The block by double backward through all data at once."""
    objective, params, data = args
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items()}
    value = objective(leaves, data).mean()
    chosen = [leaves[name] for name in names]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, chosen, create_graph=True)])
    rows = [torch.autograd.grad(g, chosen, retain_graph=True) for g in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def test_ends_are_those_of_dense_blocks_within_tol_and_intervals(args, found):
    assert found.converged
    for block in found:
        values = torch.linalg.eigvalsh(dense(args, block.parameters))
        ends = block.extremes
        for pair, exact in ((ends.smallest, float(values[0])), (ends.largest, float(values[-1]))):
            assert abs(pair.value - exact) <= 0.01 * abs(exact) + 1e-12
            assert exact in pair.interval
        assert ends.largest.value == pytest.approx(float(values[-1]), rel=1e-6)  # 40 steps for the density


def test_vectors_are_eigenvectors_of_the_blocks(args, found):
    for block in found:
        matrix, pair = dense(args, block.parameters), block.extremes.largest
        residual = torch.linalg.vector_norm(matrix @ pair.vector - pair.value * pair.vector)
        assert float(residual) <= pair.residual_norm + 1e-12
        assert float(torch.linalg.vector_norm(pair.vector)) == pytest.approx(1)


def test_traces_are_those_of_dense_blocks_within_their_standard_errors(args, found):
    for block in found:
        exact = float(dense(args, block.parameters).trace())
        assert abs(block.trace.value - exact) <= 4 * block.trace.stderr + 1e-12
        assert block.trace.stderr < 0.1 * abs(exact)


def test_trace_is_unbiased(args):
    exact = float(dense(args, ("2.weight", "2.bias")).trace())
    runs = [hk.blocks(*args, by=["2.*"], seed=seed, num_probes=4, memory_limit=0) for seed in range(40)]
    estimates = torch.tensor([run["2.*"].trace.value for run in runs], dtype=torch.float64)
    assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / 40**0.5
    mean_square = sum(run["2.*"].trace.stderr ** 2 for run in runs) / 40
    assert 0.5 < mean_square**0.5 / float(estimates.std()) < 2


def test_density_is_the_spectrum(args, found):
    for block in found:
        values = torch.linalg.eigvalsh(dense(args, block.parameters))
        assert block.density.n == block.n == len(values)
        mean = block.density.expectation(lambda x: x**2).value
        # one random probe: its second moment is off by about sqrt(2 tr A^4) / tr A^2
        reach = 4 * float((2 * (values**4).sum()).sqrt()) / block.n
        assert abs(mean - float((values**2).mean())) <= reach
        assert float(block.density.nodes[-1]) == pytest.approx(float(values[-1]), rel=1e-6)


def test_density_of_few_rows_is_exact(args, found):
    block = found["4"]
    assert block.n == 39  # at most the steps and the probes
    values = torch.linalg.eigvalsh(dense(args, block.parameters))
    torch.testing.assert_close(block.density.nodes, values, atol=1e-12, rtol=0)
    torch.testing.assert_close(block.density.weights, torch.full_like(values, 1 / 39))
    assert block.trace.status is block.density.status is Status.INVARIANT_SUBSPACE
    assert block.trace.stderr == 0
    assert block.trace.value == pytest.approx(float(values.sum()))


def test_blocks_share_passes(found):
    alone = [block.extremes.num_matvecs for block in found]
    assert found.num_passes < sum(alone) / 1.5
    assert found.num_passes <= max(alone) + 2


@pytest.mark.parametrize("mode", MODES)
def test_products_are_those_of_single_blocks_in_each_mode(args, mode):
    H = hk.hessian(*args, mode=mode, batch_size=32)
    groups = grouped(H.terms[0][1].problem.layout.names, "module")
    diagonal = BlockDiagonal(H, tuple(groups), tuple(groups.values()))
    torch.manual_seed(0)
    widths = (2, 0, 1)
    columns = [
        torch.randn(op.n, k, dtype=op.dtype) for op, k in zip(diagonal.operators(), widths, strict=True)
    ]
    tolerance = 1e-6 if mode == "finite-difference" else 1e-12
    for _ in range(3):  # fresh graphs, graphs to be held, held graphs
        images = diagonal.products(columns)
        for image, given, op in zip(images, columns, diagonal.operators(), strict=True):
            assert image.shape == given.shape
            torch.testing.assert_close(image, dense(args, op.layout.names) @ given, atol=tolerance, rtol=0)


def test_operator_of_a_block_is_that_of_wrt(args):
    H = hk.hessian(*args)
    groups = grouped(H.terms[0][1].problem.layout.names, "module")
    op = BlockDiagonal(H, tuple(groups), tuple(groups.values())).operators()[1]
    alone = hk.hessian(*args, wrt="2.*")
    torch.testing.assert_close(op.to_dense(), alone.to_dense(), atol=1e-12, rtol=0)
    assert op.layout == alone.layout


def test_same_seed_gives_the_same_bits_and_another_one_does_not(args):
    one, two, other = (hk.blocks(*args, density=True, num_steps=10, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(one, two, other, strict=True):
        assert a.extremes.largest.value == b.extremes.largest.value
        assert torch.equal(a.extremes.vectors, b.extremes.vectors)
        assert torch.equal(a.density.nodes, b.density.nodes)
        assert a.trace.value == b.trace.value
        assert not torch.equal(a.extremes.vectors, c.extremes.vectors)


def test_single_precision_agrees(args):
    single = hk.blocks(*network(torch.float32))
    for block in single:
        values = torch.linalg.eigvalsh(dense(args, block.parameters))
        assert block.extremes.largest.value == pytest.approx(float(values[-1]), rel=0.02)


def test_names_by_module_and_parameter():
    names = ("stem.weight", "stem.bias", "body.0.weight", "scale")
    assert grouped(names, "module") == {"stem": (0, 1), "body.0": (2,), "scale": (3,)}
    assert grouped(names, "parameter") == {name: (place,) for place, name in enumerate(names)}
    assert grouped(("",), "module") == grouped(("",), "parameter") == {"params": (0,)}


def test_globs_are_blocks_in_their_order_and_leave_the_rest_out(args):
    found = hk.blocks(*args, by=["4.*", "0.weight"], trace=False)
    assert found.names == ("4.*", "0.weight")
    assert found["0.weight"].parameters == ("0.weight",)
    assert found["4.*"].parameters == ("4.weight", "4.bias")
    assert found["4.*"].trace is None
    assert not found.traces
    assert not found.densities
    values = torch.linalg.eigvalsh(dense(args, ("0.weight",)))
    assert found["0.weight"].extremes.largest.value == pytest.approx(float(values[-1]), rel=0.01)


def test_one_tensor_is_one_block():
    found = hk.blocks(
        lambda p, batch: 0.5 * (batch @ p) ** 2, torch.ones(2), torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    )
    assert found.names == ("params",)
    assert found["params"].extremes.largest.value == pytest.approx(8)
    assert found["params"].trace.value == pytest.approx(10)


def test_scalar_and_empty_parameters():
    def loss_fn(p, batch):
        return 0.5 * (batch @ p["w"]) ** 2 + p["b"] ** 2 + p["none"].sum()

    params = {"w": torch.zeros(2), "b": torch.tensor(0.0), "none": torch.zeros(0, 3)}
    data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    found = hk.blocks(loss_fn, params, data, by="parameter", density=True)
    assert found.names == ("w", "b")
    assert found["b"].extremes.smallest.value == pytest.approx(2)
    assert found["b"].trace.value == pytest.approx(2)
    assert found["w"].density.nodes.tolist() == pytest.approx([2.0, 8.0])


def test_complex_parameters_are_real_coordinates():
    params = {"z": torch.ones(2, dtype=torch.complex128), "w": torch.ones(3, dtype=torch.float64)}
    data = torch.ones(4, 1, dtype=torch.float64)
    found = hk.blocks(lambda p, batch: (p["z"].abs() ** 2).sum() + (batch @ p["w"][:1]) ** 2, params, data)
    assert found["z"].n == 4
    assert found["z"].trace.value == pytest.approx(8)


def test_block_without_curvature_is_zero():
    def loss_fn(p, batch):
        return p["a"].sum() * batch[:, 0] + 0.5 * (batch @ p["b"]) ** 2

    data = torch.eye(4, dtype=torch.float64)
    params = {"a": torch.ones(200, dtype=torch.float64), "b": torch.ones(4, dtype=torch.float64)}
    found = hk.blocks(loss_fn, params, data, density=True, num_steps=20)
    assert found["a"].extremes.largest.value == found["a"].extremes.smallest.value == 0
    assert found["a"].trace.value == 0
    assert found["b"].extremes.largest.value == pytest.approx(0.25)
    assert found.converged


def test_limit_of_matvecs_is_a_status_of_the_blocks_it_stops(args):
    found = hk.blocks(*args, tol=1e-9, max_matvecs=8, num_probes=2)
    assert not found.converged
    for block in found:
        assert block.extremes.status is Status.MAX_MATVECS
        assert block.extremes.num_matvecs <= 8
        largest = float(torch.linalg.eigvalsh(dense(args, block.parameters))[-1])
        assert largest in block.extremes.largest.interval
        assert block.trace.status is Status.COMPLETED


def test_time_limit_is_a_status(args):
    found = hk.blocks(*args, time_limit=1e-9)
    assert not found.converged
    for block in found:
        assert block.extremes.status is Status.TIME_LIMIT
        assert block.trace.status is Status.TIME_LIMIT
        assert block.trace.stderr == float("inf")


def test_time_limit_ends_a_long_run(args, monkeypatch):
    looks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: 1e6 + 1e-3 * next(looks))
    found = hk.blocks(*args, density=True, num_steps=50, time_limit=0.05, batch_size=1)
    monkeypatch.undo()
    assert next(looks) < 20_000
    assert {block.extremes.status for block in found} <= {Status.TIME_LIMIT, Status.CONVERGED}
    assert Status.TIME_LIMIT in {block.density.status for block in found}


def test_block_that_is_not_finite_does_not_stop_the_others():
    def loss_fn(p, batch):
        # the second derivative of |x|^1.5 at 0 is infinite
        return 0.5 * (batch @ p["good"]) ** 2 + p["bad"].abs().pow(1.5).sum()

    params = {"good": torch.ones(4, dtype=torch.float64), "bad": torch.zeros(4, dtype=torch.float64)}
    found = hk.blocks(
        loss_fn, params, torch.eye(4, dtype=torch.float64), mode="reverse-over-reverse", by="parameter"
    )
    assert found["bad"].extremes.status is Status.NON_FINITE
    assert "batch 0" in found["bad"].extremes.message
    assert found["bad"].trace.status is Status.NON_FINITE
    assert found["good"].extremes.largest.value == pytest.approx(0.25)


def test_arguments_stay_as_they_are(args):
    objective, params, data = args
    before = {name: leaf.clone() for name, leaf in params.items()}
    state = torch.get_rng_state()
    hk.blocks(objective, params, data, trace=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(params[name], leaf) and leaf.grad is None for name, leaf in before.items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "layer"}, ValueError, "by must be 'module', 'parameter', or a list of globs"),
        ({"by": "0.*"}, ValueError, "by must be 'module', 'parameter', or a list of globs"),
        ({"by": 3}, TypeError, "by must be"),
        ({"by": [3]}, TypeError, "by must be"),
        ({"by": []}, ValueError, "by holds no glob"),
        ({"by": ["0.*", "head.*"]}, ValueError, "by: 'head.*' matches no parameter"),
        ({"by": ["0.*", "*.weight"]}, ValueError, "both match '0.weight'; blocks may not overlap"),
        ({"by": ["0.*", "0.*"]}, ValueError, "both match '0.weight'"),
        ({"density": 1}, TypeError, "density must be True or False"),
        ({"trace": "no"}, TypeError, "trace must be True or False"),
        ({"num_steps": 0}, ValueError, "num_steps must be"),
        ({"num_probes": 1}, ValueError, "num_probes must be"),
        ({"tol": 0.0}, ValueError, "tol must be"),
        ({"confidence": 1.0}, ValueError, "confidence must be"),
        ({"max_matvecs": 2}, ValueError, "max_matvecs must be at least"),
        ({"time_limit": -1.0}, ValueError, "time_limit must be"),
        ({"seed": "a"}, TypeError, "seed must be"),
        ({"mode": "reverse"}, ValueError, "mode must be one of"),
    ],
)
def test_bad_input_is_named(args, options, error, message):
    with pytest.raises(error) as caught:
        hk.blocks(*args, **options)
    assert message in str(caught.value)


def test_density_of_half_precision_is_refused():
    objective, params, data = network(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        hk.blocks(objective, params, data, density=True)


def test_summary_names_every_block(found):
    text = found.summary()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["0", "2", "4"]
    assert f"{found['0'].extremes.largest.value:.5g}" in lines[1]
    assert f"{found.num_passes} passes" in lines[-1]
    assert "3 blocks" in repr(found)
    assert "'2'" in repr(found["2"])
    assert len(found) == 3
    assert all(line.count("]  ") == 2 for line in lines[1:-1])  # wide intervals keep columns apart


def test_unknown_block_is_a_key_error(found):
    with pytest.raises(KeyError, match="no block is named '1'; there are 0, 2, 4"):
        found["1"]


def test_picture_has_a_panel_for_each_block(found, args):
    plt = pytest.importorskip("matplotlib.pyplot")
    panels = found.plot()
    assert [ax.get_title() for ax in panels] == ["0", "2", "4"]
    for ax, block in zip(panels, found, strict=True):
        line = ax.get_lines()[0]
        assert torch.equal(torch.from_numpy(line.get_ydata()), block.density.resolved().values)
        assert ax.get_yscale() == "log"
    assert len(panels[0].figure.axes) == 3
    assert found.plot(log=False)[0].get_yscale() == "linear"
    assert len(hk.plots.layers(found.extremes).get_yticks()) == 3
    plt.close("all")
    with pytest.raises(ValueError, match="density=True"):
        hk.blocks(*args, by=["4.*"]).plot()


def test_monitor_sees_every_pass_and_may_end_it() -> None:
    problem = network()
    seen: list[hk.BlocksProgress] = []
    found = hk.blocks(*problem, by="parameter", monitor=seen.append)
    assert [entry.num_matvecs for entry in seen] == [*range(1, found.num_passes + 1)]
    assert list(seen[-1].ends) == list(found.names)
    assert seen[-1].num_done == len(found)
    for name, ends in seen[-1].ends.items():
        assert ends.largest == pytest.approx(found[name].extremes.largest.value, rel=1e-3)

    def end(entry: hk.BlocksProgress) -> None:
        if entry.num_matvecs == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hk.blocks(*problem, monitor=end)
