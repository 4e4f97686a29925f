import pytest
import torch

from refluence.errors import DataError
from refluence.evaluation import GroundTruth


@pytest.fixture
def truth():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 5, generator=generator) < 0.5
    loss = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    baseline = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return GroundTruth(masks, {"loss": loss, "margin": -loss}, {"loss": baseline, "margin": -baseline}, {"seed": 3})


def test_values_and_changes_are_means_over_seeds(truth):
    loss, baseline = truth.measurements["loss"], truth.baseline["loss"]
    for s in range(3):
        for k in range(4):
            mean = (loss[s, 0, k] + loss[s, 1, k]) / 2
            torch.testing.assert_close(truth.values()[s, k], mean)
            torch.testing.assert_close(truth.changes()[s, k], mean - sum(baseline[:, k]) / 6)
            torch.testing.assert_close(truth.changes("margin")[s, k], -(mean - sum(baseline[:, k]) / 6))
    assert (truth.n_subsets, truth.n_train, truth.n_test) == (3, 5, 4)


def test_some_tests(truth):
    some = truth.tests([3, 1])
    assert torch.equal(some.measurements["loss"], truth.measurements["loss"][:, :, [3, 1]])
    assert torch.equal(some.changes(), truth.changes()[:, [3, 1]])
    mask = torch.tensor([False, True, False, True])
    assert torch.equal(truth.tests(mask).values(), truth.values()[:, [1, 3]])


@pytest.mark.parametrize("rows", [[4], [-1], torch.tensor([True, False])])
def test_tests_that_do_not_exist_are_refused(truth, rows):
    with pytest.raises(DataError, match="test"):
        truth.tests(rows)


def test_a_frame_has_a_row_for_each_value(truth):
    frame = truth.to_frame("margin")
    assert list(frame.columns) == ["subset", "seed", "test", "removed", "value"]
    assert len(frame) == 3 * 2 * 4
    for row in frame.itertuples():
        assert row.value == truth.measurements["margin"][row.subset, row.seed, row.test].item()
        assert row.removed == int((~truth.masks[row.subset]).sum())


def test_saved_and_loaded(truth, tmp_path):
    loaded = GroundTruth.load(truth.save(tmp_path / "deep" / "truth.safetensors"))
    assert torch.equal(loaded.masks, truth.masks)
    for name in ("loss", "margin"):
        assert torch.equal(loaded.measurements[name], truth.measurements[name])
        assert torch.equal(loaded.baseline[name], truth.baseline[name])
    assert loaded.manifest == {"seed": 3}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["truth.safetensors"]


def test_refusals(truth, tmp_path):
    with pytest.raises(DataError, match="no measurement 'accuracy'"):
        truth.values("accuracy")
    with pytest.raises(DataError, match="no models trained on all examples"):
        GroundTruth(truth.masks, truth.measurements).changes()
    with pytest.raises(DataError, match="cannot be read"):
        GroundTruth.load(tmp_path / "nothing")
