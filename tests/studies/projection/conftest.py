"""A tiny trained problem for all tests of these studies, with dense references."""

import pytest
import torch

from refluence.studies.folder import StudyFolder
from refluence.studies.projection.problem import BLOCK, Problem
from support.projection import OPTIONS


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Trained models of these tests, not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFLUENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def problem(own_cache):
    return Problem(OPTIONS, progress=False)


@pytest.fixture(scope="session")
def gradients(problem):
    """(G, V): all gradients as float64 rows."""
    return tuple(
        torch.cat([blocks[BLOCK].dense() for _, blocks in problem.rows(which)]).double() for which in ("train", "test")
    )


@pytest.fixture(scope="session")
def spectral(problem, tmp_path_factory):
    folder = StudyFolder(tmp_path_factory.mktemp("spectral") / "out", "x", {})
    folder.begin()
    return problem.spectral(folder)
