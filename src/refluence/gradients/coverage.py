"""Which parameters are attributed, by which kind of gradient block, and which are not."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

KINDS = {
    "outer": "factors of outer products",
    "rows": "rows from the same pass",
    "vmap": "torch.func",
    "single": "one backward pass an example",
    "unused": "not used by the forward pass, gradient 0",
}


@dataclass(frozen=True)
class ParameterCoverage:
    """One parameter: its size, how its gradients are made, or why it is not attributed."""

    parameter: str
    numel: int
    kind: str | None
    reason: str

    @property
    def attributed(self) -> bool:
        """Whether scores include this parameter."""
        return self.kind is not None


@dataclass(frozen=True)
class Coverage:
    """Every parameter of the model, attributed or not."""

    parameters: tuple[ParameterCoverage, ...]

    @property
    def total(self) -> int:
        """Numbers in the model's parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def attributed(self) -> int:
        """Numbers in the attributed parameters."""
        return sum(parameter.numel for parameter in self.parameters if parameter.attributed)

    @property
    def by_kind(self) -> dict[str, int]:
        """Numbers in the attributed parameters, by kind of block."""
        totals: dict[str, int] = {}
        for parameter in self.parameters:
            if parameter.kind is not None:
                totals[parameter.kind] = totals.get(parameter.kind, 0) + parameter.numel
        return totals

    @property
    def summary(self) -> str:
        """One line for people."""
        share = 100 * self.attributed / self.total
        kinds = ", ".join(f"{count:,} by {KINDS[kind]}" for kind, count in self.by_kind.items())
        left = [parameter.parameter for parameter in self.parameters if not parameter.attributed]
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        return f"{self.attributed:,} of {self.total:,} parameters attributed ({share:.1f} %): {kinds}" + (
            f"; not attributed: {shown}" if left else ""
        )

    def frame(self) -> pd.DataFrame:
        """A row a parameter: parameter, numel, kind, attributed, reason."""
        return pd.DataFrame(
            [
                {
                    "parameter": p.parameter,
                    "numel": p.numel,
                    "kind": p.kind,
                    "attributed": p.attributed,
                    "reason": p.reason,
                }
                for p in self.parameters
            ]
        )

    def __str__(self) -> str:
        return self.summary
