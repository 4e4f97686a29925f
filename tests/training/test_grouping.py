import pytest
from hypothesis import given
from hypothesis import strategies as st

from refluence.training.grouping import GROUP_BYTES, choose_groups

GB = 1 << 30


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=60),
    st.one_of(st.none(), st.integers(2, 9)),
    st.integers(1, 8),
    st.integers(1, 1 << 26),
    st.integers(1 << 20, 1 << 34),
)
def test_groups_are_a_partition_into_models_with_as_many_rows(rows, largest, workers, each, memory):
    sizes = {10 + i: count for i, count in enumerate(rows)}
    groups = choose_groups(sizes, largest, workers, each=each, memory=memory).groups
    assert sorted(i for group in groups for i in group) == sorted(sizes)
    for group in groups:
        assert len({sizes[i] for i in group}) == 1
        assert len(group) <= (largest or len(rows))
        assert len(group) == 1 or len(group) * each * workers <= memory


@pytest.mark.parametrize(
    ("count", "each", "workers", "expected"),
    [
        (100, 1_800_000, 2, [25] * 4),  # the published MNIST networks, on two cores
        (100, 1_800_000, 1, [25] * 4),
        (100, 3_000, 2, [100]),  # too little work to share
        (3, 20 << 20, 2, [2, 1]),
        (5, GROUP_BYTES + 1, 2, [1] * 5),
    ],
)
def test_groups_fit_the_cache_and_the_workers(count, each, workers, expected):
    grouping = choose_groups(dict.fromkeys(range(count), 7), None, workers, each=each, memory=64 * GB)
    assert [len(group) for group in grouping.groups] == expected


def test_as_many_as_memory_holds_where_there_is_no_cache_to_fit():
    grouping = choose_groups(dict.fromkeys(range(10), 7), None, 1, each=GB, memory=4 * GB, cached=False)
    assert [len(group) for group in grouping.groups] == [4, 3, 3]
