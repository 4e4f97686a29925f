"""The effective dimension that a factorised sketch needs, layer by layer, against the unstructured one (Remark 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from refluence.curvature import OuterCurvature
from refluence.curvature.build import make_curvature
from refluence.curvature.layer_factors import Covariances, Layer, covariances, factored_batches, layers_of
from refluence.errors import DataError
from refluence.studies.folder import Stage
from refluence.studies.page import Fact, Picture, StudyPage
from refluence.studies.projection.grid import Dampings
from refluence.studies.projection.output import new_figure, projection_page, series_colors, short, table_of
from refluence.studies.projection.problem import Problem
from refluence.studies.projection.study import Study, StudyOptions
from refluence.theory import effective_dimension, factor_dampings, factor_dimensions, kronecker_dimension


@dataclass(frozen=True)
class FactorizedEdim(StudyOptions):
    """One run of the study.

    Args:
        problem: data set and model.
        dampings: λ.
        compute_full_fisher: also d_λ of the whole empirical Fisher, from its Gram matrix.
    """

    NAME = "factorized-edim"

    dampings: Dampings = field(default_factory=Dampings)
    compute_full_fisher: bool = False


def run(options: FactorizedEdim, out: Path, *, cache_dir: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Do the study in a folder, or what is left of it, and return the content of its `summary.json`.

    Raises:
        DataError: data that is not on this machine; a model without a layer that has Kronecker factors; a folder of
            something else or of other settings.
    """
    study = Study.open(options, out, cache_dir, progress)
    factors = study.folder.stage("factors", lambda: layer_spectra(study.problem))
    dampings = options.dampings.values()
    results = pd.DataFrame(
        [row for name in factors.facts["layers"] for row in layer_rows(name, factors, dampings)],
    )
    totals = results.groupby("damping")[["unstructured", "factorised"]].sum()
    full: list[float] | None = None
    if options.compute_full_fisher:
        eigenvalues = study.spectral.eigenvalues
        full = [effective_dimension(eigenvalues, damping) for damping in dampings]
    summary: dict[str, Any] = {
        **study.facts(),
        "layers": factors.facts["layers"],
        "layers_without_factors": factors.facts["without"],
        "damping": dampings,
        "unstructured": totals.loc[dampings, "unstructured"].tolist(),
        "factorised": totals.loc[dampings, "factorised"].tolist(),
        "ratio": (totals["factorised"] / totals["unstructured"]).loc[dampings].tolist(),
        "full_fisher": full,
        "smallest_ratio_of_a_layer": float(results["ratio"].min()),
        "largest_ratio_of_a_layer": float(results["ratio"].max()),
    }
    figures = {"dimensions": dimension_figure(results, summary)}
    return study.finish(summary, results, figures, page_of(summary, results, figures["dimensions"]))


def layer_spectra(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Eigenvalues of A and E of every layer that has Kronecker factors, as K-FAC's.

    A is the mean of the inputs' outer products, E the sum of the output gradients' over examples and positions, divided
    by the examples. So tr A·tr E is of the size of the layer's Fisher for convolutions too, where means of both over
    positions would be too small by their number.

    Raises:
        DataError: no layer has.
    """
    rows = problem.rows("train")
    curvature = make_curvature("fisher", rows, None, 1, 0, 0)
    assert isinstance(curvature, OuterCurvature)
    layers = layers_of(rows.capture)
    found: dict[Layer, Covariances] = {}
    without: set[Layer] = {layer for layer in layers if layer.route.kind != "outer" or layer.owner.weight is None}
    candidates = [layer for layer in layers if layer not in without]
    for _, factors in factored_batches(curvature, candidates):
        for layer, parts in factors.items():
            if parts is None:
                without.add(layer)
            elif layer not in without:
                part = covariances(parts, None, "expand")
                found[layer] = found[layer].add(part) if layer in found else part
    kept = {layer: total for layer, total in found.items() if layer not in without}
    if not kept:
        raise DataError(f"no layer of {problem.options.model} has Kronecker factors: choose a model with linear layers")
    tensors = {}
    for place, total in enumerate(kept.values()):
        tensors[f"A/{place}"] = _eigenvalues(total.columns / total.count)
        tensors[f"E/{place}"] = _eigenvalues(total.rows / rows.n)
    return tensors, {
        "layers": [layer.owner.names[0].removesuffix(".weight") for layer in kept],
        "without": [name for layer in layers if layer in without for name in layer.owner.names],
    }


def _eigenvalues(moment: Tensor) -> Tensor:
    values = moment if moment.ndim == 1 else torch.linalg.eigvalsh((moment + moment.T) / 2)
    return values.clamp(min=0.0).sort(descending=True).values


def layer_rows(name: str, factors: Stage, dampings: list[float]) -> list[dict[str, Any]]:
    """d_λ(A⊗E), d_{λ_E}(A), d_{λ_A}(E), their product, and its ratio to d_λ(A⊗E), one row a damping."""
    place = factors.facts["layers"].index(name)
    inputs, outputs = factors.tensors[f"A/{place}"], factors.tensors[f"E/{place}"]
    found = []
    for damping in dampings:
        of_a, of_e = factor_dimensions(inputs, outputs, damping)
        damping_a, damping_e = factor_dampings(inputs, outputs, damping)
        whole = kronecker_dimension(inputs, outputs, damping)
        found.append(
            {
                "layer": name,
                "damping": damping,
                "d_A": len(inputs),
                "d_E": len(outputs),
                "norm_A": float(inputs[0]),
                "norm_E": float(outputs[0]),
                "lambda_E": damping_a,
                "lambda_A": damping_e,
                "unstructured": whole,
                "dimension_A": of_a,
                "dimension_E": of_e,
                "factorised": of_a * of_e,
                "ratio": of_a * of_e / whole,
            }
        )
    return found


def dimension_figure(results: pd.DataFrame, summary: Mapping[str, Any]) -> Figure:
    """Both dimensions of every layer against λ, and their ratio."""
    figure, axes = new_figure(2)
    left, right = axes[0]
    for layer, color in zip(summary["layers"], series_colors(len(summary["layers"])), strict=True):
        rows = results[results["layer"] == layer]
        left.loglog(rows["damping"], rows["unstructured"], color=color, linewidth=1.4, label=layer)
        left.loglog(rows["damping"], rows["factorised"], color=color, linewidth=1.4, linestyle="--")
        right.loglog(rows["damping"], rows["ratio"], color=color, linewidth=1.4)
    if summary["full_fisher"] is not None:
        left.loglog(summary["damping"], summary["full_fisher"], color="black", linewidth=1.0, label="full Fisher")
    right.axhline(1 / 3, color="#8a8f98", linewidth=0.8, linestyle=":")
    left.set(xlabel="λ", ylabel="effective dimension")
    right.set(xlabel="λ", ylabel="factorised ÷ unstructured")
    left.legend(frameon=False, fontsize=7)
    return figure


def page_of(summary: Mapping[str, Any], results: pd.DataFrame, figure: Figure) -> StudyPage:
    """The page."""
    columns = {"Σ d_λ(A⊗E)": "unstructured", "Σ of products": "factorised", "ratio": "ratio"}
    if summary["full_fisher"] is not None:
        columns["d_λ(F)"] = "full_fisher"
    table = table_of(summary, columns, "damping", 4)
    for layer in summary["layers"]:
        rows = results[results["layer"] == layer]
        table[f"ratio of {layer}"] = [short(v) for v in rows["ratio"]]
    return projection_page(
        title="What does a factorised sketch cost?",
        lead=f"{summary['model']} on {summary['dataset']}: a sketch P_A ⊗ P_E of a layer needs "
        "d_{λ_E}(A)·d_{λ_A}(E) in place of d_λ(A⊗E), with λ_E = λ/‖E‖ and λ_A = λ/‖A‖.",
        facts=(
            Fact("Layers", str(len(summary["layers"])), "with Kronecker factors"),
            Fact(
                "Smallest ratio",
                short(summary["smallest_ratio_of_a_layer"]),
                "of a layer; not below 1/3 for λ ≤ ‖A‖‖E‖",
            ),
            Fact(
                "Largest ratio", short(summary["largest_ratio_of_a_layer"]), "of a layer: rows that the structure costs"
            ),
        ),
        pictures=(
            Picture(
                figure,
                "Effective dimensions of every layer against damping, and their ratio",
                "Solid: d_λ(A⊗E); dashed: the product of the factors' dimensions. Dotted: 1/3.",
            ),
        ),
        findings=(
            (
                "The structure has its price",
                "The product of the factors' dimensions exceeds d_λ(A⊗E) where joint tails of both spectra are long: a "
                "factorised sketch needs that many more rows, and by Theorem 6 they grow as 1/ε⁴ where an unstructured "
                "sketch's grow as 1/ε².",
            ),
            *(
                [("Without factors", ", ".join(summary["layers_without_factors"]) + " have no Kronecker form.")]
                if summary["layers_without_factors"]
                else []
            ),
        ),
        table=table,
        table_caption="Sums over the layers, and each layer's ratio.",
        row_name="λ",
    )
