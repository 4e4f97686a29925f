"""Run the tests with the shapes and types of the library's signatures checked, and on one thread."""

import jaxtyping
import torch

import support.checking

# Only modules imported from here on are checked, so this is the first thing that the tests do.
jaxtyping.jaxtyped = support.checking.sampling
jaxtyping.install_import_hook("refluence", f"{support.checking.__name__}.checked")

# The tests' models are tiny: threads would only wait for each other, on busy machines for seconds.
torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """In every test the first calls are checked again."""
    support.checking.calls.clear()
