"""A layer's weights in a .safetensors file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.errors import FileFormatError, InputError

if TYPE_CHECKING:
    import torch


def read_weights(path: str | os.PathLike[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tensors `weight` and, if there, `bias`, alone or behind one prefix.

    Raises:
        FileFormatError: not a safetensors file, or no such tensors, or several candidates.
        FileNotFoundError, PermissionError, InputError: nothing to read there.
    """
    from safetensors import SafetensorError, safe_open

    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path is a {type(path).__name__}, expected the path of a .safetensors file")
    if os.path.isdir(path):
        raise FileFormatError(f"{path} is a directory, expected a .safetensors file")
    with open(path, "rb"):  # safetensors says "no such file" of one that may not be read, too
        pass
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = [name for name in names if name == "weight" or name.endswith(".weight")]
            if len(found) != 1:
                raise FileFormatError(
                    f"{path} holds the tensors {', '.join(sorted(names)[:8]) or '(none)'}, expected exactly one called "
                    f"'weight' or '<prefix>.weight' (found {len(found)}); save the layer alone in a file"
                )
            bias_name = found[0].removesuffix("weight") + "bias"
            return file.get_tensor(found[0]), file.get_tensor(bias_name) if bias_name in names else None
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} isn't a readable .safetensors file: {error}; write it with safetensors' save_file"
        ) from error
