"""`refluence plan --examples … --parameters …`, without a model or data."""

import pytest
import torch

import refluence as rf
from refluence.cli.scale import OPTIONS
from refluence.scale import Device, Scale, scale_plan
from refluence.scale_words import format_flops, format_hours
from support.cli import run

SIZE = ("plan", "--examples", "1e9", "--parameters", "70e9")


def asked_for(monkeypatch, *options):
    """The sizes that the command plans."""
    asked = []
    monkeypatch.setattr("refluence.scale.scale_plan", lambda scale: asked.append(scale) or scale_plan(scale))
    run(*SIZE, *options)
    return asked[0]


def test_the_table_has_the_plan_and_every_assumption():
    printed = run(*SIZE, "--tokens", 2048, "--sketch", "kronecker", "--workers", 64, "--batch-size", 1).stdout
    plan = scale_plan(
        Scale(
            n=10**9,
            d=70 * 10**9,
            positions=2048,
            sketch=rf.sketches.Kronecker(64, 64),
            workers=64,
            batch_size=1,
        )
    )
    for stage in filter(lambda one: one.flops, plan.stages):
        assert any(
            row.split()[:1] == [stage.name] and format_flops(stage.flops) in row and format_hours(stage.seconds / 3600)
            for row in printed.splitlines()
        )
    for expected in (
        format_hours(plan.device_hours),
        format_hours(plan.wall_hours),
        "976,563 shards of 1,024 rows",
        "64 × 6 devices",
        *plan.assumptions,
    ):
        assert expected in printed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {}),
        (("--tests", 7, "--tokens", 3, "--workers", 2), {"tests": 7, "positions": 3, "workers": 2}),
        (("--sketch", "gaussian", "--sketch-size", 64, "--seed", 5), {"sketch": rf.sketches.Gaussian(64, seed=5)}),
        (("--solver", "sketched", "--per-layer"), {"blocks": "module"}),
        (("--store-dtype", "bfloat16"), {"store_dtype": torch.bfloat16}),
        (("--device", "a100", "--utilisation", 0.3), {"device": Device("A100 80GB", 312e12, 19.5e12, 80e9, 2.04e12)}),
        (("--device-rate", "4e14", "--memory", "40GB"), {"device": Device("a device", 4e14, 2e14, 40e9)}),
    ],
)
def test_every_option_reaches_the_plan(monkeypatch, options, expected):
    scale = asked_for(monkeypatch, *options)
    for name, value in {"n": 10**9, "d": 70 * 10**9, **expected}.items():
        assert getattr(scale, name) == value
    rates = {"--utilisation": 0.3, "--device-rate": 1.0}
    assert scale.utilisation == next((rate for name, rate in rates.items() if name in options), 0.4)


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        (("--examples", "1e9"), "--parameters", "is needed for a job of any size, such as --parameters 70e9"),
        (("--workers", "4"), "--examples", "is needed for a job of any size, such as --examples 1e9"),
        (("--examples", "2.5", "--parameters", "3"), "--examples", "must be a whole number, such as 1e9, not 2.5"),
        (("--examples", "3", "--parameters", "inf"), "--parameters", "must be a whole number"),
        ((*SIZE[1:], "--dataset", "mnist"), "--dataset", "is about a model and data"),
        ((*SIZE[1:], "--damping", "0.1"), "--damping", "is about a model and data"),
        ((*SIZE[1:], "--solver", "cg"), "--solver", "the sketched solver, not for cg"),
        ((*SIZE[1:], "--device", "cuda"), "--device", "of a job of any size is h100, h200, a100, not 'cuda'"),
        ((*SIZE[1:], "--device", "h100", "--device-rate", "1e12"), "--device", "leave out one of"),
        ((*SIZE[1:], "--device-rate", "0"), "--device-rate", "positive number of FLOP/s, such as 4e14, not 0"),
        ((*SIZE[1:], "--device-rate", "1e12", "--utilisation", "0.5"), "--utilisation", "part of --device-rate"),
        ((*SIZE[1:], "--utilisation", "40"), "--utilisation", "above 0 and at most 1, not 40"),
        (
            (*SIZE[1:], "--sketch", "kronecker", "--sketch-size", "8"),
            "--sketch-size",
            "a square, such as 4 or 9, not 8",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_option_the_value_and_the_remedy(options, option, message):
    said = " ".join(run("plan", *options, code=2).stderr.replace("│", " ").split())
    assert f"Invalid value for {option}: " in said
    assert message in said


def test_a_plan_of_a_model_and_data_is_as_before():
    printed = run("plan", "--dataset", "digits", "--model", "lr").stdout
    assert "device hours" not in printed
    assert "alternative" in printed


def test_every_option_is_in_the_help():
    printed = run("plan", "--help").stdout
    for name in OPTIONS:
        assert f"--{name.replace('_', '-')}" in printed
