import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refluence as rf
from refluence.errors import DataError
from refluence.training import fresh_model
from refluence.zoo import build_model, model_names
from refluence.zoo.models import AllCnn, Gpt, MusicTransformer, gpt, musictransformer
from refluence.zoo.tasks import pair_for, task_for

COUNTS = {
    ("digits", "mlp"): 4_810,
    ("digits", "lr"): 650,
    ("digits", "cnn"): 1_898,
    ("mnist", "mlp"): 109_386,
    ("mnist", "lr"): 7_850,
    ("mnist", "softmax"): 7_840,
    ("mnist", "cnn"): 9_098,
    ("mnist", "all_cnn"): 2_616,
    ("fashion_mnist", "mlp"): 109_386,
    ("fashion_mnist", "lr"): 7_850,
    ("fashion_mnist", "softmax"): 7_840,
    ("fashion_mnist", "cnn"): 9_098,
    ("fashion_mnist", "all_cnn"): 2_616,
    ("cifar2", "resnet9"): 4_825_154,
    ("cifar2", "cnn"): 3_442,
    ("cifar2", "mlp"): 401_730,
    ("cifar2", "lr"): 6_146,
    ("cifar10", "resnet9"): 4_829_258,
    ("cifar10", "cnn"): 11_642,
    ("cifar10", "mlp"): 402_250,
    ("cifar10", "lr"): 30_730,
    ("maestro", "musictransformer"): 13_115_782,
    ("shakespeare", "gpt"): 119_168,
    ("shakespeare", "nanogpt"): 10_745_088,
}
IMAGES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28)}
IMAGES |= {"cifar2": (3, 32, 32), "cifar10": (3, 32, 32)}
CLASSES = {"cifar2": 2, "maestro": 390, "shakespeare": 65}
EVERY = pytest.mark.parametrize(("dataset", "model"), COUNTS, ids=str)
# the other sets have the same networks with another number of inputs or classes
DIFFERENT = pytest.mark.parametrize(
    ("dataset", "model"), [pair for pair in COUNTS if pair[0] not in ("fashion_mnist", "cifar10")], ids=str
)


def examples(dataset, n, length=12, seed=0):
    """Random images and labels, or random tokens and those that come next."""
    generator = torch.Generator().manual_seed(seed)
    classes = CLASSES.get(dataset, 10)
    if dataset in IMAGES:
        images = torch.randn(n, *IMAGES[dataset], generator=generator)
        return images, torch.randint(classes, (n,), generator=generator)
    tokens = torch.randint(classes, (n, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def build(dataset, model, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(dataset, model).eval()


@EVERY
def test_parameters_and_shapes(dataset, model):
    network = build(dataset, model)
    assert sum(parameter.numel() for parameter in network.parameters()) == COUNTS[dataset, model]
    inputs, targets = examples(dataset, 3)
    with torch.no_grad():
        assert network(inputs).shape == (*targets.shape, CLASSES.get(dataset, 10))


def test_every_model_of_the_zoo_is_tested_here():
    datasets = {dataset for dataset, _ in COUNTS}
    assert {(dataset, model) for dataset in datasets for model in model_names(dataset)} == set(COUNTS)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(DataError, match=r"'gpt'.*mlp, lr, cnn"):
        build_model("digits", "gpt")
    with pytest.raises(DataError, match=r"'nothing'.*digits, mnist"):
        model_names("nothing")


ATTRIBUTED = {
    "resnet9": ["head.*", "blocks.2.shortcut.*", "stem.1.*"],
    "musictransformer": ["head.bias", "layers.5.attention.distances", "layers.5.norm2.*", "layers.0.norm1.*"],
    "nanogpt": ["tokens.weight", "layers.5.norm2.weight", "layers.0.attention.joint.weight"],
    "mlp": ["*.bias", "7.*", "4.*"],
}


@DIFFERENT
def test_scores_of_every_model_are_those_of_single_gradients(dataset, model):
    """τ = g_testᵀ (GᵀG/n + λ)⁻¹ g_train of a loop of single backward passes."""
    network = build(dataset, model).double()
    names = ATTRIBUTED.get(model) if COUNTS[dataset, model] > 20_000 else None
    made = task_for(model, network)
    task = rf.Task(made.model, made.loss, made.forward, parameters=names)

    def rows(n, seed):
        return pair_for(
            model, tuple(x.double() if x.is_floating_point() else x for x in examples(dataset, n, seed=seed))
        )

    train, test = rows(5, 0), rows(2, 1)
    influence = rf.Influence(task, damping=rf.RelativeDamping(0.1), progress=False).fit(train)
    chosen = [dict(network.named_parameters())[name] for name in task.parameter_names()]

    def gradients(data):
        found = []
        for i in range(len(data[1])):
            row = tuple(part[i : i + 1] for part in data)
            parts = torch.autograd.grad(task.losses(task.output(network, row), row).sum(), chosen)
            found.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(found)

    g, h = gradients(train), gradients(test)
    assert (g.norm(dim=1) > 0).all()
    expected = torch.linalg.solve(g @ g.T / len(g) + influence.damping * torch.eye(len(g)), g @ h.T).T
    torch.testing.assert_close(
        influence.score(test).values.double(), expected, rtol=1e-8, atol=1e-8 * expected.abs().max()
    )


@DIFFERENT
def test_a_model_drawn_anew_starts_from_the_same_distribution(dataset, model):
    """Retraining without the zoo's own builder gives the same ensemble of models."""
    first, other = build(dataset, model), build(dataset, model, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        fresh = dict(fresh_model(first).named_parameters())
    for name, parameter in other.named_parameters():
        if parameter.numel() < 300 or parameter.std() == 0:
            assert fresh[name].std().item() == pytest.approx(parameter.std().item(), rel=0.6) or parameter.numel() < 30
        else:
            assert not torch.equal(fresh[name], dict(first.named_parameters())[name])
            assert fresh[name].std().item() == pytest.approx(parameter.std().item(), rel=0.15)
            assert fresh[name].abs().max().item() == pytest.approx(parameter.abs().max().item(), rel=0.5)


@pytest.mark.parametrize(("t", "context"), [(1, 1), (5, 5), (6, 9), (1, 4)])
def test_relative_scores_by_skewing_are_the_explicit_ones(t, context):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, t, 4, generator=generator, dtype=torch.float64)
    distances = torch.randn(context, 4, generator=generator, dtype=torch.float64)
    i, j = torch.tril_indices(t, t)
    embedded = distances[context - 1 - (i - j)]  # one vector a pair: O(t²d)
    explicit = (queries[:, :, i] * embedded).sum(-1)
    torch.testing.assert_close(musictransformer.relative_scores(queries, distances)[:, :, i, j], explicit)


def test_relative_attention_is_the_explicit_one():
    torch.manual_seed(0)
    attention = musictransformer.RelativeAttention(12, heads=3, context=9, dropout=0.5).double().eval()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = (part.view(2, 7, 3, 4) for part in attention.joint(x).split(12, dim=-1))
    mixed = torch.zeros(2, 7, 3, 4, dtype=torch.float64)
    for head in range(3):
        for i in range(7):
            keys = k[:, : i + 1, head] + attention.distances[[8 - (i - j) for j in range(i + 1)]]
            weights = ((keys * q[:, i : i + 1, head]).sum(-1) / math.sqrt(4)).softmax(-1)
            mixed[:, i, head] = (weights[..., None] * v[:, : i + 1, head]).sum(1)
    torch.testing.assert_close(attention(x), attention.out(mixed.reshape(2, 7, 12)))


def as_torch_layer(layer, width, heads, hidden, **options):
    """torch's own encoder layer with the weights of one of ours."""
    own = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True, **options).double().eval()
    pairs = [
        (own.self_attn.in_proj_weight, layer.attention.joint.weight),
        (own.self_attn.in_proj_bias, layer.attention.joint.bias),
        (own.self_attn.out_proj.weight, layer.attention.out.weight),
        (own.self_attn.out_proj.bias, layer.attention.out.bias),
        (own.linear1.weight, layer.widen.weight),
        (own.linear1.bias, layer.widen.bias),
        (own.linear2.weight, layer.narrow.weight),
        (own.linear2.bias, layer.narrow.bias),
        (own.norm1.weight, layer.norm1.weight),
        (own.norm2.weight, layer.norm2.weight),
    ]
    with torch.no_grad():
        for target, source in pairs:
            assert (target is None) == (source is None)
            if target is not None:
                source.copy_(torch.randn_like(source) / 4)
                target.copy_(source)
    return own


def causal(t):
    return torch.ones(t, t, dtype=torch.bool).triu(1)


def test_a_layer_of_the_music_transformer_without_distances_is_torchs_own():
    torch.manual_seed(0)
    layer = musictransformer.Layer(12, heads=3, hidden=20, context=7, dropout=0.5).double().eval()
    own = as_torch_layer(layer, 12, 3, 20)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.attention.distances.zero_()
        torch.testing.assert_close(layer(x), own(x, src_mask=causal(7)))


def test_a_layer_of_the_gpt_is_torchs_own():
    torch.manual_seed(0)
    layer = gpt.Layer(12, heads=3, depth=2, dropout=0.5).double().eval()
    own = as_torch_layer(layer, 12, 3, 48, bias=False, norm_first=True, activation=F.gelu)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), own(x, src_mask=causal(7)))


def small_transformers():
    torch.manual_seed(0)
    return [
        Gpt(vocabulary=11, context=9, depth=2, width=12, heads=3, dropout=0.3).eval(),
        MusicTransformer(vocabulary=11, context=9, depth=2, width=12, heads=3, hidden=20, dropout=0.3).eval(),
    ]


@pytest.mark.parametrize("network", small_transformers(), ids=lambda network: type(network).__name__)
class TestTransformers:
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])

    def test_a_later_token_changes_no_earlier_logits(self, network):
        changed = self.tokens.clone()
        changed[:, 5] = 0
        before, after = network(self.tokens), network(changed)
        torch.testing.assert_close(after[:, :5], before[:, :5])
        assert (after[:, 5:] - before[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-4

    def test_the_order_of_the_tokens_counts(self, network):
        swapped = self.tokens[:, [1, 0, *range(2, 8)]]
        assert (network(swapped) - network(self.tokens))[:, -1].abs().max() > 1e-4

    def test_dropout_is_for_training_only(self, network):
        assert torch.equal(network(self.tokens), network(self.tokens))
        try:
            network.train()
            assert not torch.equal(network(self.tokens), network(self.tokens))
        finally:
            network.eval()


def test_the_logits_after_the_last_event_alone():
    network = small_transformers()[1]
    tokens = TestTransformers.tokens
    torch.testing.assert_close(network(tokens, last=True), network(tokens)[:, -1:])


def test_sinusoids():
    table = musictransformer.sinusoids(20, 6)
    for position in (0, 1, 19):
        for i in (0, 2, 4):
            angle = position / 10_000 ** (i / 6)
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_nanogpt_counts_positions_and_the_tied_embedding_once():
    network = build("shakespeare", "nanogpt")
    names = dict(network.named_parameters())
    assert names["positions.weight"].shape == (256, 384)
    assert names["tokens.weight"].shape == (65, 384)
    assert not any("bias" in name or "head" in name for name in names)
    scaled = names["layers.3.narrow.weight"].std().item()
    assert scaled == pytest.approx(0.02 / math.sqrt(12), rel=0.02)


def test_the_layers_of_koh_and_liangs_network():
    network = AllCnn(1, 10)
    sides, x = [], torch.randn(2, 1, 28, 28)
    for layer in network.features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sides.append((x.shape[1], x.shape[-1]))
        else:
            assert isinstance(layer, nn.Tanh)
    assert sides == [(8, 26), (8, 12), (8, 10), (8, 4), (8, 2), (10, 2)]
    weight = network.features[2].weight
    assert weight.abs().max() <= 2 * 2 / math.sqrt(72)


def test_resnet9_normalises_by_its_running_statistics():
    network = build("cifar2", "resnet9")
    images, _ = examples("cifar2", 4)
    assert network.blocks(network.stem(images)).shape == (4, 512, 8, 8)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))
    before = network.blocks[0].residual[1].running_mean.clone()
    network.train()(images)
    assert not torch.equal(network.blocks[0].residual[1].running_mean, before)
    assert all(layer.bias is None for layer in network.modules() if isinstance(layer, nn.Conv2d))
