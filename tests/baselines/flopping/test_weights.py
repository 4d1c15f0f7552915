"""Files in the published layout load to the last key and give the old outputs; so do ours."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from baselines.flopping.plain import PlainConvNeXt, PlainResMlp
from tests.baselines.flopping.cases import (
    CONVNEXT,
    ISOTROPIC,
    RESMLP,
    convnext,
    images,
    isotropic,
    relative,
    resmlp,
    shaken,
)
from vit.finetune import load_adapted
from vit.weights import load_state, load_weights

NETS: dict[str, Callable[..., nn.Module]] = {
    "resmlp": resmlp,
    "convnext": convnext,
    "isotropic": isotropic,
    "plain_resmlp": lambda **options: shaken(PlainResMlp(**{**RESMLP, **options})),
    "plain_convnext": lambda **options: shaken(PlainConvNeXt(**{**CONVNEXT, **options})),
    "plain_isotropic": lambda **options: shaken(PlainConvNeXt(**{**ISOTROPIC, **options})),
    "convnext_mean": lambda **options: convnext(**{**options, "downsampling": "mean"}),
    "plain_convnext_mean": lambda **options: shaken(
        PlainConvNeXt(**{**CONVNEXT, **options, "downsampling": "mean"})
    ),
}
MIRROR_WORDS = [
    (r"lin_A1", "linear_sym"),
    (r"lin_A2", "linear_asym"),
    (r"alpha_A1", "alpha_sym"),
    (r"alpha_A2", "alpha_asym"),
    (r"shift_A1", "beta_sym"),
    (r"shift_A2", "beta_asym"),
    (r"conv_A1", "proj_sym"),
    (r"conv_A2", "proj_asym"),
    (r"\.ls(\d)\.", r".gamma_\1."),
]
HIERARCHY = [
    (r"^stem\.", "downsample_layers.0.0."),
    (r"^entries\.0\.", "downsample_layers.0.1."),
    (r"^entries\.", "downsample_layers."),
]
PLAIN_BLOCK = [(r"\.conv_dw\.", ".dwconv."), (r"\.mlp\.fc(\d)\.", r".pwconv\1.")]
SPELLINGS = {
    "resmlp": [*MIRROR_WORDS, (r"linear_", "lin_"), (r"^stem\.", "patch_embed.")],
    "convnext": [*MIRROR_WORDS, *HIERARCHY],
    "isotropic": [*MIRROR_WORDS, (r"^stages\.0\.", "blocks.")],
    "plain_resmlp": [
        (r"^stem\.", "patch_embed."),
        (r"linear_tokens", "attn"),
        (r"mlp_channels", "mlp"),
        (r"\.ls(\d)$", r".gamma_\1"),
    ],
    "plain_convnext": [*PLAIN_BLOCK, *HIERARCHY],
    "plain_isotropic": [*PLAIN_BLOCK, (r"^stages\.0\.", "blocks.")],
    "convnext_mean": [*MIRROR_WORDS, *HIERARCHY, (r"(\d\.1\.)linear\.", r"\1linear2.")],
    "plain_convnext_mean": [*PLAIN_BLOCK, *HIERARCHY],
}


def published(name: str, net: nn.Module) -> dict[str, Tensor]:
    """The net's weights as the published code stores them."""
    found = {}
    for ours, tensor in net.state_dict().items():
        theirs = ours
        for pattern, word in SPELLINGS[name]:
            theirs = re.sub(pattern, word, theirs)
        if theirs.endswith((".alpha", ".beta")) and tensor.ndim == 3:
            tensor = tensor.flatten()
        pointwise = "pwconv" in theirs or theirs.endswith(".1.linear.weight")
        if pointwise and tensor.ndim == 2:
            tensor = tensor[..., None, None]
        if name.startswith("plain") and theirs.endswith(".gamma"):
            tensor = tensor[None, :, None, None]
        found[theirs] = tensor
        if theirs.endswith(("sym_to_asym.weight", "asym_to_sym.weight")) and "dwconv" in theirs:
            zeros = torch.zeros_like(tensor[..., :1])
            found[theirs.replace(".weight", ".zero_center")] = zeros
    if name == "resmlp":
        for word in ("left_idx", "right_idx"):
            # As a moving average damages them: they are not read.
            found[f"patch_embed.flatten_and_permute_to_fourier.{word}"] = torch.zeros(32).long()
    return found


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("prefix", ("", "_orig_mod."))
def test_published_files_load(name: str, prefix: str, tmp_path: Path) -> None:
    """Under published names, compiled or not; betas of ResMLP, never added there, count nothing."""
    options = {"affine_bias": False} if name == "resmlp" else {}
    net = NETS[name](**options)
    state = {prefix + key: tensor for key, tensor in published(name, net).items()}
    if name == "resmlp":
        for key in [key for key in state if re.search(r"norm[12]\.alpha_", key)]:
            state[key.replace("alpha", "beta")] = torch.randn_like(state[key])
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    for loaded in (NETS[name](), NETS[name](**options)):
        load_weights(loaded, tmp_path / "checkpoint.pth")
        x = images(net)
        assert relative(loaded(x), net(x)) <= 1e-14


@pytest.mark.parametrize("name", NETS)
def test_our_own_files_load(name: str) -> None:
    """With shifts that are not zero, as they are."""
    net, other = NETS[name](), NETS[name]()
    load_state(other, net.state_dict())
    x = images(net)
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("name", NETS)
def test_every_key_is_accounted_for(name: str) -> None:
    """A missing key, one too many, and one of another shape are named."""
    net = NETS[name]()
    state = published(name, net)
    first = next(key for key in state if key.endswith("weight"))
    with pytest.raises(ValueError, match="missing: .*weight"):
        load_state(net, {key: tensor for key, tensor in state.items() if key != first})
    with pytest.raises(ValueError, match="left over: .*nonsense"):
        load_state(net, {**state, "nonsense": torch.zeros(1)})
    with pytest.raises(ValueError, match="of another shape: .*weight"):
        load_state(net, {**state, first: torch.zeros(7)})


@pytest.mark.parametrize("name", NETS)
def test_a_weight_in_two_spellings_is_left_over(name: str) -> None:
    """Whichever comes first in the file."""
    net = NETS[name]()
    theirs, ours = published(name, net), net.state_dict()
    for key in ours:
        if key in theirs:
            theirs[f"module.{key}"] = theirs.pop(key)
    for state in ({**theirs, **ours}, {**ours, **theirs}):
        with pytest.raises(ValueError, match="left over: ") as error:
            load_state(net, state)
        assert "missing" not in str(error.value)
    twice = next(key for key in theirs if key.endswith("weight"))
    with pytest.raises(ValueError, match="left over: "):
        load_state(net, {**ours, twice: theirs[twice]})


def test_centre_columns_that_are_not_zero_are_refused() -> None:
    """Such a file is of a net that ours cannot express."""
    net = isotropic()
    state = published("isotropic", net)
    center = next(key for key in state if key.endswith("zero_center"))
    with pytest.raises(ValueError, match="left over: .*zero_center"):
        load_state(net, {**state, center: torch.ones_like(state[center])})


@pytest.mark.parametrize("name", NETS)
def test_fine_tuning_starts_a_fresh_head(name: str, tmp_path: Path) -> None:
    """Of a published file all but the head is taken, where the classes are others."""
    net = NETS[name]()
    torch.save(published(name, net), tmp_path / "weights.pth")
    other = NETS[name](num_classes=3)
    notes = load_adapted(other, tmp_path / "weights.pth")
    assert len(notes) == 1 and "5 classes in the file, 3 here" in notes[0]
    x = images(net)
    if name == "resmlp":  # its shifts are loaded as zeros
        load_state(net, published(name, net))
    assert relative(other.features(x)[0].cls, net.features(x)[0].cls) <= 1e-14


def test_a_timm_convnext_file_loads() -> None:
    """timm's names of the same function are known too."""
    import timm

    theirs = timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=5)
    load_state(NETS["plain_convnext"](), theirs.state_dict())
