import pytest
import torch
from torch import nn

import profile_solve
from _problems import Problem


@pytest.mark.parametrize("method", ["multifidelity", "lanczos"])
def test_parts_make_up_the_whole(method):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 5, generator=g), torch.randint(0, 3, (300,), generator=g)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    run = profile_solve.profile(Problem("two layers", model, x.double(), y, 100), method)
    assert run["status"] in ("converged", "invariant-subspace")
    assert sum(run["parts"].values()) == pytest.approx(run["seconds"])
    assert min(run["parts"].values()) >= 0
    calls, samples = dict(run["calls"]), run["calls"]["products of samples"]
    assert calls["first"] == calls["second"] == 1
    whole = sum(calls.values()) - samples
    if method == "lanczos":
        assert (samples, run["passes"]) == (0, whole)
    else:
        assert samples > 0
        assert whole < run["passes"] <= whole + samples + 1
    shown = profile_solve.table({"problems": {"two layers": {method: run}}}).splitlines()[-1]
    assert shown.startswith(f"| two layers, {method} |")
    assert f"({calls['later']})" in shown
