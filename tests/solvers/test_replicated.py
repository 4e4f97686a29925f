"""Averages over independent sketches: the mean of their scores, and errors from their spread."""

import pytest
import torch

import refluence as rf
from refluence.errors import PlanError
from refluence.scoring import columns_of
from refluence.solvers.replicated import replicate_sketches, spread_errors
from support.problems import problem

KINDS = {
    "sjlt": rf.sketches.SJLT(8, seed=2),
    "tensor": rf.sketches.TensorSketch(8, seed=2),
    "kronecker": rf.sketches.Kronecker(3, 3, seed=2),
    "wide kronecker": rf.sketches.Kronecker(6, 6, seed=2),
}
kinds = pytest.mark.parametrize("kind", KINDS)
structures = pytest.mark.parametrize("structure", ["full", "module"])


def fitted(sketch, replicates, structure="full", corrected=True, damping=2.0, **options):
    made = problem("mlp", True)
    solver = rf.solvers.Sketched(sketch, corrected=corrected, replicates=replicates)
    influence = rf.Influence(made.task(), solver=solver, damping=damping, blocks=structure, progress=False, **options)
    return made, influence.fit(made.train, weights=made.weights)


@kinds
@structures
@pytest.mark.parametrize("corrected", [True, False])
def test_everything_is_the_mean_over_the_sketches(kind, structure, corrected):
    made, influence = fitted(KINDS[kind], 3, structure, corrected)
    single = [fitted(sketch, 1, structure, corrected)[1] for sketch in replicate_sketches(KINDS[kind], 3)]
    for ask in (
        lambda i: i.score(made.test).values,
        lambda i: i.self_influence(),
        lambda i: i.inverse_hvp(made.test),
        lambda i: torch.tensor(i.effective_dimension, dtype=torch.float64),
    ):
        mean = torch.stack([ask(one) for one in single]).mean(dim=0)
        torch.testing.assert_close(ask(influence), mean, rtol=1e-12, atol=1e-12)


def test_sketches_of_one_seed_are_nested_and_differ():
    few, many = replicate_sketches(KINDS["sjlt"], 2), replicate_sketches(KINDS["sjlt"], 5)
    assert many[:2] == few
    assert few[0] == KINDS["sjlt"]
    assert len({sketch.seed for sketch in many}) == 5
    assert not {s.seed for s in many[1:]} & {s.seed for s in replicate_sketches(rf.sketches.SJLT(8, seed=3), 5)}


def test_errors_are_the_shape_of_the_formula_at_the_size_of_the_spread():
    generator = torch.Generator().manual_seed(0)
    scores, formula = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    formula[:, 1, 2] = scores[:, 1, 2] = 0.0
    found = spread_errors(list(scores), [part.abs() for part in formula])
    shape = formula.square().mean(dim=0)
    ratios = [scores[:, i, j].var(unbiased=True) / shape[i, j] for i in range(3) for j in range(5) if (i, j) != (1, 2)]
    expected = (shape * torch.stack(ratios).mean() / 4).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@structures
def test_errors_of_blocks_add_as_variances(structure):
    made, influence = fitted(KINDS["kronecker"], 3, structure)
    scores = influence.score(made.test)
    parts = influence.score(made.test, by_block=True)
    total = sum(part.error.square() for part in parts.values()).sqrt()
    torch.testing.assert_close(scores.error, total, rtol=1e-12, atol=0)
    assert len(parts) == (1 if structure == "full" else 2)


@structures
@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_of_a_sum_is_the_formula_of_the_sum_at_the_size_of_the_spread_of_the_pairs(groups, structure):
    made, influence = fitted(KINDS["kronecker"], 2, structure)
    labels = [j % groups for j in range(influence.n_train)]
    sizes = []
    for given in (None, labels):
        found = influence.score(made.test, groups=given, by_block=True)
        sums = columns_of(influence._fitted(), influence.shifts, None, given, None).sums
        members, tests = influence._fitted().state.members, influence._test_rows(made.test)
        formulas = [dict(member.formula_errors(tests, influence.shifts, sums)) for member in members]
        for block, scores in found.items():
            shape = sum(formula[block].square() for formula in formulas) / 2
            sizes.append((2 * scores.error.square() / shape)[shape > 0])
    blocks = len(found)
    for single, summed in zip(sizes[:blocks], sizes[blocks:], strict=True):
        torch.testing.assert_close(summed, single[0].expand(summed.shape), rtol=1e-9, atol=0)


def test_the_error_of_a_single_sum_covers_it():
    """Of one test and one group two sketches give one difference, which by itself would cover 70 %."""
    made = problem("mlp", True)
    test, labels = tuple(part[:1] for part in made.test), [0] * len(made.weights)
    exact = rf.Influence(made.task(), solver=rf.solvers.Gram(), damping=2.0, progress=False)
    wanted = exact.fit(made.train, weights=made.weights).score(test, groups=labels).values
    inside = []
    for seed in range(40):
        _, influence = fitted(rf.sketches.TensorSketch(8, seed=100 + seed), 2)
        low, high = influence.score(test, groups=labels).interval(0.95)
        inside.append(bool(low <= wanted <= high))
    assert sum(inside) > 0.82 * 40


@pytest.mark.parametrize("kind", ["sjlt", "wide kronecker"])
@structures
def test_a_loaded_fit_has_the_same_scores_and_errors(kind, structure, tmp_path):
    made, influence = fitted(KINDS[kind], 3, structure)
    influence.save(tmp_path / "fit")
    scores, again = (i.score(made.test) for i in (influence, rf.Influence.load(tmp_path / "fit", made.task())))
    assert torch.equal(again.values, scores.values)
    assert torch.equal(again.error, scores.error)


def test_the_target_is_the_damping_asked_for_where_corrected_and_a_larger_one_else():
    made, influence = fitted(KINDS["sjlt"], 3)
    assert influence.score(made.test).target_damping == 2.0
    made, influence = fitted(KINDS["sjlt"], 3, corrected=False)
    single = [fitted(sketch, 1, corrected=False)[1] for sketch in replicate_sketches(KINDS["sjlt"], 3)]
    targets = [one.score(made.test).target_damping for one in single]
    assert influence.score(made.test).target_damping == pytest.approx(sum(targets) / 3)
    assert min(targets) > 2.0


def test_a_damping_by_dimension_is_that_of_the_mean_spectrum():
    _, influence = fitted(KINDS["tensor"], 6, damping=rf.EffectiveDimension(2))
    assert influence.effective_dimension == pytest.approx(2, rel=0.1)


def test_an_indefinite_curvature_has_no_errors():
    made, influence = fitted(KINDS["tensor"], 2, damping=30.0, curvature="hessian")
    assert influence.score(made.test).error is None


@pytest.mark.parametrize("replicates", [0, -1, True])
def test_replicates_are_counted(replicates):
    with pytest.raises(PlanError, match="replicates of Sketched must be an integer of at least 1"):
        rf.solvers.Sketched(rf.sketches.SJLT(8), replicates=replicates)


def test_the_gradients_of_several_sketches_are_kept_where_they_fit():
    _, influence = fitted(KINDS["sjlt"], 3)
    assert influence._fitted().rows.kept
    assert influence.plan.memory > 3 * fitted(KINDS["sjlt"], 1)[1].plan.memory * 0.5


@pytest.mark.parametrize("kind", ["tensor", "kronecker"])
def test_intervals_cover_the_exact_scores(kind):
    """30 means of three sketches of 144 rows on gradients of d_κ = 10: pairs of a mean share its sketches."""
    sketch = {"tensor": rf.sketches.TensorSketch(144), "kronecker": rf.sketches.Kronecker(12, 12)}[kind]
    generator = torch.Generator().manual_seed(1)
    model = torch.nn.Linear(20, 16, bias=False).double()
    data = (torch.randn(60, 20, generator=generator).double(), torch.randint(16, (60,), generator=generator))
    test = tuple(part[:8] for part in data)
    exact = rf.Influence(rf.Task(model), solver=rf.solvers.Gram(), damping=rf.EffectiveDimension(10), progress=False)
    exact.fit(data)
    expected = exact.score(test).values
    inside = []
    for seed in range(30):
        solver = rf.solvers.Sketched(sketch.reseeded(seed), replicates=3)
        found = rf.Influence(rf.Task(model), solver=solver, damping=exact.damping, progress=False).fit(data).score(test)
        low, high = found.interval(0.95)
        inside.append(float(((low <= expected) & (expected <= high)).double().mean()))
    covered = torch.tensor(inside)
    assert abs(float(covered.mean()) - 0.95) < 0.02 + 3 * float(covered.std()) / 30**0.5
