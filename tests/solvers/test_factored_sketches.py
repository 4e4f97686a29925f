"""Kronecker and tensor sketches in `Sketched`: the formula with their P, every curvature, block and kind of layer."""

import itertools

import pytest
import torch
from torch import nn

import refluence as rf
from refluence.batches import Batches
from refluence.errors import PlanError
from refluence.gradients.capture import Capture
from refluence.solvers.projection import block_sketches
from support.problems import SAMPLES, SEED, close, damped, problem

CURVATURES = ("fisher", "ggn", "true_fisher", "mc_fisher", "hessian")
STRUCTURES = ("full", "module", "dict")
SKETCHES = {
    "kronecker": rf.sketches.Kronecker(3, 2, seed=4),
    "wide kronecker": rf.sketches.Kronecker(7, 6, seed=4),
    "tensor": rf.sketches.TensorSketch(8, seed=4),
    "wide tensor": rf.sketches.TensorSketch(64, seed=4),
}
OF_MATRICES = ("mlp", "mlp without bias", "frozen")
MODELS = ("mlp", "cnn", "transformer", "tied", "mlp without bias", "nested", "frozen")
CELLS = [
    (kind, model, curvature, STRUCTURES[i % 3], i % 2 == 0)
    for i, (kind, (model, curvature)) in enumerate(
        (kind, cell) for kind in SKETCHES for cell in itertools.product(MODELS, CURVATURES)
    )
    if (model in OF_MATRICES and STRUCTURES[i % 3] != "dict" if "kronecker" in kind else i % 2 == ("wide" in kind))
]


def fitted(kind, model, curvature="fisher", structure="full", weighted=False, batch_size=4, damping=0.05, **options):
    made = problem(model, weighted)
    influence = rf.Influence(
        made.task(),
        curvature=curvature,
        solver=rf.solvers.Sketched(SKETCHES[kind], **{"corrected": False, **options}),
        damping=damping,
        blocks=made.blocks(structure),
        batch_size=batch_size,
        progress=False,
        seed=SEED,
        samples=SAMPLES,
    )
    return made, influence.fit(made.train, weights=made.weights)


def matrices(kind, made, structure):
    """Block → P."""
    groups = made.groups(structure)
    capture = Capture(made.task(), made.model, {k: tuple(v) for k, v in groups.items()}, Batches(made.train))
    sketches = block_sketches(SKETCHES[kind], list(groups))
    sizes = {name: parameter.numel() for name, parameter in made.model.named_parameters()}
    return {
        block: sketches[block].on(capture.matrices(block)).matrix(sum(sizes[name] for name in names))
        for block, names in groups.items()
    }


@pytest.mark.parametrize(("kind", "model", "curvature", "structure", "weighted"), CELLS)
def test_scores_and_products_are_those_of_the_explicit_sketch(kind, model, curvature, structure, weighted):
    made, influence = fitted(kind, model, curvature, structure, weighted)
    P = matrices(kind, made, structure)
    inverses = {
        block: P[block].T @ torch.linalg.inv(damped(P[block] @ C @ P[block].T, 0.05)) @ P[block]
        for block, C in made.curvatures(curvature, structure).items()
    }
    scores, own, products = made.expected(structure, inverses)
    close(influence.score(made.test).values, scores)
    close(influence.self_influence(), own)
    close(influence.inverse_hvp(made.test), products)


def test_every_curvature_meets_every_block_structure_and_model():
    tensors = [cell for cell in CELLS if "tensor" in cell[0]]
    for kinds in (tensors, CELLS):
        assert {cell[1] for cell in kinds} == set(MODELS)
        assert {cell[2] for cell in kinds} == set(CURVATURES)
    assert {cell[2:4] for cell in tensors} == set(itertools.product(CURVATURES, STRUCTURES))


@pytest.mark.parametrize("kind", SKETCHES)
def test_scores_do_not_depend_on_the_batches(kind):
    found = [fitted(kind, "mlp", "ggn", batch_size=size)[1] for size in (3, 11)]
    made = problem("mlp")
    close(found[0].score(made.test).values, found[1].score(made.test).values, rtol=1e-11)


@pytest.mark.parametrize("kind", ["kronecker", "wide tensor"])
@pytest.mark.parametrize("structure", ["full", "module"])
def test_a_loaded_fit_has_the_same_scores(kind, structure, tmp_path):
    made, influence = fitted(kind, "mlp", structure=structure, corrected=True, damping=1.0)
    influence.save(tmp_path / "fit")
    again = rf.Influence.load(tmp_path / "fit", made.task())
    assert again.plan.chosen.solver == rf.solvers.Sketched(SKETCHES[kind])
    assert torch.equal(again.score(made.test).values, influence.score(made.test).values)
    assert torch.equal(again.inverse_hvp(made.test), influence.inverse_hvp(made.test))


@pytest.mark.parametrize(
    ("model", "names"), [("transformer", ["layer.norm1.weight", "layer.norm2.bias"]), ("nested", ["scale"])]
)
def test_a_kronecker_sketch_refuses_what_is_no_outer_product_by_name(model, names):
    with pytest.raises(PlanError) as error:
        fitted("kronecker", model)
    for word in (*names, "Task(parameters=...)", "TensorSketch"):
        assert word in str(error.value)
    made = problem(model)
    chosen = [n for n in made.names if n.endswith("weight") and "norm" not in n and "body.0.1" not in n]
    influence = rf.Influence(
        made.task(parameters=chosen), solver=rf.solvers.Sketched(SKETCHES["kronecker"]), damping=9.0
    )
    assert influence.fit(made.train).score(made.test).values.abs().max() > 0


def test_without_the_weight_a_bias_is_no_outer_product():
    with pytest.raises(PlanError, match=r"the gradients of 0.bias are none"):
        fitted("kronecker", "mlp", structure="parameter")


def test_the_plan_counts_factors_and_not_entries():
    """A layer of a million entries, whose factors are 2,000 numbers."""
    model = nn.Linear(1000, 1000, bias=False)
    data = torch.randn(40, 1000), torch.randint(1000, (40,))

    def work(sketch):
        influence = rf.Influence(rf.Task(model), solver=rf.solvers.Sketched(sketch), damping=1.0, progress=False)
        return influence.plan_for(data, 10).chosen.work

    # 50 gradients, 2,000 numbers each by 16 rows or through a hash and three transforms, against 10⁶ entries each
    algebra = work(rf.sketches.TensorSketch(256)) - 50 * (4 * 2000 + 10 * 256 * 9)
    assert work(rf.sketches.Kronecker(16, 16)) - algebra == pytest.approx(50 * (2000 * 16 + 256), rel=1e-6)
    assert work(rf.sketches.SJLT(256)) > 50 * 4e6
