"""Published files of the mirror nets load strictly, at their own resolution and at others."""

import re

import pytest
import torch
from torch import Tensor, nn

from octic import OcticVisionTransformer
from octic.mirror_models import EQUIVARIANT, HYBRID, INVARIANT
from vit.finetune import adapt_state, load_adapted
from vit.keys import rename_published
from vit.mirror_keys import PERMUTATION, mirrored_order
from vit.weights import load_state, load_weights

SMALL = {
    **{"img_size": (16, 32), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "num_classes": 5,
}
PRESETS = {"d2": EQUIVARIANT, "hybrid": HYBRID, "d2_inv_early": INVARIANT}
preset = pytest.mark.parametrize("name", PRESETS)
# Ours -> published, by hand and the other way round than `vit.keys`.
SPELLINGS = (
    (r"^patch_embed\.lift8\.conv_A1", "patch_embed.proj_sym"),
    (r"^patch_embed\.lift8\.conv_A2", "patch_embed.proj_asym"),
    (r"\.lin_A1\.", ".linear_sym."),
    (r"\.lin_A2\.", ".linear_asym."),
    (r"alpha_A1$", "alpha_sym"),
    (r"alpha_A2$", "alpha_asym"),
    (r"\.ls([12])(\.gamma)?", r".gamma_\1"),
    (r"^cls_token$", "cls_token.0"),
)


def make(name: str, **options: object) -> nn.Module:
    net = OcticVisionTransformer(**{**PRESETS[name], **SMALL, **options})
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def published(net: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The weights in the published layout: mirrored order of tokens, frozen zeros, indices."""
    state = {}
    for name, tensor in net.state_dict().items():
        for pattern, spelling in SPELLINGS:
            name = re.sub(pattern, spelling, name)
        if name.startswith("pos_embed"):
            tensor = tensor.flatten(0, 1)[None]  # rows of the left half
        state[prefix + name] = tensor.clone()
    state[f"{prefix}cls_token.1"] = torch.zeros_like(net.cls_token)
    state[prefix + PERMUTATION] = mirrored_order(*net.grid_size)
    return state


@preset
@pytest.mark.parametrize("prefix", ("", "_orig_mod.", "module."))
def test_published_files_load_strictly(name: str, prefix: str, tmp_path) -> None:
    """With and without a wrapper's prefix; the outputs are those of the net they came from."""
    theirs, ours, x = make(name), make(name), torch.randn(2, 3, 16, 32)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": published(theirs, prefix), "epoch": 3}, path)
    load_weights(ours, path)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_symmetrized_classifier_is_known_by_its_width() -> None:
    """A file trained with --symmetrized-asym-feats makes the net read [x+, |x-|]."""
    theirs, ours = make("d2", invariant="power_spectrum"), make("d2")
    load_state(ours, published(theirs))
    assert ours.invariant == "power_spectrum"
    x = torch.randn(2, 3, 16, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.0.attn.qkv.linear_asym.weight"), "missing: blocks.0.attn.qkv"),
        (
            lambda s: s.update({"blocks.7.norm1.scaling.beta": s["head.bias"]}),
            "left over: blocks.7",
        ),
        (lambda s: s["cls_token.1"].fill_(0.1), r"left over: cls_token\.1"),
        (lambda s: s[PERMUTATION][3:5].add_(1), "moving average damages it"),
        (lambda s: s.update({"head.weight": s["head.weight"][:3]}), "of another shape"),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message: str) -> None:
    """Each with what is missing, left over, damaged or of another shape."""
    state = published(make("d2"))
    change(state)
    with pytest.raises(ValueError, match=message):
        load_state(make("d2"), state)


def test_a_file_without_its_order_is_taken_for_the_models_grid() -> None:
    """Exports that dropped the indices load too."""
    theirs, ours, x = make("d2"), make("d2"), torch.randn(2, 3, 16, 32)
    state = published(theirs)
    del state[PERMUTATION]
    load_state(ours, state)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_a_file_without_its_order_and_of_another_number_of_patches_is_of_a_square() -> None:
    """The model's grid is then not the file's; what is no square is refused."""
    for size, grid in ((16, (4, 4)), ((16, 32), (4, 8))):
        state = published(make("d2", img_size=size))
        own = make("d2").state_dict()
        expected, _ = rename_published(state, own, grid=(6, 6))
        assert expected["pos_embed.0"].shape[:2] == (grid[0], grid[1] // 2)
        del state[PERMUTATION]
        if grid == (4, 4):
            found, _ = rename_published(state, own, grid=(6, 6))
            assert torch.equal(found["pos_embed.1"], expected["pos_embed.1"])
        else:
            with pytest.raises(ValueError, match="for 32 patches, which are no square grid"):
                rename_published(state, own, grid=(6, 6))


@preset
@pytest.mark.parametrize("size", ((32, 48), (24, 32), (16, 32)))
def test_fine_tuning_at_another_resolution(name: str, size: tuple[int, int], tmp_path) -> None:
    """A file becomes a net of another grid, which computes what the old one does there."""
    theirs, ours = make(name), make(name, img_size=size, num_classes=7)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": published(theirs)}, path)
    notes = load_adapted(ours, path)
    assert [note.split(":")[0] for note in notes] == ["head", *["pos_embed"] * (size != (16, 32))]
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(
        ours.forward_features(x), theirs.forward_features(x), rtol=1e-4, atol=1e-5
    )
    if name != "hybrid":
        torch.testing.assert_close(ours(x.flip(-1)), ours(x), rtol=1e-4, atol=1e-5)


def test_own_weights_of_another_resolution() -> None:
    """The same from a file that this framework wrote."""
    theirs, ours = make("d2"), make("d2", img_size=32)
    state, _ = adapt_state(theirs.state_dict(), ours)
    ours.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
