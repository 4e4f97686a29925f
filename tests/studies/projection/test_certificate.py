"""The study's numbers are those of dense formulas, and its certificates hold on a tiny problem."""

import numpy as np
import pytest
import torch

from refluence.errors import DataError
from refluence.studies.projection.certificate import COLUMNS, CertificateMeter, CertificateStudy, run
from refluence.studies.projection.grid import Sketching
from refluence.studies.projection.spectral import Spectral
from refluence.studies.projection.system import SketchedSystem
from refluence.theory import corrected_damping, damping_for
from support.projection import OPTIONS

N, K, D, M = 40, 130, 90, 24


@pytest.fixture(scope="module")
def dense():
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(0, -2, D, dtype=torch.float64)
    G, V = (torch.randn(size, D, generator=generator, dtype=torch.float64) * scale for size in (N, K))
    P = torch.randn(M, D, generator=generator, dtype=torch.float64) / M**0.5
    return G, V, P


def test_one_sketch_against_dense_formulas(dense):
    G, V, P = dense
    X = torch.cat([G, V])
    spectral = Spectral.of_gram(X @ X.T, N)
    C = G.T @ G / N
    target = damping_for(torch.linalg.eigvalsh(C), 10)
    A, B = G @ P.T, V @ P.T
    system = SketchedSystem(M, A.T @ A / N, A, B.T)
    found = dict(zip(COLUMNS, CertificateMeter(spectral, target).measure(system)["found"].tolist(), strict=True))

    mu = corrected_damping(torch.linalg.eigvalsh(A.T @ A / N), M, target)
    inverse = torch.linalg.inv(A.T @ A / N + mu * torch.eye(M))
    exact = V @ torch.linalg.solve(C + target * torch.eye(D), G.T)
    scores, s = B @ inverse @ A.T, B @ inverse @ inverse @ A.T
    own, of_train = (x @ inverse @ inverse * x for x in (B, A))
    errors = ((own.sum(1)[:, None] * of_train.sum(1) + s**2) / torch.trace(inverse @ inverse)).sqrt()
    away = (scores - exact).abs()
    assert found["covered"] == pytest.approx(float((away <= 1.959964 * errors).double().mean()), abs=1e-3)
    assert found["spread"] == pytest.approx(float((away / errors).square().mean().sqrt()), rel=1e-6)
    assert found["error"] == pytest.approx(float(away.norm() / exact.norm()), rel=1e-6)
    assert found["violations"] == 0
    assert found["bound"] > found["error"]
    assert 0.9 <= found["share"] <= 1


def test_certificates_hold_on_digits(tmp_path):
    options = CertificateStudy(OPTIONS, Sketching(num_trials=12), dimension=8, ratios=(1.5, 4))
    summary = run(options, tmp_path / "study", progress=False)
    assert summary["violations"] == 0
    assert summary["pairs"] == 60 * 12 * 24
    assert summary["m"] == [12, 32]
    assert np.all(np.array(summary["covered"]) > 0.85)
    assert summary["error"][1] < summary["error"][0]
    assert summary["factor"][1] < summary["factor"][0]
    again = run(options, tmp_path / "study", progress=False)
    for name in ("covered", "spread", "factor", "violations", "damping"):
        assert again[name] == summary[name]
    # Twelve tests are too few for an order statistic.
    assert np.isnan(summary["held"]).all()


def test_bad_settings():
    with pytest.raises(DataError, match="ratios must all be above 1"):
        CertificateStudy(ratios=(0.5,))
    with pytest.raises(DataError, match="dimension must be > 0"):
        CertificateStudy(dimension=0)
    with pytest.raises(DataError, match="have rank 40"):
        CertificateStudy(dimension=30).sizes(40)
