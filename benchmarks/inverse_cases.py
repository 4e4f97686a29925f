"""The cases of the inverses (C + λI)⁻¹: each solver of ours next to the peers that have it."""

from __future__ import annotations

from typing import Any

from benchmarks.case import Case, Size

WORKERS = "benchmarks.workers"
RANK = 64
TOLERANCE = 1e-3
PEER_STEPS = 50  # on the Hessian, where conjugate gradients of the peers reach no tolerance
# pyDVL's defaults: short of the answer by (1 - λ/scale)^depth, which is 37 % at λ = 0.01
LISSA = {"scale": 10.0, "depth": 1000, "batch": 50}


def inverse_cases(size: Size, damping: float) -> list[Case]:
    """Every case, ours first in each item."""
    return [
        *_conjugate_gradients(size, damping),
        *_sampled(damping),
        *_kronecker(size, damping),
        *_lissa(size, damping),
        *_low_rank(size, damping),
        *_harmonic(size, damping),
    ]


def ours(
    name: str, item: str, method: str, curvature: str, solver: dict[str, Any], damping: float, **others: Any
) -> Case:
    """A solver of ours through the public interface, compared with the exact scores of its curvature."""
    options = {"damping": damping, "curvature": curvature, "solver": solver}
    if tests := others.get("units"):
        options["tests"] = tests
    reference = "fisher" if curvature == "fisher" else "ggn"
    shared = {"scores": "values", "reference": reference, "curvature": curvature}
    return Case(name, item, "refluence", method, f"{WORKERS}.attribution", options, **(shared | others))


def pydvl(
    name: str, item: str, text: str, size: Size, damping: float, method: str, curvature: str, **settings: Any
) -> Case:
    """A solver of pyDVL: `influence_factors` of the tests, then `influences_from_factors` with the train rows.

    `tests` and `batch` say how many tests and how large the batches of its loader are, `warm_up` what is less where
    the method is only warmed up; other settings are its own.
    """
    tests, less = settings.pop("tests", None), settings.pop("warm_up", {})
    options = {
        "damping": damping,
        "batch": min(settings.pop("batch", size.n_train // 10), size.n_train),
        "method": method,
        "curvature": curvature,
        "settings": settings,
        "warm_up": {"settings": settings | less},
    }
    if tests:
        options["tests"] = tests
    return Case(
        name,
        item,
        "pyDVL",
        text,
        f"{WORKERS}.pydvl_influence",
        options,
        repetitions=1,
        scores="values",
        reference="fisher" if curvature == "fisher" else "ggn",
        curvature=curvature,
        units=tests,
    )


def dattri(name: str, item: str, text: str, damping: float, curvature: str, **options: Any) -> Case:
    """An attributor of dattri, with all data as one batch as in its MNIST scripts."""
    return Case(
        name,
        item,
        "dattri",
        text,
        f"{WORKERS}.dattri_influence",
        {"damping": damping, "curvature": curvature} | options,
        repetitions=1,
        scores="values",
        reference="ggn",
        curvature=curvature,
        units=options.get("tests"),
    )


def _conjugate_gradients(size: Size, damping: float) -> list[Case]:
    single = {"item": "solve", "curvature": "ggn", "damping": damping, "repetitions": 1}
    solver = {"rtol": TOLERANCE}
    peer: dict[str, Any] = {"rtol": TOLERANCE, "maxiter": PEER_STEPS}
    return [
        ours("cg-block", method="block CG to 1e-3", solver={"ConjugateGradient": solver}, **single),
        ours(
            "cg-nystroem",
            method=f"block CG to 1e-3, Nyström preconditioner of rank {2 * RANK}",
            solver={"ConjugateGradient": solver | {"preconditioner": {"preconditioners.Nystroem": {"rank": 2 * RANK}}}},
            **single,
        ),
        ours(
            "cg-ekfac",
            method="block CG to 1e-3, EK-FAC preconditioner",
            solver={"ConjugateGradient": solver | {"preconditioner": {"Ekfac": {}}}},
            units=size.cg_tests,
            **single,
        ),
        ours(
            "cg-columns",
            method="CG to 1e-3, each column its own space",
            solver={"ConjugateGradient": solver | {"block": False}},
            units=size.some,
            **single,
        ),
        pydvl(
            "pydvl-cg-block",
            "solve",
            f"block CG, rtol 1e-3, at most {PEER_STEPS} steps",
            size,
            damping,
            "CgInfluence",
            "hessian",
            solve_simultaneously=True,
            tests=size.some,
            **peer,
        ),
        pydvl(
            "pydvl-cg-columns",
            "solve",
            f"CG by columns, rtol 1e-3, at most {PEER_STEPS} steps",
            size,
            damping,
            "CgInfluence",
            "hessian",
            tests=size.few,
            **peer,
        ),
        pydvl(
            "pydvl-gn-block",
            "solve",
            f'block CG on its "GAUSS_NEWTON", rtol 1e-3, at most {PEER_STEPS} steps',
            size,
            damping,
            "CgInfluence",
            "fisher",
            solve_simultaneously=True,
            tests=size.some,
            **peer,
        ),
        pydvl(
            "pydvl-gn-columns",
            "solve",
            f'CG by columns on its "GAUSS_NEWTON", rtol 1e-3, at most {PEER_STEPS} steps',
            size,
            damping,
            "CgInfluence",
            "fisher",
            tests=size.few,
            **peer,
        ),
        dattri(
            "dattri-cg",
            "solve",
            f"IFAttributorCG as shipped, {PEER_STEPS} steps",
            damping,
            "hessian",
            method="cg",
            tests=size.few,
            steps=PEER_STEPS,
            no_grad=False,
        ),
        dattri(
            "dattri-cg-no-grad",
            "solve",
            f"IFAttributorCG under `torch.no_grad()`, {PEER_STEPS} steps",
            damping,
            "hessian",
            method="cg",
            tests=size.some,
            steps=PEER_STEPS,
            no_grad=True,
        ),
    ]


def _sampled(damping: float) -> list[Case]:
    return [
        ours("gram-sampled", "solve", "Gram, two sampled labels", "mc_fisher", {"Gram": {}}, damping, repetitions=1)
    ]


def _kronecker(size: Size, damping: float) -> list[Case]:
    # kronfluence's examples of this size take all data as one batch; smaller ones can be faster
    return [
        ours("kron", "ekfac", "EK-FAC, two sampled labels", "mc_fisher", {"Ekfac": {}}, damping),
        *(
            Case(
                f"kronfluence-{batch}",
                "ekfac",
                "kronfluence",
                f"EK-FAC, batches of {batch:,}",
                f"{WORKERS}.kronfluence_ekfac",
                {"damping": damping, "batch": batch},
                repetitions=3 if batch < size.n_train else 1,
                scores="values",
                reference="ggn",
                curvature="mc_fisher",
            )
            for batch in (size.n_train // 10, size.n_train)
        ),
        pydvl("pydvl-ekfac", "ekfac", "EK-FAC", size, damping, "EkfacInfluence", "true_fisher", update_diagonal=False),
        dattri("dattri-ekfac", "ekfac", "IFAttributorEKFAC", damping, "fisher", method="ekfac", no_grad=False),
    ]


def _lissa(size: Size, damping: float) -> list[Case]:
    shared = {"scale": LISSA["scale"], "depth": LISSA["depth"]}
    peer: dict[str, Any] = {
        "scale": LISSA["scale"],
        "maxiter": LISSA["depth"],
        "batch": LISSA["batch"],
        "tests": size.some,
    }
    peer["warm_up"] = {"maxiter": 5}
    text = f"LiSSA, scale {LISSA['scale']:g}, {LISSA['depth']:,} steps of {LISSA['batch']} examples"
    cases = []
    for curvature, claimed in (("ggn", "hessian"), ("fisher", "fisher")):
        solver = {"Lissa": shared | {"batch_size": LISSA["batch"]}}
        cases.append(
            ours(f"lissa-{curvature}", "lissa", text, curvature, solver, damping, units=size.some, repetitions=1)
        )
        cases.append(pydvl(f"pydvl-lissa-{claimed}", "lissa", text, size, damping, "LissaInfluence", claimed, **peer))
    automatic: dict[str, Any] = {"Lissa": {}}
    text = "LiSSA as it sets itself, all examples each step"
    cases.append(ours("lissa-auto", "lissa", text, "fisher", automatic, damping, units=size.some, repetitions=1))
    return cases


def _low_rank(size: Size, damping: float) -> list[Case]:
    arnoldi: dict[str, Any] = {"Arnoldi": {"rank": RANK}}
    nystroem: dict[str, Any] = {"Nystroem": {"rank": RANK}}
    return [
        ours("arnoldi-ggn", "arnoldi", f"Arnoldi, rank {RANK}", "ggn", arnoldi, damping, repetitions=1),
        ours("arnoldi-hessian", "arnoldi", f"Arnoldi, rank {RANK}", "hessian", arnoldi, damping, repetitions=1),
        pydvl(
            "pydvl-arnoldi",
            "arnoldi",
            f"Arnoldi, rank {RANK}, Woodbury",
            size,
            damping,
            "ArnoldiInfluence",
            "hessian",
            rank=RANK,
            use_woodbury=True,
            warm_up={"rank": 1, "tol": 0.1},
        ),
        ours("nystroem-ggn", "nystroem", f"Nyström, rank {RANK}", "ggn", nystroem, damping),
        pydvl(
            "pydvl-nystroem",
            "nystroem",
            f"Nyström sketch, rank {RANK}",
            size,
            damping,
            "NystroemSketchInfluence",
            "hessian",
            rank=RANK,
            warm_up={"rank": 4},
        ),
    ]


def _harmonic(size: Size, damping: float) -> list[Case]:
    return [
        ours("harmonic", "harmonic", "harmonic mean", "fisher", {"HarmonicMean": {}}, damping),
        pydvl(
            "pydvl-harmonic",
            "harmonic",
            "inverse harmonic mean",
            size,
            damping,
            "InverseHarmonicMeanInfluence",
            "fisher",
        ),
    ]
