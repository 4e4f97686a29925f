"""From `--methods ggn:cg,fisher:gram` to several ways of computing influence, with the settings that each takes."""

from __future__ import annotations

import dataclasses

import typer

from refluence.cli.execution_options import FACTORED
from refluence.cli.method import Method, parse_damping
from refluence.cli.options import CurvatureName, PreconditionerName, SolverName
from refluence.cli.solver import TAKEN_BY, SolverChoice, flag

_HINT = "--methods"


def parse_methods(text: str | None, base: Method) -> dict[str, Method]:
    """Name → method: the one of `--curvature` and `--solver`, or each CURVATURE:SOLVER[:DAMPING] of the text.

    Settings of solvers go to every method whose solver has them; in a store each has a folder of its own.

    Raises:
        typer.BadParameter: not understood, named twice, or a setting that no method takes.
    """
    if text is None:
        base.check()
        return {f"{base.curvature.value}:{base.solver.solver.value}": base}
    if base.solver.solver is not SolverName.AUTO:
        raise typer.BadParameter("is decided by --methods: leave it out", param_hint="--solver")
    methods: dict[str, Method] = {}
    for term in (term.strip() for term in text.split(",")):
        if term in methods:
            raise typer.BadParameter(f"{term!r} is named twice", param_hint=_HINT)
        methods[term] = _method(term, base)
    for name in TAKEN_BY:
        if getattr(base.solver, name) is not None and all(getattr(m.solver, name) is None for m in methods.values()):
            raise typer.BadParameter(f"is taken by none of {', '.join(methods)}", param_hint=flag(name))
    if all(method.solver.solver in FACTORED for method in methods.values()):
        base.execution.check_solver(next(iter(methods.values())).solver.solver)
    for method in methods.values():
        method.check()
    return methods


def _method(term: str, base: Method) -> Method:
    curvature, _, rest = term.partition(":")
    solver, _, damping = rest.partition(":")
    try:
        chosen = CurvatureName(curvature), SolverName(solver)
    except ValueError as error:
        raise typer.BadParameter(
            f"{term!r} is not of the form CURVATURE:SOLVER or CURVATURE:SOLVER:DAMPING, such as ggn:cg or "
            f"fisher:gram:1e-3; curvatures: {', '.join(CurvatureName)}; solvers: {', '.join(SolverName)}",
            param_hint=_HINT,
        ) from error
    if damping:
        parse_damping(damping)
    return dataclasses.replace(
        base,
        curvature=chosen[0],
        samples=base.samples if chosen[0] is CurvatureName.MC_FISHER else None,
        solver=_settings(chosen[1], base.solver),
        damping=damping or base.damping,
        execution=base.execution.of_method(f"{curvature}-{solver}", chosen[1]),
    )


def _settings(solver: SolverName, given: SolverChoice) -> SolverChoice:
    """The settings that this solver takes; cg takes a rank only for its Nyström preconditioner."""
    taken = {name: getattr(given, name) for name, solvers in TAKEN_BY.items() if solver in solvers}
    if solver is SolverName.CG and given.preconditioner is not PreconditionerName.NYSTROEM:
        taken["rank"] = None
    return SolverChoice(solver, **taken)
