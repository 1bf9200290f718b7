"""Kinds of numbers in weight files, by their names in safetensors, without torch: it takes seconds to import."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

OutputDtype = Literal["keep", "F64", "F32", "F16", "BF16"]

# What torch calls each kind and a storage of it, and how its bytes are held: little-endian, as the format says. Numpy
# does not know bfloat16, which is handled as its 16 bits.
KINDS = {
    "F64": ("float64", "DoubleStorage", "<f8"),
    "F32": ("float32", "FloatStorage", "<f4"),
    "F16": ("float16", "HalfStorage", "<f2"),
    "BF16": ("bfloat16", "BFloat16Storage", "<u2"),
    "I64": ("int64", "LongStorage", "<i8"),
    "I32": ("int32", "IntStorage", "<i4"),
    "I16": ("int16", "ShortStorage", "<i2"),
    "I8": ("int8", "CharStorage", "i1"),
    "U64": ("uint64", "", "<u8"),
    "U32": ("uint32", "", "<u4"),
    "U16": ("uint16", "", "<u2"),
    "U8": ("uint8", "ByteStorage", "u1"),
    "BOOL": ("bool", "BoolStorage", "u1"),
}
STORED: dict[str, np.dtype[Any]] = {name: np.dtype(held) for name, (_, _, held) in KINDS.items()}
FLOATS = ("F64", "F32", "F16", "BF16")


def widen(stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Stored numbers as floats that numpy can compute with; a view, except for bfloat16.

    >>> widen(np.array([0x3F80, 0xC000], np.uint16), "BF16")
    array([ 1., -2.], dtype=float32)
    """
    if dtype != "BF16":
        return stored
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_once(values: NDArray[np.float64], dtype: str) -> NDArray[Any]:
    """Finite float64 to a stored kind, to nearest, ties to even, in one rounding; too large becomes infinite.

    The usual way to bfloat16 leads over float32 and rounds twice: 1 + 2**-8 + 2**-40 is above the middle of two
    neighbours, but float32 takes it for the middle, and ties to even then go down.

    >>> round_once(np.array([1 + 2**-8 + 2**-40, 1 + 2**-8]), "BF16").tolist() == [0x3F81, 0x3F80]
    True
    """
    with np.errstate(over="ignore", under="ignore"):
        if dtype != "BF16":
            return values.astype(STORED[dtype])
        nearest = values.astype(np.float32)
        bits = nearest.view(np.uint32)
        # Only between two bfloat16 does it matter what the first rounding did: go back to where the number came from.
        middle = np.flatnonzero((bits & np.uint32(0xFFFF)) == 0x8000)
        exact, rounded = np.abs(values[middle]), np.abs(nearest[middle]).astype(np.float64)
        bits[middle] += np.sign(exact - rounded).astype(np.int8).astype(np.uint32)
        return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
