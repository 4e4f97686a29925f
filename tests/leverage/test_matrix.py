"""Every kind of input gives the same scores, and what cannot be one says why."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

import refluence as rf
from refluence.errors import DataError, NonFiniteError
from refluence.leverage import matrix
from support.leverage import deficient, plain

NAMES = [f"f{j}" for j in range(12)]


@pytest.fixture
def array():
    return deficient(60).numpy()


KINDS = ("tensor", "array", "fortran", "readonly", "npy", "zarr", "zarr array", "parquet", "csv", "frame")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stretch", [1 << 22, 30])
def test_every_kind_of_input_gives_the_same_scores(kind, stretch, array, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "STRETCH", stretch)
    monkeypatch.setattr(matrix, "ROWS_PER_COLUMN", 1)
    X = source(kind, array, tmp_path)
    for options in ({}, {"center": True}, {"method": "exact"}):
        found = rf.leverage_scores(X, **options)
        expected = rf.leverage_scores(torch.from_numpy(array.copy()), **options)
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)


def source(kind, array, folder):
    frame = pd.DataFrame(array, columns=NAMES)
    readonly = array.copy()
    readonly.flags.writeable = False
    np.save(folder / "X.npy", array)
    stored = zarr.create_array(str(folder / "X.zarr"), data=array, chunks=(7, 5))
    frame.to_parquet(folder / "X.parquet", row_group_size=9)
    frame.to_csv(folder / "X.csv", index=False)
    return {
        "tensor": torch.from_numpy(array),
        "array": array,
        "fortran": np.asfortranarray(array),
        "readonly": readonly,
        "npy": folder / "X.npy",
        "zarr": str(folder / "X.zarr"),
        "zarr array": stored,
        "parquet": folder / "X.parquet",
        "csv": folder / "X.csv",
        "frame": frame,
    }[kind]


@pytest.mark.parametrize("kind", ["parquet", "csv", "frame"])
def test_columns_choose_and_order_the_features(kind, array, tmp_path):
    X = source(kind, array, tmp_path)
    found = rf.leverage_scores(X, columns=["f3", "f1"])
    torch.testing.assert_close(found.values, plain(torch.from_numpy(array[:, [3, 1]])), rtol=0, atol=1e-12)
    with pytest.raises(DataError, match="no column 'f99': it has"):
        rf.leverage_scores(X, columns=["f99"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.uint8, torch.bool])
def test_other_types_of_numbers_are_taken_as_float64(dtype):
    X = (torch.rand(50, 5, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    found = rf.leverage_scores(X)
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, plain(X), rtol=0, atol=1e-11)


def test_the_input_is_left_alone_and_its_graph_too():
    X = deficient(30).requires_grad_()
    before = X.detach().clone()
    found = rf.leverage_scores(X, center=True, weights=[0.5] * 30)
    assert not found.values.requires_grad
    torch.testing.assert_close(X.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["auto", "exact", "dual"])
def test_what_is_not_finite_is_named_with_its_place(bad, method, monkeypatch):
    monkeypatch.setattr(matrix, "STRETCH", 1)
    X = deficient(300)
    X[123, 4] = bad
    with pytest.raises(NonFiniteError, match=rf"X is {bad} in row 123, column 4: leave the row out"):
        rf.leverage_scores(X, method=method)


def test_files_read_ahead_name_the_place_too(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "STRETCH", 1)
    X = deficient(300).numpy()
    X[250, 7] = np.nan
    np.save(tmp_path / "X.npy", X)
    with pytest.raises(NonFiniteError, match="row 250, column 7"):
        rf.leverage_scores(tmp_path / "X.npy")


def test_missing_values_of_a_table_are_named(tmp_path):
    (tmp_path / "X.csv").write_text("a,b\n1,2\n3,\n")
    with pytest.raises(NonFiniteError, match=r"row 1, column 1 \('b'\)"):
        rf.leverage_scores(tmp_path / "X.csv")


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (torch.zeros(4), r"must be a matrix .* not of shape \(4,\): flatten"),
        (torch.zeros(4, 2, 2), r"not of shape \(4, 2, 2\)"),
        (torch.zeros(0, 3), r"is empty, its shape is \(0, 3\)"),
        (np.zeros((3, 0)), r"is empty, its shape is \(3, 0\)"),
        (torch.zeros(3, 2, dtype=torch.complex64), "holds torch.complex64"),
        (np.array([["a", "b"]]), "holds <U1"),
        ([[1.0, 2.0]], "not list"),
        (None, "not NoneType"),
        ("nowhere.npy", "there is no file nowhere.npy"),
    ],
)
def test_what_is_no_matrix_is_named(X, message):
    with pytest.raises(DataError, match=message):
        rf.leverage_scores(X)


def test_files_of_other_kinds_are_named(tmp_path):
    (tmp_path / "X.txt").write_text("1 2")
    (tmp_path / "X.npy").write_text("no array")
    (tmp_path / "X.parquet").write_text("no table")
    (tmp_path / "words.csv").write_text("a,b\nx,1\n")
    (tmp_path / "empty.csv").write_text("a,b\n")
    zarr.create_array(str(tmp_path / "group" / "one"), data=np.eye(3))
    zarr.open_group(str(tmp_path / "group"), mode="a")
    for name, message in (
        ("X.txt", "ending '.txt'"),
        ("X.npy", "cannot be read as a .npy array"),
        ("X.parquet", "cannot be read as parquet"),
        ("words.csv", "column 'a' of .* holds string, no numbers"),
        ("empty.csv", "is empty: 0 rows|holds null"),
        ("group", r"zarr group with the arrays \['one'\]"),
    ):
        with pytest.raises(DataError, match=message):
            rf.leverage_scores(tmp_path / name)
    with pytest.raises(DataError, match=r"columns=\['a'\] is for tables"):
        rf.leverage_scores(torch.eye(3), columns=["a"])
