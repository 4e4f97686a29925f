"""Stores of what workers of a cluster make: each has its own stretches."""

import pickle

import pytest
import torch

import refluence as rf
from refluence.gradients.kernels import held_blocks
from support.clustered import TEST, N, data, influence

distributed = pytest.importorskip("distributed", reason="a cluster needs refluence[distributed]")

WEIGHTS = torch.linspace(0, 2, N)


@pytest.fixture(scope="module")
def client():
    """Two workers, which are threads of this process."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as made,
    ):
        yield made


@pytest.mark.parametrize(
    ("solver", "curvature"),
    [(rf.solvers.Identity(), "fisher"), (rf.solvers.Ekfac(), "mc_fisher")],
    ids=["rows", "sums"],
)
def test_workers_fill_one_store_and_read_it(solver, curvature, client, tmp_path):
    expected = (
        influence(solver=solver, curvature=curvature, damping=1.0).fit(data(), weights=WEIGHTS).score(TEST).values
    )
    for counts in ((0, N), (N, 0)):
        fit = influence(client, solver=solver, curvature=curvature, damping=1.0, store=tmp_path, shard_rows=32)
        found = fit.fit(data(), weights=WEIGHTS).score(TEST).values
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
        records = fit.diagnostics["store"]
        for record in records if isinstance(records, list) else [records]:
            assert (record["rows_read"], record["rows_made"]) == counts


def test_what_is_sent_of_held_rows_is_no_more_than_they_are(tmp_path):
    rows = influence(solver=rf.solvers.Gram(), store=tmp_path).fit(data())._fitted().rows
    assert len(pickle.dumps(held_blocks(rows, rows.groups))) < 1.5 * rows.matrix_bytes
