"""Published GE-ViT checkpoints, loaded strictly.

Their names are ours except for these, each handled by name:

    module.                                          left by data parallelism
    transformer.<last>.weight                        the classifier: head.weight
    project.*, layernorm.*, gevit.*                  the patch stem, and the network behind it
    group.{_elements,_identity,_relative_positions}  constants, repeated in every layer
    row_indices, col_indices, g_indices              tables, which follow from the settings

The tables are compared before they are dropped: the weights would also fit a model of another
window or another group table, and silently give other figures.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from baselines.gevit.attention import GroupSelfAttention, LiftingSelfAttention
from vit.keys import check_fit, renamed
from vit.weights import naming_file, read_state

_CONSTANT = re.compile(r"(^|\.)group\.(_elements|_identity|_relative_positions)$")
_TABLE = re.compile(r"^(?:(.*)\.)?(row_indices|col_indices|g_indices)$")
_PATCH_STEM = ("project.", "layernorm.")


def load_published(model: nn.Module, path: str | Path) -> None:
    """Load a published file, or one of our own, into `model`; every key must be accounted for.

    Raises ValueError naming the file and what is missing, left over or of another shape, or which
    setting of the model the file contradicts.
    """
    state = read_state(path)
    with naming_file(path):
        model.load_state_dict(published_state(state, model), strict=True)


def published_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint as the state dict of `model`: a network, a block or a layer."""
    return check_fit(renamed_state(state, model), model.state_dict(), type(model).__name__)


def renamed_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under our names, without constants and tables; the latter are compared.

    ValueError where a table contradicts the settings of `model`.
    """
    tables = {name: tensor for name, tensor in state.items() if _TABLE.match(name)}
    _check_tables(tables, model)
    weights = {
        name: tensor
        for name, tensor in state.items()
        if name not in tables and not _CONSTANT.search(name)
    }
    return renamed(weights, lambda name: _our_name(name, model))


def _our_name(name: str, model: nn.Module) -> str:
    name = name.removeprefix("module.")
    if name.startswith(_PATCH_STEM):
        return f"stem.{name}"
    name = name.removeprefix("gevit.")
    layers = getattr(model, "transformer", None)
    last = f"transformer.{len(layers)}." if isinstance(layers, nn.ModuleList) else "."
    return f"head.{name.removeprefix(last)}" if name.startswith(last) else name


def _check_tables(tables: Mapping[str, Tensor], model: nn.Module) -> None:
    """ValueError for a file whose tables are not those of the model's settings."""
    for published, table in tables.items():
        name = _our_name(published, model)
        owner, _, kind = name.rpartition(".")
        layer = dict(_attentions(model)).get(owner or "")
        if layer is None:
            raise ValueError(f"{name} in the file belongs to no attention layer of the model")
        if kind == "g_indices":
            _check_relations(name, table, layer)
        elif tuple(table.shape) != layer.neighbours.table_shape(layer.group.order):
            raise ValueError(
                f"{name} in the file has the shape {tuple(table.shape)} for a model with group "
                f"{layer.group.name} and {layer.neighbours.extra_repr()}; set group, window and "
                "img_size as the file had them"
            )


def _check_relations(name: str, table: Tensor, layer: nn.Module) -> None:
    ours = getattr(layer, "relations", None)
    if ours is None or table.shape != ours.shape:
        raise ValueError(f"{name} in the file is that of another group than the model's")
    if ours.device.type != "meta" and not torch.equal(table.to(ours), ours):
        published = layer.group.relations("reference")
        stored = torch.equal(table.cpu(), torch.as_tensor(published))
        wanted = "reference" if stored else "exact"
        raise ValueError(
            f"the file was trained with another group table ({name}); build the model with "
            f"group_table={wanted}"
        )


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, LiftingSelfAttention | GroupSelfAttention):
            yield name, module
