"""The plan of a job of any size: counted by hand, and beside real fits with real stores."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import refluence as rf
from refluence.batches import Batches
from refluence.errors import PlanError
from refluence.gradients.capture import Capture
from refluence.scale import Device, Layer, Scale, checked_share, scale_plan, transformer_layers
from refluence.scale_sketching import DRAWN, HASHED, HASHED_BYTES, ORTHOGONAL, kept_numbers, numbers_made
from refluence.sketches import SJLT, Gaussian, Kronecker, Rademacher, TensorSketch
from refluence.store import describe
from refluence.store.places import open_place

CORE = Device("a core", 1e9, 1e8)
LAYERS = (Layer(8, 6, bias=True), Layer(3, 8, bias=True))


def stages(scale):
    return {stage.name: stage.flops for stage in scale_plan(scale).stages}


def test_the_stages_counted_by_hand():
    # Two matrices of 3×4 and 5×3 at two positions: p = 2·(12 + 15) = 54 multiply-adds.
    scale = Scale(n=90, layers=(Layer(3, 4), Layer(5, 3)), positions=2, tests=10, sketch=SJLT(8), batch_size=10)
    assert stages(scale) == {
        "forward": 100 * 2 * 54,
        "backward": 100 * 2 * 30,  # no error of the data
        "attention": 0,
        "checks": pytest.approx(100 * 1 / 16 * 2 * (54 + 30 + 54)),
        "gradients": 100 * 2 * 54,
        "projection": 100 * 2 * 4 * 27,
        "P itself": 0,
        "curvature": 90 * 8 * (8 + 8),  # narrower than a panel: the whole product
        "factorisation": 2 * 9 * 8**3 / 3,
        "scores": 2 * (90 * 8 * 10 + 8**2 * 10),
        "errors": 2 * (90 * 8 * 8 + 90 * 8 * 10),
    }


def test_forward_backward_and_formed_gradients_are_six_flops_a_parameter_and_token():
    counted = stages(Scale(n=999, tests=1, d=10**9, positions=128))
    assert counted["forward"] + counted["backward"] + counted["gradients"] == pytest.approx(1000 * 6 * 10**9 * 128)


def test_attention_multiplies_every_pair_of_positions_twice_forward_and_four_times_backward():
    scale = Scale(n=99, tests=1, d=10**9, positions=128, batch_size=100)
    width, depth = transformer_layers(10**9)[1].columns, transformer_layers(10**9)[1].count
    assert stages(scale)["attention"] == pytest.approx(1.02 * 100 * 6 * 2 * 128**2 * width * depth)
    assert stages(replace(scale, positions=1))["attention"] == 0
    assert stages(replace(scale, attention=3))["attention"] == pytest.approx(1.02 * 100 * 12 * 128**2 * 3)


def test_an_embedding_is_looked_up():
    scale = Scale(
        n=9, tests=1, layers=(Layer(50, 8, lookup=True), Layer(8, 8)), positions=3, sketch=Kronecker(2, 2), batch_size=8
    )
    counted = stages(scale)
    assert counted["forward"] == counted["backward"] == 10 * 2 * 3 * 64
    assert counted["projection"] == 10 * 2 * 3 * (9 * 2 + 4 + 16 * 2 + 4)
    assert kept_numbers(scale) == 3 * 9 + 3 * 16
    assert scale.parameters == 50 * 8 + 64


def test_the_curvature_is_n_m_squared_flops_and_a_panel():
    assert stages(Scale(n=10**6, d=10**6, sketch=SJLT(4096)))["curvature"] == 10**6 * 4096 * (4096 + 256)
    # With more rows of P than examples it is the n×n matrix.
    assert stages(Scale(n=100, d=10**6, sketch=SJLT(4096)))["curvature"] == 2 * 100**2 * 4096


@pytest.mark.parametrize(
    ("positions", "work", "formed"),
    [
        # (R + C)·4 + m a position, never forming the gradient
        (5, 5 * ((40 + 20) * 4 + 16), 0),
        # 14·60 numbers of factors are more than the gradient's 800, which is formed and projected
        (14, 40 * 20 * 4 + 16, 14 * 800),
    ],
)
def test_a_kronecker_sketch_of_factors_and_of_formed_gradients(positions, work, formed):
    scale = Scale(n=9, tests=1, layers=(Layer(40, 20),), positions=positions, sketch=Kronecker(4, 4))
    counted = stages(scale)
    assert counted["projection"] == 10 * 2 * work
    assert counted["gradients"] == 10 * 2 * formed
    assert "errors" not in counted


@pytest.mark.parametrize(
    ("sketch", "work"), [(Gaussian(32), 32e6), (Rademacher(32), 32e6), (SJLT(32, nonzeros=2), 8e6)]
)
def test_sketches_of_formed_gradients_take_their_own_work(sketch, work):
    assert stages(Scale(n=9, tests=1, d=10**6, sketch=sketch))["projection"] == 10 * 2 * work


def test_the_layers_of_a_transformer_are_those_of_gpt_3():
    layers = transformer_layers(175 * 10**9)
    assert sum(one.count * one.d for one in layers) == pytest.approx(175e9, rel=1e-12)
    assert layers[0].rows == pytest.approx(12_288, rel=0.01)
    assert layers[1].count == pytest.approx(96, rel=0.01)


def test_rates_utilisation_and_workers_make_the_time():
    scale = Scale(
        n=100, d=1000, tests=1, sketch=TensorSketch(8), batch_size=10, shard_rows=10, device=CORE, utilisation=0.5
    )
    plan = scale_plan(scale)
    times = {stage.name: stage.seconds for stage in plan.stages}
    counted = {stage.name: stage.flops for stage in plan.stages}
    assert times["forward"] == counted["forward"] / 5e8
    assert times["curvature"] == counted["curvature"] / 5e7
    assert plan.wall_seconds == pytest.approx(plan.device_seconds)
    # Ten shards: the busiest of four workers has three of them; the factorisation is nobody's to share.
    four = scale_plan(replace(scale, workers=4))
    alone = times["factorisation"]
    assert four.device_seconds == plan.device_seconds
    assert four.wall_seconds == pytest.approx(0.3 * (plan.device_seconds - alone) + alone)
    assert four.held == 30 * 8 * 4


def test_moving_formed_gradients_may_take_longer_than_their_arithmetic():
    scale = Scale(n=9, tests=1, d=10**6, sketch=SJLT(32), device=replace(CORE, rate=1e15, bandwidth=1e6))
    [projection] = [stage for stage in scale_plan(scale).stages if stage.name == "projection"]
    assert projection.seconds == 10 * 3 * 4e6 / 1e6


def seconds_of_p(scale):
    [stage] = [stage for stage in scale_plan(scale).stages if stage.name == "P itself"]
    return stage.seconds


def test_p_is_made_once_by_each_worker_where_it_is_kept():
    small = Scale(n=10**6, d=10**5, sketch=SJLT(64), device=CORE, workers=3)
    assert seconds_of_p(small) == 3 * 10**5 / HASHED
    assert seconds_of_p(replace(small, sketch=Gaussian(64))) == 3 * 64 * 10**5 / DRAWN
    layers = (Layer(40, 20, count=2, bias=True),)
    factors = 2 * (40 * 8 + 21 * 4)
    assert numbers_made(replace(small, d=None, layers=layers, sketch=Kronecker(4, 8)), 8, 3) == 3 * factors
    assert seconds_of_p(replace(small, sketch=TensorSketch(64))) == 0


def test_a_p_too_large_to_be_kept_is_made_again_for_every_batch():
    large = Scale(n=999, tests=1, d=10**9, sketch=SJLT(64), batch_size=10, device=replace(CORE, bandwidth=1e12))
    assert seconds_of_p(large) == 100 * 10**9 * HASHED_BYTES / 1e12
    # No more than 64 rows at a time are added by one hashing.
    assert numbers_made(large, 100, 1) == 16 * 10**9
    gaussian = replace(large, sketch=Gaussian(64))
    kept = (2 << 30) / (64 * 4 * 10**9)
    assert numbers_made(gaussian, 10, 1) == pytest.approx(64 * 10**9 * (1 + 99 * (1 - kept)))
    kronecker = replace(large, sketch=Kronecker(512, 512))
    factors = sum(one.count * 512 * (one.rows + one.columns) for one in kronecker.matrices)
    assert factors * 4 > 256 << 20
    assert seconds_of_p(kronecker) == pytest.approx(100 * factors / ORTHOGONAL)
    # The devices of a worker wait for its host.
    crowded = replace(kronecker, device=replace(CORE, memory=1e9))
    assert seconds_of_p(crowded) == pytest.approx(scale_plan(crowded).devices_per_worker * 100 * factors / ORTHOGONAL)


def test_a_worker_has_the_devices_that_its_memory_needs():
    scale = Scale(n=10**6, d=10**9, positions=64, batch_size=1, device=replace(CORE, memory=1e9))
    plan = scale_plan(scale)
    assert plan.memory["model"] == 2e9
    assert plan.devices_per_worker == math.ceil(plan.peak_memory / 1e9) > 2
    assert plan.wall_seconds < scale_plan(replace(scale, device=CORE)).wall_seconds


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def fitted(store, scale, **execution):
    influence = rf.Influence(
        rf.Task(network()),
        solver=rf.solvers.Sketched(scale.sketch),
        damping=1e3,
        blocks=scale.blocks,
        batch_size=scale.batch_size,
        execution=rf.Execution(store=store, store_dtype=scale.store_dtype, shard_rows=scale.shard_rows, **execution),
        progress=False,
    )
    return influence.fit(data(scale.n))


STORES = [
    {},
    {"batch_size": 32},
    {"batch_size": 32, "shard_rows": 50},
    {"shard_rows": 100, "store_dtype": torch.float16, "batch_size": 100},
    {"shard_rows": 100, "store_dtype": torch.bfloat16, "batch_size": 20},
    {"shard_rows": 128, "blocks": "module", "batch_size": 64},
    {"shard_rows": 128, "blocks": "module", "batch_size": 64, "store_dtype": torch.float16},
    {"sketch": Kronecker(4, 2), "batch_size": 100, "shard_rows": 100},
    {"sketch": SJLT(20_000), "batch_size": 64},  # n×n; shards of the 16 MB that the store aims at
]


@pytest.mark.parametrize("options", STORES, ids=lambda options: ", ".join(options) or "defaults")
def test_bytes_and_shards_are_those_of_a_real_store(tmp_path, options):
    scale = Scale(**{"n": 450, "layers": LAYERS, "sketch": SJLT(48), "dtype": torch.float32, **options})
    influence = fitted(tmp_path / "store", scale)
    [part] = [part for part in describe(open_place(tmp_path / "store")).parts if not part.name]
    plan = scale_plan(scale)
    assert plan.batch_size == influence.plan.workload.batch_size
    assert plan.store.shards == part.shards
    rows = sorted((tmp_path / "store").glob("*.zarr.zip"))[0].name.split("-")
    assert min(plan.store.rows, scale.n) == int(rows[1]) - int(rows[0])
    overhead = part.size - plan.store.numbers - plan.store.checksums
    assert plan.store.overhead == pytest.approx(overhead, rel=0.1)


@pytest.mark.parametrize("sketch", [SJLT(64), Gaussian(64), Kronecker(8, 8)], ids=repr)
def test_flops_are_those_that_a_real_fit_does(tmp_path, sketch):
    """But for outer products of single positions and hashed additions, which are no products of matrices."""
    n = 6000
    scale = Scale(n=n, layers=LAYERS, tests=1, sketch=sketch, dtype=torch.float32)
    adding = {torch.ops.aten.addmm_: lambda total, a, b, out_shape=None, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=adding) as counter:
        fitted(tmp_path / "store", scale)
    counted = stages(scale)
    expected = sum(counted[name] for name in ("forward", "backward", "checks", "curvature"))
    if isinstance(sketch, Gaussian):
        expected += counted["projection"]
    if isinstance(sketch, Kronecker):  # R·8 + C̃·8 of a layer at its one position, without the m of the outer product
        expected += 2 * n * sum(8 * (one.rows + one.columns) for one in LAYERS)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("batch_size", [2, 16, 512])
@pytest.mark.parametrize("positions", [1, 5])
def test_a_pass_over_the_gradients_takes_the_flops_that_the_plan_counts(batch_size, positions):
    n = {2: 32, 16: 128, 512: 1024}[batch_size]
    inner = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 6))
    model = inner if positions == 1 else nn.Sequential(inner, nn.Flatten(1), nn.Linear(6 * positions, 3))
    layers = [Layer(64, 6, bias=True), Layer(6, 64, bias=True)]
    if positions > 1:
        layers.append(Layer(3, 6 * positions, positions=1, bias=True))
    x, y = data(n)
    batches = Batches((x if positions == 1 else x[:, None].repeat(1, positions, 1), y), batch_size)
    task = rf.Task(model)
    capture = Capture(task, model, {"full": tuple(name for name, _ in model.named_parameters())}, batches)
    with FlopCounterMode(display=False) as counter:
        for _ in capture.gradients(batches, capture.loss):
            pass
    scale = Scale(n=n, layers=tuple(layers), positions=positions, tests=1, sketch=SJLT(2), batch_size=batch_size)
    counted = stages(scale)
    passed = sum(counted[name] for name in ("forward", "backward", "checks")) * n / (n + 1)
    assert counter.get_total_flops() == pytest.approx(passed, rel=0.02)


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_the_memory_of_a_gradient_is_that_of_a_real_probe(positions):
    """Factors, or rows where they are fewer numbers; the bias comes with them."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x).mean(dim=1)

    x, y = data(40)
    influence = rf.Influence(rf.Task(Mean()), solver=rf.solvers.Sketched(SJLT(16)), progress=False)
    found = influence.plan_for((x[:, None].repeat(1, positions, 1), y))
    scale = Scale(n=40, layers=LAYERS, positions=positions, dtype=torch.float32)
    assert kept_numbers(scale) * 4 == found.workload.bytes_per_row
    assert scale.parameters == found.workload.d
    assert scale_plan(scale).batch_size == found.workload.batch_size


def test_the_store_at_a_large_size_counted_by_hand():
    plan = scale_plan(Scale(n=10**9, d=70 * 10**9, positions=2048, sketch=SJLT(4096), batch_size=8))
    # 16 MiB are 1,024 rows of 4,096 float32.
    assert (plan.store.rows, plan.store.shards) == (1024, 976_563)
    assert plan.store.numbers == 10**9 * 4096 * 4
    assert plan.store.checksums == 16 * 10**9
    assert plan.traffic["store written"] == plan.store.size
    assert plan.traffic["data read, twice"] == 2 * 10**9 * 2048 * 8


def test_a_sketch_for_each_layer_takes_so_many_times_the_bytes():
    one = Scale(n=10**6, d=10**9, positions=64, sketch=Kronecker(16, 16), batch_size=1)
    each = replace(one, blocks="module")
    count = each.block_count
    assert count == round(6 * transformer_layers(10**9)[1].count)
    assert scale_plan(each).store.numbers == count * scale_plan(one).store.numbers
    assert stages(each)["curvature"] == count * stages(one)["curvature"]
    assert stages(each)["projection"] == stages(one)["projection"]


SIZES = st.fixed_dictionaries(
    {
        "n": st.integers(1, 10**9),
        "d": st.integers(1, 10**12),
        "positions": st.integers(1, 10**5),
        "tests": st.integers(1, 10**4),
        "blocks": st.sampled_from(["full", "module"]),
        "batch_size": st.one_of(st.none(), st.integers(1, 4096)),
        "store_dtype": st.sampled_from([None, torch.float16]),
        "workers": st.integers(1, 1000),
    }
)
SKETCHES = st.one_of(
    st.tuples(st.sampled_from([SJLT, Gaussian, TensorSketch]), st.integers(1, 10**5)),
    st.tuples(st.just(Kronecker), st.integers(1, 200), st.integers(1, 200)),
)


def sized(sizes, sketch):
    kind, *rows = sketch
    return Scale(**sizes, sketch=kind(*rows))


@settings(max_examples=100, deadline=None)
@given(SIZES, SKETCHES, st.integers(2, 10))
def test_everything_about_the_rows_is_linear_in_n(sizes, sketch, times):
    scale = sized(sizes, sketch)
    one, many = scale_plan(scale), scale_plan(replace(scale, n=times * scale.n))
    assert many.batch_size == one.batch_size
    assert (many.store.numbers, many.store.checksums) == (times * one.store.numbers, times * one.store.checksums)
    assert many.store.rows == one.store.rows
    assert (many.store.shards - 1) * many.store.rows < times * scale.n <= many.store.shards * many.store.rows
    if scale.side == scale.sketch.m:
        first, second = stages(scale), stages(replace(scale, n=times * scale.n))
        assert second["curvature"] == pytest.approx(times * first["curvature"])
        assert second["factorisation"] == first["factorisation"]
        examples = (times * scale.n + scale.tests) / (scale.n + scale.tests)
        for name in ("forward", "backward", "checks", "gradients", "projection"):
            assert second[name] == pytest.approx(examples * first[name])


@settings(max_examples=100, deadline=None)
@given(SIZES, SKETCHES, st.sampled_from(["n", "tests", "positions", "d"]), st.integers(2, 5))
def test_more_of_anything_takes_no_less(sizes, sketch, name, times):
    # More positions may make it cheaper to form a gradient than to project it one by one, and a small model that grows
    # may have fewer matrices.
    assume(name != "positions" or sketch[0] in (SJLT, Gaussian))
    assume(name != "d" or sizes["blocks"] == "full")
    scale = replace(sized(sizes, sketch), batch_size=sizes["batch_size"] or 8)
    first, second = scale_plan(scale), scale_plan(replace(scale, **{name: times * getattr(scale, name)}))
    assert second.store.size >= first.store.size
    assert second.device_seconds >= first.device_seconds * (1 - 1e-9)
    assert second.peak_memory >= first.peak_memory * (1 - 1e-9)


@settings(max_examples=50, deadline=None)
@given(SIZES, SKETCHES, st.integers(2, 5))
def test_more_workers_are_never_slower_but_for_their_own_p(sizes, sketch, times):
    scale = sized(sizes, sketch)
    one, more = scale_plan(scale), scale_plan(replace(scale, workers=times * scale.workers))
    drawn = [sum(stage.seconds for stage in plan.stages if stage.name == "P itself") for plan in (one, more)]
    assert more.device_seconds - drawn[1] == pytest.approx(one.device_seconds - drawn[0])
    assert more.wall_seconds <= (one.wall_seconds + drawn[1]) * (1 + 1e-9)
    assert more.wall_seconds * more.scale.workers * more.devices_per_worker >= more.device_seconds * (1 - 1e-9)


def test_rows_that_are_checked():
    assert checked_share(1024) == 2 / 1024
    assert checked_share(32) == 1 / 32
    assert checked_share(8) == checked_share(1) == 1 / 16


def test_the_summary_has_the_numbers_and_what_they_stand_on():
    text = str(scale_plan(Scale(n=10**9, d=70 * 10**9, positions=2048, workers=64, batch_size=1)))
    for expected in (
        "1,000,000,000 train",
        "70,000,000,000 parameters",
        "976,563 shards of 1,024 rows",
        "H100 SXM: 9.89e+14 FLOP/s",
        "40% are reached",
        "of width 9,072",
    ):
        assert expected in text
    assert len(text.split("assumed:")[1].strip().splitlines()) >= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n of a Scale must be an integer of at least 1, not 0"),
        ({"workers": -1}, "workers of a Scale"),
        ({"layers": LAYERS}, "not both"),
        ({"d": None}, "d=..., or its layers"),
        ({"attention": -1}, "attention of a Scale must be at least 0, not -1"),
        ({"blocks": "layer"}, '"full" or "module", not \'layer\''),
        ({"dtype": torch.int8}, "floating-point one, not torch.int8"),
        ({"utilisation": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"device": "tpu"}, "unknown device 'tpu': use h100, h200, a100"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_remedy(options, message):
    with pytest.raises(PlanError, match=message):
        Scale(**{"n": 10, "d": 10, **options})


def test_layers_and_devices_that_cannot_be_are_refused():
    with pytest.raises(PlanError, match="rows of a Layer must be positive, not 0"):
        Layer(0, 3)
    with pytest.raises(PlanError, match=r"double_rate of device 'x' must be positive and finite, not 0\.0"):
        Device("x", 1.0, 0.0)


def test_it_is_public():
    assert rf.scale_plan is scale_plan
    assert rf.Scale is Scale
