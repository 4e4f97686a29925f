"""Stores of train gradients and of sums over them: shards by row, known by the checksums of their rows.

`rf.Execution(store=PATH)` makes and uses one; `refluence store` looks after it.
"""

from refluence.store.inspection import Damage, Part, StoreInfo, describe, prune, verify

__all__ = ["Damage", "Part", "StoreInfo", "describe", "prune", "verify"]
