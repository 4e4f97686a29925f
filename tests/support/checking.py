"""The checker of types and shapes in signatures."""

from beartype import BeartypeConf, beartype

# An int is taken where a float is meant, as type checkers do.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
