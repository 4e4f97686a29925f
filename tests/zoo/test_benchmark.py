import os

import pytest
import torch

from refluence.errors import DataError
from refluence.zoo import benchmark as benchmark_module
from refluence.zoo import load_benchmark, load_dataset
from refluence.zoo.benchmark import flip_labels


@pytest.fixture
def trainings(monkeypatch, cache):
    """The recipes of the trainings so far, from an empty cache."""
    calls = []
    real = benchmark_module.train

    def counted(build, data, recipe, **options):
        calls.append(recipe)
        return real(build, data, recipe, **options)

    monkeypatch.setattr(benchmark_module, "train", counted)
    return calls


def load(**options):
    return load_benchmark("digits", "lr", progress=False, **options)


def weights(benchmark):
    return torch.cat([parameter.detach().flatten() for parameter in benchmark.task.model.parameters()])


def test_a_checkpoint_is_used_again(trainings, cache):
    first, second = load(), load()
    assert len(trainings) == 1
    assert (first.trained_now, second.trained_now) == (True, False)
    assert torch.equal(weights(first), weights(second))
    assert not second.task.model.training
    assert second.accuracy == first.accuracy >= 0.94
    assert second.train_loss == pytest.approx(first.train_loss)
    assert len(list((cache / "checkpoints").iterdir())) == 1


def test_retrain_trains_and_gives_the_same(trainings):
    first, second = load(), load(retrain=True)
    assert len(trainings) == 2
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize("change", [{"seed": 1}, {"l2": 0.01}, {"label_noise": 0.1}, {"n_train": 1000}])
def test_what_makes_another_model_trains_again(trainings, change):
    load()
    changed = load(**change)
    assert len(trainings) == 2
    assert changed.trained_now
    assert changed.task.l2 == change.get("l2", 0.0)
    load()
    load(**change)
    assert len(trainings) == 2  # both are kept


def test_the_test_rows_do_not_make_another_model(trainings):
    load()
    part = load(n_test=10)
    assert len(trainings) == 1
    assert len(part.test[1]) == 10


def test_another_version_trains_again(trainings, monkeypatch):
    load()
    monkeypatch.setattr("refluence.zoo.checkpoints.__version__", "9.9.9")
    load()
    assert len(trainings) == 2


def garbage(content):
    return b"garbage"


def one_bit(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def cut_short(content):
    return content[:-100]


@pytest.mark.parametrize("damage", [garbage, one_bit, cut_short])
def test_a_damaged_checkpoint_is_trained_again_with_a_notice(trainings, cache, damage):
    first = load()
    (path,) = (cache / "checkpoints").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"is damaged.*training again"):
        second = load()
    assert len(trainings) == 2
    assert torch.equal(weights(first), weights(second))
    load()
    assert len(trainings) == 2


def test_the_random_state_is_left_alone(trainings):
    before = torch.random.get_rng_state()
    load()
    load()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_label_noise_flips_a_seeded_share_before_training(trainings):
    clean = load_dataset("digits")
    noisy = load(label_noise=0.05)
    assert len(noisy.flipped) == 72 == round(0.05 * 1437)
    assert torch.equal((noisy.train[1] != clean.train[1]).nonzero().flatten(), noisy.flipped)
    assert torch.equal(noisy.test[1], clean.test[1])
    assert 0 <= noisy.train[1].min() <= noisy.train[1].max() <= 9
    assert torch.equal(load(label_noise=0.05).flipped, noisy.flipped)
    assert not torch.equal(load(label_noise=0.05, seed=1).flipped, noisy.flipped)
    assert "72 train rows were made wrong on purpose" in noisy.description
    assert len(load().flipped) == 0


def test_flipped_labels_spread_over_the_other_classes():
    wrong, rows = flip_labels(torch.zeros(9000, dtype=torch.long), 10, 1.0, seed=0)
    assert len(rows) == 9000
    counts = torch.bincount(wrong, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 850


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_label_noise(share):
    with pytest.raises(DataError, match="label_noise"):
        flip_labels(torch.zeros(3, dtype=torch.long), 10, share, seed=0)


def test_unknown_names(trainings):
    with pytest.raises(DataError, match=r"unknown data set 'cifar'.*digits, mnist"):
        load_benchmark("cifar", "mlp")
    with pytest.raises(DataError, match=r"no model 'vit'.*mlp, lr, cnn"):
        load_benchmark("digits", "vit")
    assert trainings == []


def test_the_presentation_shows_pictures(trainings):
    presentation = load().presentation
    assert presentation.kind == "image"
    assert list(presentation.class_names) == list("0123456789")


@pytest.mark.data
@pytest.mark.skipif("REFLUENCE_DATA" not in os.environ, reason="$REFLUENCE_DATA is not set: no MNIST files")
def test_the_published_mnist_mlp(cache):
    benchmark = load_benchmark("mnist", "mlp", progress=False)
    assert sum(parameter.numel() for parameter in benchmark.task.model.parameters()) == 109_386
    assert len(benchmark.train[1]) == 5000
    assert benchmark.accuracy >= 0.93
    assert "109,386 parameters" in benchmark.description
