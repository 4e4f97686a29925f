"""The stages of the study, each kept in its folder when it is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pandas as pd
from jaxtyping import Float64
from torch import Tensor

from refluence.leverage import leverage_scores
from refluence.selection import el2n, grand
from refluence.studies.folder import Stage, StudyFolder
from refluence.studies.leverage_basis.agreement import compare
from refluence.studies.leverage_basis.arms import Arm, Chooser, arms, greedy_orders
from refluence.studies.leverage_basis.artefact import artefact
from refluence.studies.leverage_basis.bases import (
    KINDS,
    LOSSES,
    RAW,
    RELU,
    UNTRAINED,
    Basis,
    bases,
    leverages,
    random_features,
)
from refluence.studies.leverage_basis.heads import head_results
from refluence.studies.leverage_basis.images import Images, load_images
from refluence.studies.leverage_basis.networks import (
    EmbeddingNetwork,
    accuracy,
    embeddings,
    side_by_side,
    trained,
    untrained,
)
from refluence.studies.leverage_basis.options import Options
from refluence.studies.leverage_basis.trainings import (
    convolutional_results,
    early_models,
    network_results,
    small_network,
)
from refluence.task import Task

REFERENCE_RIDGES = (1e-3, 1e-2)


@dataclass(eq=False)
class Work:
    """What the study computes, stage by stage; `facts` are those of the stages done so far."""

    folder: StudyFolder
    options: Options
    progress: bool

    def __post_init__(self) -> None:
        self.facts: dict[str, Mapping[str, Any]] = {}
        self.bases = bases(self.options)
        self.arms = arms(self.options)

    @cached_property
    def images(self) -> Images:
        """The data."""
        return load_images(self.options)

    @property
    def sizes(self) -> list[int]:
        """k of every selection: those below the whole train set, and the whole."""
        return [*(k for k in self.options.sizes if k < self.images.n_train), self.images.n_train]

    @cached_property
    def networks(self) -> dict[str, Stage]:
        """Weights of every network that is trained, by the name of its basis."""
        jobs = []
        wanted = [basis for basis in self.bases if basis.group in LOSSES]
        for basis in wanted:
            start = untrained(self.options, self.images.side, basis.seed)
            jobs.append(partial(self.folder.stage, f"network/{basis.name}", partial(self._train, basis, start)))
        stages = side_by_side(jobs, "training the embeddings", self.progress)
        found = {basis.name: stage for basis, stage in zip(wanted, stages, strict=True)}
        self.facts |= {f"network/{name}": stage.facts for name, stage in found.items()}
        return found

    def _train(self, basis: Basis, start: EmbeddingNetwork) -> tuple[dict[str, Tensor], dict[str, Any]]:
        images = self.images
        model = trained(start, images, basis.seed, LOSSES[basis.group], epochs=self.options.epochs)
        facts = {"train_accuracy": accuracy(model, images.train), "test_accuracy": accuracy(model, images.test)}
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}, facts

    def features(self, basis: Basis) -> Float64[Tensor, "n d"]:
        """The images in a basis."""
        if basis.group == RAW:
            return self.images.pixels
        if basis.group.startswith(RELU):
            return random_features(self.images.pixels, int(basis.group.removeprefix(f"{RELU}_")))
        model = untrained(self.options, self.images.side, basis.seed)
        if basis.group != UNTRAINED:
            model.load_state_dict(dict(self.networks[basis.name].tensors))
        return embeddings(model.eval(), self.images.inputs).double()

    @cached_property
    def difficulty(self) -> Stage:
        """EL2N and GraNd of the train rows."""

        def work() -> tuple[dict[str, Tensor], dict[str, Any]]:
            task = Task(small_network(self.images.side, self.options.hidden))
            models = early_models(self.images, self.options, self.folder.part("early"), self.progress)
            train = self.images.train
            found = {
                "el2n": el2n(task, train, models, progress=self.progress),
                "grand": grand(task, train, models, progress=self.progress),
            }
            return found, {"test_accuracy": sum(accuracy(model, self.images.test) for model in models) / len(models)}

        return self._stage("difficulty", work)

    @cached_property
    def greedy(self) -> Stage:
        """The orders of the greedy methods in the pixels of the train rows."""

        def work() -> tuple[dict[str, Tensor], dict[str, Any]]:
            pixels = self.images.pixels[: self.images.n_train]
            return greedy_orders(pixels, self.options.greedy, self.progress), {}

        return self._stage("greedy", work)

    @cached_property
    def measured(self) -> dict[str, Stage]:
        """Leverage in every basis, and its linear heads, whose features are then forgotten."""
        self._begin()
        return {basis.name: self._stage(f"basis/{basis.name}", partial(self._measure, basis)) for basis in self.bases}

    def _begin(self) -> None:
        """What has threads of its own, or is the same for all bases."""
        _ = self.networks, self.difficulty, self.greedy

    def _measure(self, basis: Basis) -> tuple[dict[str, Tensor], dict[str, Any]]:
        features = self.features(basis)
        tensors, facts = leverages(features, self.images, self.options, basis.name)
        seeds = [basis.seed] if basis.seed else list(range(1, self.options.seeds + 1))
        own = {(basis.group, kind): tensors[f"{kind}_train"] for kind in KINDS}
        chooser = self._chooser(own | self._difficulty_scores if basis.group == RAW else own)
        records = head_results(
            basis, features, self.images.labels, chooser, self._heads_of(basis), self.sizes, seeds, self.progress
        )
        return tensors, {**facts, "heads": records}

    def _heads_of(self, basis: Basis) -> list[Arm]:
        elsewhere = ("el2n", "grand", "") if basis.group == RAW else ("",)
        return [arm for arm in self.arms if arm.source == basis.group or arm.source in elsewhere]

    @property
    def _difficulty_scores(self) -> dict[tuple[str, str], Tensor]:
        return {(name, ""): scores for name, scores in self.difficulty.tensors.items()}

    def _chooser(self, scores: Mapping[tuple[str, str], Tensor]) -> Chooser:
        return Chooser(self.images.labels[: self.images.n_train], scores, self.greedy.tensors)

    @cached_property
    def chooser(self) -> Chooser:
        """Rows of every arm, of all bases."""
        own = {
            (basis.name, kind): stage.tensors[f"{kind}_train"]
            for basis, stage in zip(self.bases, self.measured.values(), strict=True)
            for kind in KINDS
        }
        return self._chooser(own | self._difficulty_scores)

    def scores(self, kind: str) -> dict[str, Float64[Tensor, " n"]]:
        """Leverage of all images in every basis."""
        return {name: stage.tensors[f"{kind}_all"] for name, stage in self.measured.items()}

    def accuracies(self) -> pd.DataFrame:
        """Question 1: one row a training, with what was trained, on which rows, and its accuracy."""
        records = [record for stage in self.measured.values() for record in stage.facts["heads"]]
        for k in self.sizes:
            # Of the whole train set all arms are one.
            here = self.arms if k < self.images.n_train else self.arms[:1]
            path = self.folder.part(f"unfinished/{k}")
            work = partial(network_results, self.images, self.chooser, self.options, here, k, path, self.progress)
            records += self._stage(f"networks/{k}", lambda work=work: ({}, {"records": work()})).facts["records"]
        convolutional = convolutional_results(
            self.folder, self.images, self.chooser, self.options, self.arms, self.progress
        )
        self.facts |= {name: stage.facts for name, stage in convolutional.items()}
        records += [stage.facts["record"] for stage in convolutional.values()]
        return pd.DataFrame(records)

    @cached_property
    def agreement(self) -> dict[str, Stage]:
        """Question 2: the measures of every pair of bases, by plain and by ridge leverage."""

        def work(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
            return compare(self.scores(kind), self.bases, kind, self.progress), {}

        return {kind: self._stage(f"agreement/{kind}", partial(work, kind)) for kind in KINDS}

    @cached_property
    def artefact(self) -> Stage:
        """The leverage of unpivoted QR in float32, and reference ridges in raw pixels."""

        def work() -> tuple[dict[str, Tensor], dict[str, Any]]:
            pixels = self.images.pixels
            tensors, facts = artefact(pixels, self.scores("plain")[RAW])
            for ridge in REFERENCE_RIDGES:
                found = leverage_scores(pixels, ridge, progress=False).values
                facts[f"effective_dimension_{ridge:g}"] = float(found.sum())
                facts[f"max_{ridge:g}"] = float(found.max())
            return tensors, facts

        return self._stage("artefact", work)

    def _stage(self, name: str, work: Any) -> Stage:
        found = self.folder.stage(name, work)
        self.facts[name] = found.facts
        return found
