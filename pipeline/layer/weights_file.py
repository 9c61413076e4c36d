"""A layer's weights in a .safetensors file: maps of it, made without torch."""

from __future__ import annotations

import json
import os
from math import prod
from typing import Any, BinaryIO

import numpy as np

from pipeline.arrays import TypedArray
from pipeline.dtypes import parse_dtype
from pipeline.errors import FileFormatError, InputError

# The format's names of element types, as `parse_dtype` knows them or as people do.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"}
_DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_DTYPES |= {
    f"{short}{bits}": f"{kind}{bits}" for short, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


def read_weights(path: str | os.PathLike[str]) -> tuple[TypedArray, TypedArray | None]:
    """The tensors `weight` and, if there, `bias`, alone or behind one prefix: read-only maps of the file.

    Raises:
        FileFormatError: not a safetensors file, or no such tensors, or several candidates.
        DTypeError: an element type that layers don't have.
        FileNotFoundError, PermissionError, InputError: nothing to read there.
    """
    from safetensors import SafetensorError, safe_open

    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path is a {type(path).__name__}, expected the path of a .safetensors file")
    if os.path.isdir(path):
        raise FileFormatError(f"{path} is a directory, expected a .safetensors file")
    with open(path, "rb") as file:  # safetensors says "no such file" of one that may not be read, too
        try:
            with safe_open(path, framework="numpy") as checked:
                names = list(checked.keys())
        except SafetensorError as error:
            raise FileFormatError(
                f"{path} isn't a readable .safetensors file: {error}; write it with safetensors' save_file"
            ) from error
        found = [name for name in names if name == "weight" or name.endswith(".weight")]
        if len(found) != 1:
            raise FileFormatError(
                f"{path} holds the tensors {', '.join(sorted(names)[:8]) or '(none)'}, expected exactly one called "
                f"'weight' or '<prefix>.weight' (found {len(found)}); save the layer alone in a file"
            )
        # Its first 8 bytes are the length of what follows: JSON with the place of each tensor in the rest.
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        bias_name = found[0].removesuffix("weight") + "bias"
        weight = _mapped(file, 8 + header_bytes, header[found[0]], "weight")
        return weight, _mapped(file, 8 + header_bytes, header[bias_name], "bias") if bias_name in names else None


def _mapped(file: BinaryIO, data: int, about: dict[str, Any], what: str) -> TypedArray:
    """One tensor of the file, whose data begin at `data`; `about` is what the header says of the tensor."""
    dtype = parse_dtype(_DTYPES.get(about["dtype"], about["dtype"]), f"{what} dtype")
    shape, first = tuple(about["shape"]), data + about["data_offsets"][0]
    if prod(shape) == 0:  # which can't be mapped
        return TypedArray(np.empty(shape, dtype.carrier), dtype)
    if first % dtype.itemsize:  # no array of this type can lie there
        n_bytes = prod(shape) * dtype.itemsize
        copied = np.array(np.memmap(file, np.uint8, "r", first, (n_bytes,)))
        return TypedArray(copied.view(dtype.carrier).reshape(shape), dtype)
    return TypedArray(np.memmap(file, dtype.carrier, "r", first, shape), dtype)
