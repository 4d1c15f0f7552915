"""Published checkpoints load strictly, whatever their tables say is held against the settings."""

import pytest
import timm
import torch
from torch import Tensor

from baselines.gevit import GEViT, load_published
from baselines.gevit.positions import local_offsets, turned
from vit.weights import load_state

SETTINGS = {"img_size": 12, "num_channels": 8, "num_heads": 2, "block_sizes": (1, 1), "window": 3}


def published(net: GEViT, *, table: str = "reference") -> dict[str, Tensor]:
    """The state of a network as the authors' code saves it: prefixes, constants and tables."""
    state = {}
    for name, tensor in net.state_dict().items():
        last = f"transformer.{len(net.transformer)}"
        state[f"module.{name.replace('head', last, 1)}"] = tensor
    order = net.plane_group.order
    owners = ["lifting_self_attention"]
    owners += [
        f"transformer.{i}.attention.2" for i, b in enumerate(net.transformer) if hasattr(b, "mlp")
    ]
    rows, cols = turned(local_offsets(net.window), net.plane_group)
    for owner in ("", *owners):
        prefix = f"module.{owner}." if owner else "module."
        state[f"{prefix}group._elements"] = torch.as_tensor(net.plane_group.elements())
        state[f"{prefix}group._identity"] = torch.zeros(1)
        state[f"{prefix}group._relative_positions"] = torch.zeros(order, order, dtype=torch.int64)
        if owner:
            shape = (order, net.window, net.window)
            state[f"{prefix}row_indices"] = torch.as_tensor(rows).reshape(shape).float()
            state[f"{prefix}col_indices"] = torch.as_tensor(cols).reshape(shape).float()
        if owner.startswith("transformer"):
            state[f"{prefix}g_indices"] = torch.as_tensor(net.plane_group.relations(table))
    return state


@pytest.mark.parametrize("name", ["p4", "p4m"])
def test_published_files_load_strictly(name, tmp_path):
    net = GEViT(group=name, group_table="reference", **SETTINGS).eval()
    torch.save({"state_dict": published(net)}, tmp_path / "model.pt")
    other = GEViT(group=name, group_table="reference", **SETTINGS).eval()
    load_published(other, tmp_path / "model.pt")
    x = torch.randn(1, 1, 12, 12)
    torch.testing.assert_close(other(x), net(x))


def test_what_does_not_fit_is_named(tmp_path):
    net = GEViT(group="p4", **SETTINGS)
    state = published(net)
    cases = {
        "missing: head.weight": {
            k: v for k, v in state.items() if k != "module.transformer.3.weight"
        },
        "left over: transformer.9.weight": {**state, "module.transformer.9.weight": torch.ones(1)},
        "left over: extra": {**state, "extra": torch.ones(1)},
        "of another shape: head.weight": {
            k: v[:2] if k == "module.transformer.3.weight" else v for k, v in state.items()
        },
        "row_indices in the file belongs to no attention layer": {
            **state,
            "module.transformer.1.row_indices": torch.ones(4, 3, 3),
        },
    }
    for said, content in cases.items():
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=said) as error:
            load_published(net, tmp_path / "model.pt")
        assert "\n" not in str(error.value) and "model.pt" in str(error.value)
    with pytest.raises(ValueError, match="no such weights file"):
        load_published(net, tmp_path / "nowhere.pt")


def test_tables_tell_settings_that_weights_do_not(tmp_path):
    """Window, group table and group leave no trace in the parameters' shapes."""
    path = tmp_path / "model.pt"
    torch.save(published(GEViT(group="p4m", group_table="reference", **SETTINGS)), path)
    with pytest.raises(ValueError, match="build the model with group_table=reference"):
        load_published(GEViT(group="p4m", **SETTINGS), path)
    with pytest.raises(ValueError, match=r"shape \(8, 3, 3\).*group p4m and window 5"):
        settings = {**SETTINGS, "window": 5}
        load_published(GEViT(group="p4m", group_table="reference", **settings), path)
    torch.save(published(GEViT(group="p4m", **SETTINGS), table="exact"), path)
    with pytest.raises(ValueError, match="another group table|that of another group"):
        load_published(GEViT(group="p8", **SETTINGS), path)


def test_our_own_files_hold_parameters_alone(tmp_path):
    """No table is stored, and timm loads what it saved."""
    net = timm.create_model("gevit_digits_p4m", num_channels=8).eval()
    names = {name for name, _ in net.named_parameters()}
    assert set(net.state_dict()) == names
    torch.save(net.state_dict(), tmp_path / "own.pt")
    other = timm.create_model(
        "gevit_digits_p4m", num_channels=8, checkpoint_path=str(tmp_path / "own.pt")
    ).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(x), net(x))
    load_published(other, tmp_path / "own.pt")


def test_a_weight_in_two_spellings_is_left_over():
    net = GEViT(group="p4", **SETTINGS)
    twice = {"transformer.3.weight": torch.zeros_like(net.head.weight)}
    for state in (net.state_dict() | twice, twice | net.state_dict()):
        with pytest.raises(ValueError, match=r"left over: transformer\.3\.weight"):
            load_state(net, state)
