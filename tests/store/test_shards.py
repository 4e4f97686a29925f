"""Shards: rows in a zarr group in one file, with checksums; rounding; which shard has which row."""

import io

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.storage import ZipStore

from refluence.batches import Batches
from refluence.store.checksums import batch_checksums, row_checksums
from refluence.store.held import located, segments
from refluence.store.places import open_place
from refluence.store.rounding import restored, rounded
from refluence.store.shards import DamagedError, Label, read_label, read_shard, write_shard


def sums(*values):
    """Checksums that are told apart by their first byte."""
    found = np.zeros((len(values), 16), dtype=np.uint8)
    found[:, 0] = values
    return found


def rows(count, width=6, dtype=torch.float32, seed=0):
    return torch.randn(count, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def written(place, dtype=torch.float32, **arrays):
    arrays = arrays or {"one": rows(3), "a/b": rows(3, 2, seed=1)}
    return write_shard(place, arrays, dtype, 5, sums(1, 2, 3), "made of")


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_shard_is_read_as_it_was_given_back_when_written(dtype, tmp_path):
    place = open_place(tmp_path)
    arrays = {"one": rows(3, dtype=torch.float64), "a/b": rows(3, 2, torch.float64, 1)}
    shard = written(place, dtype, **arrays)
    again = read_shard(place, shard.label.name, torch.float64)
    for name, values in shard.arrays.items():
        assert torch.equal(again.arrays[name], values)
        assert dtype != torch.float64 or torch.equal(values, arrays[name])
    for label in (again.label, read_label(place, shard.label.name)):
        assert (label.name, label.start, label.fingerprint) == (shard.label.name, 5, "made of")
        assert label.rounding == shard.label.rounding
        assert np.array_equal(label.checksums, sums(1, 2, 3))


def test_anybody_can_read_it_with_zarr(tmp_path):
    shard = written(open_place(tmp_path))
    group = zarr.open_group(ZipStore(tmp_path / shard.label.name, mode="r"), mode="r")
    assert group.attrs["arrays"] == ["one", "a/b"]
    assert np.array_equal(group["arrays/0"][...], rows(3).numpy())


def test_the_same_rows_are_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        name = written(open_place(tmp_path / folder)).label.name
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_changed_byte_is_noticed_or_changes_nothing(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "bytes"
    place = open_place(folder)
    shard = written(place)
    path = folder / shard.label.name
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = read_shard(place, path.name, torch.float32)
    except DamagedError:
        return
    assert all(torch.equal(found.arrays[name], values) for name, values in shard.arrays.items())
    assert np.array_equal(found.label.checksums, shard.label.checksums)


@settings(deadline=None, max_examples=30)
@given(length=st.floats(0, 0.999))
def test_any_cut_is_noticed(length, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "cut"
    place = open_place(folder)
    path = folder / written(place).label.name
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content))])
    for read in (read_label, lambda where, name: read_shard(where, name, torch.float32)):
        with pytest.raises(DamagedError):
            read(place, path.name)


# ------------------------------------------------------------------ rounding


@settings(deadline=None)
@given(
    dtype=st.sampled_from([(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)]),
    scale=st.integers(-35, 35),
    seed=st.integers(0, 99),
)
def test_rounding_is_relative_to_the_row_however_small_its_gradient(dtype, scale, seed):
    kind, unit = dtype
    values = rows(4, seed=seed) * 10.0 ** torch.tensor([scale, 0, -scale, 0])[:, None].double()
    values = values.float()
    part = rounded(values, kind)
    back = restored(part.stored, part.exponents, torch.float32)
    lost = values.double() - back.double()
    largest = values.double().abs().amax(dim=1, keepdim=True)
    assert bool((lost.abs() <= unit * largest).all())
    assert part.squared_error == pytest.approx(float(lost.square().sum()), rel=1e-12)
    assert part.squared_norm == pytest.approx(float(values.double().square().sum()), rel=1e-12)


def test_a_zero_gradient_stays_zero():
    part = rounded(torch.zeros(2, 3), torch.float16)
    assert torch.equal(restored(part.stored, part.exponents, torch.float32), torch.zeros(2, 3))


# ------------------------------------------------------------------ checksums of rows


def test_a_row_has_one_checksum_in_whatever_batch_it_comes():
    x, y = rows(11), torch.arange(11)
    whole = row_checksums(Batches((x, y), 4), progress=False)
    assert np.array_equal(whole, batch_checksums((x, y)))
    order = [7, 7, 0, 3]
    assert np.array_equal(whole[order], row_checksums(Batches((x[order], y[order]), 3), progress=False))
    assert len(np.unique(whole, axis=0)) == 11


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (x, y.int()),
        lambda x, y: (x.double(), y),
        lambda x, y: (x.reshape(-1, 2, 3), y),
        lambda x, y: (x + 1e-6, y),
        lambda x, y: {"x": x, "y": y},
        lambda x, y: (x, y, "cased"),
    ],
)
def test_dtype_shape_values_names_and_words_all_count(other):
    x, y = rows(3), torch.arange(3)
    assert not (batch_checksums((x, y)) == batch_checksums(other(x, y))).all(axis=1).any()


def test_tensors_without_numbers_and_of_every_kind():
    batch = (torch.empty(2, 0), torch.tensor([True, False]), torch.zeros(2, dtype=torch.bfloat16))
    found = batch_checksums(batch)
    assert not np.array_equal(found[0], found[1])


# ------------------------------------------------------------------ where rows are


def label(start, *values):
    return Label(f"{start}", start, "", sums(*values), {})


def test_rows_are_found_where_they_were_first_and_then_anywhere():
    labels = [label(0, 1, 2, 3), label(3, 4, 1)]
    shard, position = located(sums(1, 2, 3, 4, 1, 9), labels)
    assert shard.tolist() == [0, 0, 0, 1, 1, -1]
    assert position.tolist()[:5] == [0, 1, 2, 0, 1]
    shard, position = located(sums(4, 3), labels)
    assert list(zip(shard, position, strict=True)) == [(1, 0), (0, 2)]
    assert located(sums(1), [])[0].tolist() == [-1]


@given(missing=st.lists(st.booleans(), max_size=40), size=st.integers(1, 9))
def test_segments_cover_what_is_missing_and_cross_no_border(missing, size):
    found = segments(np.array(missing, dtype=bool), size)
    covered = [row for start, stop in found for row in range(start, stop)]
    assert covered == [row for row, is_missing in enumerate(missing) if is_missing]
    assert all(start // size == (stop - 1) // size for start, stop in found)


def test_what_is_no_zip_file_at_all(tmp_path):
    place = open_place(tmp_path)
    place.write("x.zarr.zip", io.BytesIO(b"PK").getvalue())
    with pytest.raises(DamagedError, match="not a zip"):
        read_label(place, "x.zarr.zip")


def test_a_flipped_bit_is_refused_or_changes_nothing_that_is_read(tmp_path):
    place, values = open_place(tmp_path), torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    checksums = np.random.default_rng(0).integers(0, 256, (32, 16), dtype=np.uint8)
    label = write_shard(place, {"full": values}, torch.float32, 64, checksums, "fingerprint").label
    path = tmp_path / label.name
    data, refused = path.read_bytes(), 0
    for i in range(0, len(data), 7):
        changed = bytearray(data)
        changed[i] ^= 1 << i % 8
        path.write_bytes(changed)
        try:
            found = read_shard(place, label.name, torch.float32)
        except DamagedError:
            refused += 1
            continue
        assert torch.equal(found.arrays["full"], values)
        assert np.array_equal(found.label.checksums, checksums)
        assert (found.label.start, found.label.fingerprint) == (64, "fingerprint")
    assert refused > 0.9 * len(data) / 7
