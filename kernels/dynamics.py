"""The neuron's options as the ops take them: said here once, for every schema and every implementation."""

from typing import NamedTuple, get_type_hints

TORCH = {float: "float", bool: "bool", str: "str", float | None: "float?"}


class Dynamics(NamedTuple):
    """What each op of a neuron takes last, in this order, once it is checked."""

    # 1 / tau; not read where the decay is learnt.
    decay: float
    threshold: float
    decay_input: bool
    # None: soft reset.
    v_reset: float | None
    surrogate: str
    alpha: float
    detach_reset: bool


# The same as the end of an op's schema.
SCHEMA = ", ".join(f"{TORCH[kind]} {name}" for name, kind in get_type_hints(Dynamics).items())
