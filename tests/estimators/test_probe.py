from __future__ import annotations

import pytest
import torch

import hvpkit as hk
from hvpkit.estimators.probe import KINDS, UNIT, draw, unit_order
from problems import matrix

N = 12
A = matrix([-2.0, *torch.linspace(-1, 1, N - 2).tolist(), 5.0])
OP = hk.aslinearoperator(A)

VARIANCES = {
    "rademacher": 2 * (A.square().sum() - A.diagonal().square().sum()),
    "gaussian": 2 * A.square().sum(),
    "sphere": 2 * (A.square().sum() - A.trace() ** 2 / N) * N / (N + 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_forms_have_the_mean_and_the_variance_of_their_kind(kind: str) -> None:
    probes = draw(OP, kind, 0, range(8000))
    forms = ((probes @ A) * probes).sum(dim=1)
    assert float((forms.mean() - A.trace()).abs()) < 4 * float(forms.std()) / 8000**0.5
    assert float(forms.var()) == pytest.approx(float(VARIANCES[kind]), rel=0.1)
    assert float((probes.mT @ probes / 8000 - torch.eye(N)).abs().max()) < 0.1


def test_entries_are_what_the_kinds_are_called() -> None:
    assert set(draw(OP, "rademacher", 1, range(3)).unique().tolist()) == {-1.0, 1.0}
    assert draw(OP, "sphere", 1, range(3)).square().sum(dim=1).tolist() == pytest.approx([N] * 3)
    gaussian = draw(OP, "gaussian", 1, range(400)).flatten()
    assert float(gaussian.pow(4).mean()) == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize("kind", [*KINDS, UNIT])
def test_probe_is_a_function_of_its_seed_and_number(kind: str) -> None:
    rows = draw(OP, kind, 3, range(6))
    assert torch.equal(rows[2:5], draw(OP, kind, 3, range(2, 5)))
    assert not torch.equal(rows, draw(OP, kind, 4, range(6)))
    assert len(rows.unique(dim=0)) == 6


def test_unit_probes_are_every_column_of_the_identity_once() -> None:
    rows = draw(OP, UNIT, 5, range(N))
    assert torch.equal(rows.sum(dim=0), torch.ones(N, dtype=torch.float64))
    assert torch.equal(rows.argmax(dim=1), unit_order(N, 5))
