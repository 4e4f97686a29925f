"""Where rows are held."""

import errno
import os
from dataclasses import replace

import pytest
import torch

import refluence as rf
from refluence.errors import StoreError
from refluence.store import memory
from refluence.store.memory import empty_rows, mapped
from support.stored import Counting, N, data

CPU, OTHER = torch.device("cpu"), torch.device("meta")
SIZES = {"a": (5, 3), "b": (5, 2)}


def test_rows_of_another_device_are_held_on_the_cpu():
    assert {rows.device for rows in empty_rows(SIZES, torch.float32, OTHER, "cpu").values()} == {CPU}
    assert {rows.device for rows in empty_rows(SIZES, torch.float32, OTHER, "none").values()} == {OTHER}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mapped_file_has_no_name_and_holds_what_is_written(dtype, tmp_path):
    rows = mapped((7, 3), dtype, tmp_path)
    rows[2:4] = 5.0
    assert rows.dtype == dtype
    assert rows.sum() == 30.0
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_file_takes_its_room_at_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(memory, "_reserve", refuse)
    with pytest.raises(StoreError, match=r"no room for 8.0 KB of train gradients in .*offload=\"none\""):
        mapped((100, 20), torch.float32, tmp_path)


def test_the_plan_counts_no_memory_for_rows_on_the_disk():
    sketch = rf.solvers.Sketched(rf.sketches.SJLT(32))
    plans = {
        offload: rf.Influence(
            rf.Task(Counting()), solver=sketch, execution=rf.Execution(offload=offload), progress=False
        ).plan_for(data(N))
        for offload in ("none", "cpu", "disk")
    }
    assert plans["none"].memory - plans["disk"].memory == pytest.approx(4 * N * 32)
    assert plans["cpu"].memory == plans["none"].memory
    workload = replace(plans["cpu"].workload, device=torch.device("meta"))
    assert sketch.cost(workload).fixed == pytest.approx(sketch.cost(plans["disk"].workload).fixed)
