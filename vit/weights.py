"""Reading weights from files, strictly, and without ever executing what they contain."""

import argparse
import contextlib
import importlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vit.keys import from_published

# Where published checkpoints keep the weights to use, in the order they are looked for.
CONTAINERS = ("teacher", "model", "state_dict")
# Where run folders have their network, and folders in the hub's format.
IN_FOLDERS = ("exported/model.safetensors", "model.safetensors")


def load_weights(model: nn.Module, path: str | Path, *, container: str | None = None) -> None:
    """Load a published or exported file into `model`; every key must be accounted for.

    A model with the method `adapt_to(state)` may first change itself to what the file needs (an
    invariant octic model takes the file's invariantization). Raises ValueError naming the file
    and the keys that are missing, left over, or of another shape.
    """
    state = read_state(path, container=container)
    with naming_file(path):
        load_state(model, state)


@contextlib.contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Put the file's name into a ValueError, and for our exports the network it was saved from."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        named = message if str(path) in message else f"{path}: {message}"
        raise ValueError(named + _network_of(path)) from None


def _network_of(path: str | Path) -> str:
    constructor = constructor_of(path)
    if not constructor:
        return ""
    sizes = [f"{key}={value}" for key, value in constructor.items() if not key.startswith("_")]
    name = constructor["_target_"].rpartition(".")[2]
    return f"; the file is of {name} with {', '.join(sizes) or 'its own sizes'}"


def constructor_of(path: str | Path) -> dict[str, Any]:
    """What a file exported by a run says its network was built from; empty for other files."""
    return json.loads(read_metadata(path).get("constructor", "null")) or {}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights in any published spelling into `model`, strictly.

    A model that wraps another one gives names of its own by `rename_state(state)`.
    """
    model.load_state_dict(state_for(model, state), strict=True)


def state_for(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in any spelling that `model` knows as its state dict, to which it adapts itself.

    Raises ValueError as `vit.keys.check_fit` does.
    """
    if hasattr(model, "rename_state"):
        state = model.rename_state(state)
    with adapted_to(state, model):
        return from_published(state, model)


@contextlib.contextmanager
def adapted_to(state: Mapping[str, Tensor], model: nn.Module) -> Iterator[None]:
    """Let a model with `adapt_to` change itself to fit the weights; undo that on an error."""
    if not hasattr(model, "adapt_to"):
        yield
        return
    attributes, parts = dict(vars(model)), dict(model._modules)
    try:
        model.adapt_to(state)
        yield
    except Exception:
        vars(model).update(attributes)
        model._modules.clear()
        model._modules.update(parts)
        raise


def load_net(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state` for a backbone that may be an adapter.

    Files of our own runs hold the adapter with the net that it wraps (`net.`), others the net.
    """
    whole = any(name.startswith("net.") for name in state)
    load_state(net if whole else getattr(net, "net", net), state)


def read_state(path: str | Path, *, container: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a .safetensors or torch file.

    container: top-level key that holds the weights; by default the first of `CONTAINERS` that
    the file has, or the file itself. Raises ValueError where the file is missing or unreadable.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = [str(file) for name in IN_FOLDERS if (file := path / name).is_file()]
        raise ValueError(f"{path}: is a folder{f'; give {inside[0]}' if inside else ''}")
    if not path.is_file():
        raise ValueError(f"{path}: no such weights file")
    safe = path.suffix == ".safetensors"
    content: dict[str, Any] = _read_safetensors(path) if safe else read_pickle(path)
    if container is not None and container not in content:
        raise ValueError(f"{path}: no key {container!r}; it has {', '.join(map(str, content))}")
    for key in CONTAINERS if container is None else (container,):
        if isinstance(content.get(key), Mapping):
            content = dict(content[key])
            break
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            f"{path}: holds no weights (top-level keys: {', '.join(map(str, content))})"
        )
    return state


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for other files."""
    path = Path(path).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None


def read_pickle(path: str | Path) -> dict[str, Any]:
    """Read a torch file with the restricted unpickler: tensors and plain data, nothing callable.

    argparse namespaces and numpy scalars, which published files contain, are plain data here.
    """
    try:
        with _plain_data():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        # torch's own advice, to load it without the restriction, is not for an unknown file.
        said = re.search(r"(Unsupported operand|GLOBAL|Unsupported class) \S+", str(error))
        reason = said[0] if said else str(error).strip().splitlines()[0]
        if reason.startswith("Unsupported operand"):
            raise ValueError(f"{path}: truncated or not a torch file ({reason})") from None
        raise ValueError(
            f"{path}: refused, holds more than tensors and plain data ({reason})"
        ) from None
    except Exception as error:  # bytes that are no pickle fail in the unpickler in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # torch adds advice about a corrupted file; a bare number is what the unpickler stumbled on.
        clause = reason.split(". ")[0].rstrip(".")
        told = "" if clause.isdigit() else f" ({clause})"
        raise ValueError(f"{path}: truncated or not a torch file{told}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not named weights")
    return dict(content)


@contextlib.contextmanager
def _plain_data() -> Iterator[None]:
    numbers = (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)
    scalar = importlib.import_module("numpy._core.multiarray").scalar
    allowed: list[Any] = [
        argparse.Namespace,
        np.dtype,
        # Old files name numpy's scalar constructor by its former path.
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        *(type(np.dtype(number)) for number in numbers),
    ]
    with torch.serialization.safe_globals(allowed):
        yield


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None


def _is_zip(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
