"""The index of a checkpoint: its plain values, and which file holds which piece of which tensor.

    {"content": {part: values, {"$tensor": name} in a tensor's place},
     "tensors": {name: {"dtype", "shape", "pieces": [[file, key, offsets, sizes], ...]}}}

It is JSON, so reading it executes nothing.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

INDEX = "index.json"


class Stored(NamedTuple):
    """A tensor of a checkpoint that has not been read."""

    name: str
    dtype: torch.dtype
    shape: torch.Size


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors taken out into `tensors` under names that begin with `name`.

    Dicts (with any plain keys), lists, tuples, numbers, text, True, False, None and tensors.
    """
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return {"$empty": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
        if name in tensors:  # {"a/b": x, "a": {"b": y}}
            raise ValueError(f"two tensors of a checkpoint are called {name}")
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, f"{name}/{key}", tensors) for key, item in value.items()}
        items = [[key, pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        return {"$items": items}
    if isinstance(value, list | tuple):
        packed = [pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": packed} if isinstance(value, tuple) else packed
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a checkpoint cannot hold a {type(value).__name__}")


def unpack(value: Any, tensors: Mapping[str, Any]) -> Any:
    """What `pack` was given, with a `Stored` in each tensor's place; raises ValueError."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        entry = tensors[value["$tensor"]]
        return Stored(value["$tensor"], _dtype(entry["dtype"]), torch.Size(entry["shape"]))
    if "$empty" in value:
        dtype, shape = value["$empty"]
        if math.prod(shape):
            raise ValueError(f"an empty tensor of shape {shape}")
        return torch.empty(shape, dtype=_dtype(dtype))
    if "$items" in value:
        return {key: unpack(item, tensors) for key, item in value["$items"]}
    if "$tuple" in value:
        return tuple(unpack(item, tensors) for item in value["$tuple"])
    return {key: unpack(item, tensors) for key, item in value.items()}


def stored_in(tree: Any) -> Iterator[Stored]:
    """Every tensor that a tree of `unpack` has not read."""
    if isinstance(tree, Stored):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from stored_in(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from stored_in(item)


def filled(tree: Any, targets: Mapping[str, Tensor]) -> Any:
    """The tree with each `Stored` replaced by its tensor."""
    if isinstance(tree, Stored):
        return targets[tree.name]
    if isinstance(tree, Mapping):
        return {key: filled(item, targets) for key, item in tree.items()}
    if isinstance(tree, tuple):
        return tuple(filled(item, targets) for item in tree)
    return [filled(item, targets) for item in tree] if isinstance(tree, list) else tree


def index_fault(index: Any, files: Mapping[str, Any]) -> str:
    """Nothing if an index is of the form this module writes, and its pieces make up the tensors.

    The hashes tell damage; this tells an index made by hand from one that may be followed.
    """
    try:
        for name, entry in index["tensors"].items():
            dtype, shape = _dtype(entry["dtype"]), entry["shape"]
            held = 0
            for file, _key, offsets, sizes in entry["pieces"]:
                if file not in files or len(offsets) != len(shape) or len(sizes) != len(shape):
                    return f"{name} has a piece in {file!r} that cannot be"
                held += math.prod(sizes)
            if held != math.prod(shape) or held * dtype.itemsize > sum(
                file["bytes"] for file in files.values()
            ):
                return f"the pieces of {name} do not make up its shape {shape}"
        unpack(index["content"], index["tensors"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return f"it is not of the form that is written ({type(error).__name__})"
    return ""


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype {name!r}")
    return found
