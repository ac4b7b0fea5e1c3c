"""NumPy's arrays and numbers in files of `torch.save`, read without NumPy's own code for pickles.

Many scripts save an accuracy as a NumPy number, or weights as arrays. PyTorch's `weights_only` refuses them, and
NumPy's `__setstate__` is not made for files of strangers. What stands here in its place takes plain numbers only.
"""

import math
from typing import Any

import numpy as np

# Types by their names in a pickle, less the byte order: what is written as a number, and no object.
PLAIN = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class PickledType:
    """A `numpy.dtype` in a pickle."""

    def __init__(self, name: str, align: bool = False, copy: bool = True):
        if name not in PLAIN:
            raise ValueError(
                f"it holds NumPy values of type {name!r}, which are no plain numbers; save the weights alone"
            )
        self.name = name
        self.order = "|"

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError("it holds NumPy values in an unknown byte order")
        self.order = state[1]

    def read(self, content: bytes | str, shape: tuple[int, ...], fortran: bool = False) -> np.ndarray:
        """The values of an array.

        Raises:
            ValueError: there are more or fewer than the shape says.
        """
        raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
        values = np.frombuffer(raw, np.dtype(self.order + self.name))
        if any(not isinstance(side, int) or side < 0 for side in shape) or math.prod(shape) != len(values):
            raise ValueError("it holds a NumPy array that is not whole")
        native = values.astype(values.dtype.newbyteorder("="))
        return native.reshape(shape, order="F" if fortran else "C")


class PickledArray:
    """A `numpy.ndarray` in a pickle; `value` is the array once its state was read."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, PickledType):
            raise ValueError("it holds a NumPy array of an unknown type")
        self.value = kind.read(content, shape, bool(fortran))


def empty_array(kind: type, shape: tuple, code: bytes) -> PickledArray:
    """In the place of `_reconstruct`: an array whose state follows."""
    return PickledArray()


def number(kind: PickledType, content: bytes | str) -> Any:
    """In the place of `scalar`: the Python number."""
    return kind.read(content, ()).item()


# NumPy 2 moved the module; files name the one of their time.
STAND_INS = [
    (PickledType, "numpy.dtype"),
    (PickledArray, "numpy.ndarray"),
    *((empty_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
