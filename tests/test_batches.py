"""Batches: the rows of a data set in their order, whatever holds them; anything else is an error that says so."""

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from refluence.batches import Batches
from refluence.errors import DataError, RefluenceError

X = torch.arange(22.0).reshape(11, 2)
Y = torch.arange(11)


class Rows(Dataset):
    """A data set by index."""

    def __init__(self, n=11):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        return X[row], Y[row]


class Changing(Rows):
    """A data set whose row `changing` is another at each reading."""

    def __init__(self, row):
        super().__init__()
        self.changing, self.readings = row, 0

    def __getitem__(self, row):
        self.readings += 1
        return X[row] + (self.readings if row == self.changing else 0), Y[row]


class Augmented(Rows):
    """A data set with noise from torch's global generator."""

    def __getitem__(self, row):
        return X[row] + torch.randn(2), Y[row]


HOLDERS = {
    "tuple": (X, Y),
    "list": [X, Y],
    "tensor data set": TensorDataset(X, Y),
    "data set": Rows(),
    "loader": DataLoader(Rows(), batch_size=4),
    "loader with a sampler": DataLoader(Rows(), batch_size=4, sampler=SequentialSampler(Rows())),
    "loader with a batch sampler": DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(Rows()), 4, False)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_gives_the_rows_in_order_with_their_ids(holder):
    batches = Batches(HOLDERS[holder], batch_size=4)
    for _ in range(2):
        pieces = list(batches)
        assert [start for start, _ in pieces] == [0, 4, 8]
        assert torch.equal(torch.cat([batch[0] for _, batch in pieces]), X)
        assert torch.equal(torch.cat([batch[1] for _, batch in pieces]), Y)
    assert (batches.n, len(batches)) == (11, 3)


@pytest.mark.parametrize("holder", HOLDERS)
def test_rows_are_selected_in_the_order_asked_for(holder):
    x, y = Batches(HOLDERS[holder], batch_size=4).select([7, 0, 3])
    assert torch.equal(x, X[[7, 0, 3]])
    assert y.tolist() == [7, 0, 3]


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_checksum_depends_on_the_rows_and_not_on_how_they_are_held_or_split(holder):
    same = {Batches(HOLDERS[holder], batch_size=size).checksum for size in (3, 11)}
    assert same == {Batches((X, Y)).checksum}
    assert same != {Batches((X + 1, Y)).checksum}
    assert same != {Batches((X[:-1], Y[:-1])).checksum}


def test_a_tensor_data_set_that_transforms_its_rows_is_read_row_by_row():
    class Doubled(TensorDataset):
        def __getitem__(self, row):
            x, y = super().__getitem__(row)
            return 2 * x, y

    assert torch.equal(torch.cat([x for _, (x, _) in Batches(Doubled(X, Y), 4)]), 2 * X)


def test_nested_batches_are_split_leaf_by_leaf():
    data = {"a": X, "b": {"c": Y, "d": (X + 1, Y + 1)}}
    start, batch = list(Batches(data, batch_size=8))[1]
    assert start == 8
    assert torch.equal(batch["a"], X[8:])
    assert torch.equal(batch["b"]["d"][1], Y[8:] + 1)


def test_a_tensor_alone_is_a_batch_of_one_element():
    [(_, batch)] = Batches(X)
    assert isinstance(batch, tuple)
    assert torch.equal(batch[0], X)


def test_floating_point_tensors_are_cast_and_integers_are_not():
    [(_, (x, y))] = Batches((X, Y), dtype=torch.float64)
    assert (x.dtype, y.dtype) == (torch.float64, torch.int64)


def test_a_loader_keeps_its_own_batch_size_and_collate_function():
    loader = DataLoader(Rows(), batch_size=3, collate_fn=lambda items: {"x": torch.stack([x for x, _ in items])})
    batches = Batches(loader, batch_size=100)
    assert [len(batch["x"]) for _, batch in batches] == [3, 3, 3, 2]
    assert torch.equal(batches.select([2])["x"], X[2:3])


def test_reading_a_loader_leaves_the_random_states_as_they_were():
    own = torch.Generator().manual_seed(1)
    before, own_before = torch.get_rng_state(), own.get_state()
    list(Batches(DataLoader(Rows(), batch_size=4)))
    list(Batches(DataLoader(Rows(), batch_size=4, generator=own)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own.get_state(), own_before)


# ---------------------------------------------------------------- errors


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataLoader(Rows(), shuffle=True), ["RandomSampler", "shuffle=False"]),
        (DataLoader(Rows(), sampler=RandomSampler(Rows())), ["RandomSampler", "shuffle=False"]),
        (DataLoader(Rows(), sampler=WeightedRandomSampler([1.0] * 11, 11)), ["WeightedRandomSampler", "shuffle=False"]),
        (
            DataLoader(Rows(), batch_sampler=BatchSampler(RandomSampler(Rows()), 4, False)),
            ["RandomSampler", "shuffle=False"],
        ),
        (DataLoader(Rows(), batch_sampler=[[1, 0], [2]]), ["list", "shuffle=False"]),
        (DataLoader(Rows(), batch_size=4, drop_last=True), ["drop_last=True", "drop_last=False"]),
        (
            DataLoader(Rows(), batch_sampler=BatchSampler(SequentialSampler(Rows()), 4, drop_last=True)),
            ["drop_last", "drop_last=False"],
        ),
        (DataLoader(Stream()), ["Stream", "no length", "map-style"]),
        (Stream(), ["Stream", "no length", "map-style"]),
        ((row for row in X), ["generator", "no length"]),
        ((X[:0], Y[:0]), ["train is empty", "at least one"]),
        (TensorDataset(X[:0], Y[:0]), ["train is empty"]),
        (Rows(0), ["train is empty"]),
        ((X, Y[:7]), ["(11, 2)", "(7,)", "first dimension"]),
        ((X, torch.tensor(1.0)), ["(11, 2)", "()"]),
        (("a", "b"), ["tuple", "no tensor"]),
    ],
)
def test_data_without_stable_rows_is_refused_with_the_reason_and_the_remedy(data, words):
    with pytest.raises(DataError) as error:
        list(Batches(data, name="train"))
    for word in words:
        assert word in str(error.value)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(DataError, match="batch_size must be at least 1, not 0"):
        Batches((X, Y), batch_size=0)


@pytest.mark.parametrize(("row", "which"), [(0, "first"), (10, "last")])
def test_rows_that_change_between_two_passes_are_found(row, which):
    data = Changing(row=None)
    batches = Batches(data, 4, name="train")
    list(batches)
    data.changing = row
    with pytest.raises(DataError, match=rf"rows of the train changed.*{which}.*augmentation"):
        list(batches)


@pytest.mark.parametrize("data", [Augmented(), Changing(0), Changing(10)], ids=["noise", "first row", "last row"])
def test_random_augmentation_is_found_before_any_pass_and_without_touching_the_random_state(data):
    before = torch.get_rng_state()
    with pytest.raises(DataError, match="rows of the train differ between two readings: turn off random augmentation"):
        Batches(data, 4, name="train")
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_changed_in_place_between_two_passes_are_found():
    x = X.clone()
    batches = Batches((x, Y), 4, name="train")
    list(batches)
    x[0] += 1
    with pytest.raises(DataError, match="the first batch differs"):
        list(batches)


def test_a_data_set_shorter_than_its_length_is_refused():
    class Short(Rows):
        def __len__(self):
            return 20

    with pytest.raises((DataError, IndexError)):
        list(Batches(Short(), 4))


def test_every_error_of_the_library_is_a_value_error():
    assert issubclass(DataError, RefluenceError)
    assert issubclass(RefluenceError, ValueError)


# ------------------------------------------------------------------ rows that another one stands for


class Withheld(Rows):
    """Rows of which some cannot be read."""

    def __init__(self, *withheld):
        super().__init__()
        self.withheld = withheld

    def __getitem__(self, row):
        if row in self.withheld:
            raise FileNotFoundError(f"row {row}")
        return super().__getitem__(row)


REPLACED = torch.tensor([0, 1, 4, 3, 4, 4, 6, 7, 8, 9, 4])
"""What is read where rows 2, 5 and 10 are replaced by row 4."""
WITHHELD = {
    **HOLDERS,
    "data set without the rows": Withheld(2, 5, 10),
    "loader without the rows": DataLoader(Withheld(2, 5, 10), batch_size=4),
    "loader with workers": DataLoader(Withheld(2, 5, 10), batch_size=4, num_workers=1),
}


@pytest.mark.parametrize("holder", WITHHELD)
def test_replaced_rows_read_as_another_one_in_every_way_of_reading(holder):
    batches = Batches(WITHHELD[holder], batch_size=4).replacing([2, 5, 10], 4)
    for _ in range(2):
        pieces = list(batches)
        assert [start for start, _ in pieces] == [0, 4, 8]
        assert torch.equal(torch.cat([batch[0] for _, batch in pieces]), X[REPLACED])
        assert torch.equal(torch.cat([batch[1] for _, batch in pieces]), REPLACED)
    assert torch.equal(torch.cat([x for x, _ in batches.raw()]), X[REPLACED])
    assert batches.select([10, 2, 3, 4])[1].tolist() == [4, 4, 3, 4]
    [(start, (x, y))] = batches.holding([(9, 10)])
    assert (start, y.tolist()) == (8, [8, 9, 4])
    assert torch.equal(x, X[[8, 9, 4]])
    mapped = batches.mapped(lambda start, batch: (start, batch[1].tolist()))
    assert [batch for _, batch in mapped] == [(0, [0, 1, 4, 3]), (4, [4, 4, 6, 7]), (8, [8, 9, 4])]
    part = batches.stretch(8, 11)
    assert [batch[1].tolist() for _, batch in part] == [[8, 9, 4]]
    assert part.select([2, 0])[1].tolist() == [4, 8]
    assert batches.checksum == Batches((X[REPLACED], REPLACED)).checksum


def test_replacing_changes_neither_the_data_nor_the_batches_it_is_made_from():
    x, y = X.clone(), Y.clone()
    before = Batches((x, y), 4)
    after = before.replacing([1], 0)
    assert torch.equal(after.select([1])[0], X[:1])
    list(after)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert torch.equal(torch.cat([x for _, (x, _) in before]), X)


def test_rows_replaced_twice_read_as_the_last_one():
    for holder in (HOLDERS["tuple"], HOLDERS["data set"], WITHHELD["data set without the rows"]):
        batches = Batches(holder, 4).replacing([2, 5], 0).replacing([0, 10], 1)
        assert torch.cat([y for _, (_, y) in batches]).tolist() == [1, 1, 1, 3, 4, 1, 6, 7, 8, 9, 1]
    part = Batches(HOLDERS["data set"], 4).replacing([5], 0).stretch(4, 11).replacing([6], 2)
    assert part.select(range(7))[1].tolist() == [4, 6, 6, 7, 8, 9, 6]


@pytest.mark.parametrize(("rows", "by"), [([2], 2), ([2], 11), ([11], 1), ([-1], 1), ([2], -1)])
def test_a_row_cannot_stand_for_itself_or_for_none(rows, by):
    with pytest.raises(DataError, match="cannot stand for rows"):
        Batches((X, Y)).replacing(rows, by)


def test_a_row_that_cannot_be_read_is_no_error_before_it_is_needed_and_named_then():
    batches = Batches(Withheld(0, 1, 2, 3, 6, 9), 4)
    assert batches.select([5])[1].tolist() == [5]
    with pytest.raises(FileNotFoundError) as raised:
        list(batches.holding([(4, 8)]))
    assert raised.value.__notes__ == ["raised by reading data row 6"]
    with pytest.raises(FileNotFoundError) as raised:
        batches.select([5, 9])
    assert raised.value.__notes__ == ["raised by reading data row 9"]
    with pytest.raises(FileNotFoundError) as raised:
        list(Batches(Withheld(10), 4, name="train"))
    assert raised.value.__notes__ == ["raised by reading train row 10"]


def test_rows_that_can_be_read_are_compared_where_others_cannot():
    class Both(Changing):
        def __getitem__(self, row):
            if row == 1:
                raise FileNotFoundError
            return super().__getitem__(row)

    with pytest.raises(DataError, match="differ between two readings"):
        Batches(Both(2))


@pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
@pytest.mark.parametrize(("first", "stop"), [(0, 8), (8, 16), (16, 21), (8, 21)])
def test_a_stretch_has_the_batches_of_the_whole_and_knows_its_place(kind, first, stop):
    x, y = torch.arange(21.0)[:, None], torch.arange(21)
    data = {
        "tensors": (x, y),
        "dataset": list(zip(x, y, strict=True)),
        "loader": DataLoader(Listed(x, y), batch_size=4),
    }
    whole = Batches(data[kind], 4)
    part = whole.stretch(first, stop)
    assert (part.n, part.first, part.whole) == (stop - first, first, 21)
    expected = {start: batch for start, batch in whole if first <= start < stop}
    for start, (rows, labels) in part:
        assert torch.equal(rows, expected[first + start][0])
        assert torch.equal(labels, expected[first + start][1])
    told = list(part.mapped(lambda start, _: start))
    assert [first + start for start, _ in told] == [start for _, start in told]
    smaller = part.of_size(3)
    assert torch.equal(torch.cat([rows for _, (rows, _) in smaller]), x[first:stop])


def test_a_stretch_begins_where_a_batch_does():
    with pytest.raises(DataError, match="multiple of 4"):
        Batches((torch.ones(9),), 4).stretch(3, 9)


class Listed(Dataset):
    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, row):
        return tuple(column[row] for column in self.columns)
