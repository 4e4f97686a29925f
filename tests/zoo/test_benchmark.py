import os
import pickle

import pytest
import torch
import torch.nn.functional as F

import refluence as rf
from refluence.errors import DataError
from refluence.report.presentation import views
from refluence.zoo import benchmark as benchmark_module
from refluence.zoo import load_benchmark, load_dataset
from refluence.zoo.benchmark import flip_labels, load_untrained, token_names
from refluence.zoo.datasets import DataSplit, TokenFormat


@pytest.fixture
def trainings(monkeypatch, cache):
    """The recipes of the trainings so far, from an empty cache."""
    calls = []
    real = benchmark_module.train

    def counted(task, data, recipe, **options):
        calls.append(recipe)
        return real(task, data, recipe, **options)

    monkeypatch.setattr(benchmark_module, "train", counted)
    return calls


def load(**options):
    """Trained for a short time, unless it is asked otherwise."""
    length = {} if "steps" in options or "epochs" in options else {"epochs": 3}
    return load_benchmark("digits", "lr", progress=False, **length, **options)


def weights(benchmark):
    return torch.cat([parameter.detach().flatten() for parameter in benchmark.task.model.parameters()])


def test_a_checkpoint_is_used_again(trainings, cache):
    first, second = load(), load()
    assert len(trainings) == 1
    assert (first.trained_now, second.trained_now) == (True, False)
    assert torch.equal(weights(first), weights(second))
    assert not second.task.model.training
    assert second.accuracy == first.accuracy >= 0.9
    assert second.train_loss == pytest.approx(first.train_loss)
    assert len(list((cache / "checkpoints").iterdir())) == 1


def test_retrain_trains_and_gives_the_same(trainings):
    first, second = load(), load(retrain=True)
    assert len(trainings) == 2
    assert torch.equal(weights(first), weights(second))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"l2": 0.01}, {"label_noise": 0.1}, {"n_train": 1000}, {"epochs": 1}, {"steps": 5}]
)
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
    logits = part.task.model(part.test[0])
    assert part.accuracy == (logits.argmax(1) == part.test[1]).double().mean().item()
    assert part.test_loss == pytest.approx(F.cross_entropy(logits, part.test[1]).item())


def test_what_was_measured_is_kept_with_the_checkpoint(trainings, monkeypatch):
    first = load()
    monkeypatch.setattr(benchmark_module, "evaluate", None)  # a large model takes minutes to evaluate
    second = load()
    assert (second.accuracy, second.train_loss, second.test_loss) == (
        first.accuracy,
        first.train_loss,
        first.test_loss,
    )


def test_quick_runs(trainings):
    assert load(epochs=1).recipe.epochs == 1
    quick = load(steps=3)
    assert quick.recipe.steps == 3
    assert "3 steps" in quick.description
    assert quick.accuracy < load().accuracy


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


LETTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!$&',-.3:;?"


def spell(ids):
    return "".join(LETTERS[int(token)] for token in ids)


def name_events(ids):
    return " ".join(f"event {int(token)}" for token in ids)


@pytest.fixture
def sequences(monkeypatch, cache):
    """Sequences in the place of the real ones, which must be on the machine."""

    def split(name, n_train=None, n_test=None):
        vocabulary, decode = {"shakespeare": (65, spell), "maestro": (390, name_events)}[name]
        ids = torch.randint(vocabulary, (9, 13), generator=torch.Generator().manual_seed(0))
        pairs = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in (ids[:6], ids[6:])]
        return DataSplit(name, *pairs, (), None, "Made up", TokenFormat(vocabulary, 12, decode))

    monkeypatch.setattr(benchmark_module, "load_dataset", split)


def test_a_gpt_is_asked_for_every_next_token(sequences):
    benchmark = load_benchmark("shakespeare", "gpt", steps=4, progress=False)
    tokens, targets = benchmark.test
    logits = benchmark.task.model(tokens)
    assert logits.shape == (3, 12, 65)
    assert benchmark.test_loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    assert benchmark.accuracy == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
    assert f"Test loss {benchmark.test_loss:.3f}, accuracy of the next token" in benchmark.description
    assert "AdamW with step 0.003 falling to 0.0003" in benchmark.description


def test_the_music_transformer_is_asked_for_the_last_event_only(sequences):
    benchmark = load_benchmark("maestro", "musictransformer", steps=1, progress=False)
    tokens, targets = benchmark.train
    assert targets.shape == (6,)
    with torch.no_grad():
        every = benchmark.task.model(tokens)
    assert benchmark.train_loss == pytest.approx(F.cross_entropy(every[:, -1], targets).item(), rel=1e-5)
    task, train, test = load_untrained("maestro", "musictransformer")
    assert torch.equal(train[1], targets)
    assert test[1].shape == (3,)
    assert (
        task.describe()["forward"] == benchmark.task.describe()["forward"] != rf.Task(task.model).describe()["forward"]
    )
    assert pickle.loads(pickle.dumps(task)).forward is task.forward


def test_sequences_are_shown_as_text(sequences):
    benchmark = load_benchmark("shakespeare", "gpt", steps=1, progress=False)
    sample = tuple(part[0] for part in benchmark.train)
    (view,) = views([sample], benchmark.presentation)
    assert (view.kind, view.text) == ("text", spell(sample[0]))
    assert [benchmark.presentation.class_name(token) for token in (0, 1, 2)] == [repr("\n"), repr(" "), "a"]
    assert len(token_names(TokenFormat(65, 12, spell))) == 65


def test_wrong_labels_are_for_rows_with_one_label(sequences):
    with pytest.raises(DataError, match="label_noise needs one label a row"):
        load_benchmark("shakespeare", "gpt", label_noise=0.1)


def test_an_untrained_model_needs_no_checkpoint(trainings, cache):
    task, train, _ = load_untrained("digits", "lr", n_train=50, l2=0.25)
    assert (task.l2, len(train[1])) == (0.25, 50)
    assert trainings == []
    assert not (cache / "checkpoints").exists()


@pytest.mark.data
@pytest.mark.skipif("REFLUENCE_DATA" not in os.environ, reason="$REFLUENCE_DATA is not set: no MNIST files")
def test_the_published_mnist_mlp(cache):
    """By 8 of its 50 epochs, which are in test_recipes.py."""
    benchmark = load_benchmark("mnist", "mlp", epochs=8, progress=False)
    assert sum(parameter.numel() for parameter in benchmark.task.model.parameters()) == 109_386
    assert len(benchmark.train[1]) == 5000
    assert benchmark.accuracy >= 0.925
    assert "109,386 parameters" in benchmark.description
