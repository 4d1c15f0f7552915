"""DHVT: published sizes, any grid, strict weights, decay and batch norms as they are asked for."""

import pytest
import timm
import torch
from torch import nn

from baselines.dhvt import DHVT
from baselines.dhvt.layers import HeadInteractedAttention
from deit.param_groups import undecayed
from utils.flops import multiply_adds
from vit.finetune import load_adapted
from vit.vision_transformer import VisionTransformer
from vit.weights import load_state, load_weights

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TABLE = [  # name, parameters, keys, gmac without norms (torchprofile, which counts affine norms)
    ("dhvt_tiny_cifar_patch4", 6_008_650, 477, 0.3897),
    ("dhvt_small_cifar_patch4", 23_425_450, 477, 1.5328),
    ("dhvt_tiny_cifar_patch2", 5_845_162, 471, 1.7149),
    ("dhvt_small_cifar_patch2", 22_766_698, 471, 6.2146),
    ("dhvt_tiny_domain_patch16", 6_105_975, 489, 1.3658),
    ("dhvt_small_domain_patch16", 23_788_431, 489, 5.0472),
    ("dhvt_tiny_imagenet_patch16", 6_267_334, 489, 1.3618),
    ("dhvt_small_imagenet_patch16", 24_040_606, 489, 5.0475),
]


def net(**options) -> DHVT:
    torch.manual_seed(0)
    return DHVT(**{**SMALL, "num_classes": 5, **options}).eval()


def images(batch: int = 2, channels: int = 3, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "count", "keys", "gmac"), TABLE)
def test_published_table(name, count, keys, gmac):
    """Parameters and names exactly; multiply-adds to half a percent, as norms count nothing."""
    with torch.device("meta"):
        model = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == count
        assert len(model.state_dict()) == keys
        assert model.num_classes == model.default_cfg["num_classes"]
        ours = multiply_adds(model, model.img_size[0]) / 1e9
    assert gmac * 0.994 < ours <= gmac


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (8, 32), (16, 24)])
def test_any_grid(size):
    """Also oblong ones, of as many patches as a square: 2 x 8 is not 4 x 4."""
    model = net()
    x = images(size=size)
    assert model(x).shape == (2, 5)
    maps = model.features(x)[0].patches
    assert maps.shape == (2, size[0] // 4, size[1] // 4, 16)
    if size == (8, 32):
        turned = images(size=size).reshape(2, 3, 16, 16)
        assert not torch.allclose(model(x), model(turned))
    with pytest.raises(ValueError, match="not a multiple"):
        model(images(size=(17, 16)))


def test_places_are_told_apart_without_positions():
    """The padding of the convolutions tells where a patch is: it is not a bag of patches."""
    model, x = net(), images()
    moved = x.roll(8, dims=3)
    there = model.features(moved)[0].patches.roll(-2, dims=2)
    assert not torch.allclose(there, model.features(x)[0].patches, atol=1e-4)


def test_patches_keep_to_themselves_but_for_what_head_tokens_carry():
    """Head tokens are averaged over all tokens, so every patch reaches every other through them."""
    layer = HeadInteractedAttention(16, num_heads=2)
    nn.init.trunc_normal_(layer.pos_embed)
    x = torch.randn(1, 10, 16)
    assert layer.head_tokens(x).shape == (1, 2, 16)
    torch.testing.assert_close(layer.head_tokens(x), layer.head_tokens(x[:, torch.randperm(10)]))


def test_plain_twin():
    """apply_dhvt=False, broken in the published code, is the DeiT of the same size."""
    options = {**SMALL, "num_classes": 5}
    plain = timm.create_model("dhvt_tiny_cifar_patch4", apply_dhvt=False, **options).eval()
    assert isinstance(plain, VisionTransformer) and plain.pos_embed.shape == (1, 17, 16)
    theirs = timm.create_model("deit_tiny_patch16_224", **options).eval()
    load_state(plain, theirs.state_dict())
    torch.testing.assert_close(plain(images()), theirs(images()))
    off = {"apply_dhvt": False, "distilled": False, "sync_batch_norm": False, **options}
    assert isinstance(timm.create_model("dhvt_tiny_cifar_patch4", **off), VisionTransformer)
    with pytest.raises(ValueError, match="decay: the plain ViT"):
        timm.create_model("dhvt_tiny_cifar_patch4", apply_dhvt=False, decay="published")
    with pytest.raises(ValueError, match="apply_dhvt must be true or false, not 'no'"):
        timm.create_model("dhvt_tiny_cifar_patch4", apply_dhvt="no", **options)


def test_timm_takes_features_alone():
    net = timm.create_model(
        "dhvt_tiny_cifar_patch4", features_only=True, out_indices=(0, 1), **SMALL
    )
    assert [maps.shape[1] for maps in net(images())] == [16] * SMALL["depth"]


def test_published_keys_load_strictly(tmp_path):
    """To the last key; another head is replaced when asked for, nothing else is."""
    source, path = net(), tmp_path / "checkpoint.pth"
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, path)
    ours = net(num_classes=5)
    load_weights(ours, path)
    torch.testing.assert_close(ours(images()), source(images()))
    other = net(num_classes=7)
    with pytest.raises(ValueError, match="head.weight"):
        load_weights(other, path)
    assert load_adapted(other, path) == ["head: 5 classes in the file, 7 here; it starts afresh"]
    with pytest.raises(ValueError, match="of another shape: .*ht_proj"):
        load_adapted(net(num_heads=4), path)


def test_decay():
    """Everything that is a position or a scale is spared, or, as published, what is a vector."""
    matrices = {
        "blocks.0.attn.pos_embed",
        "blocks.1.attn.pos_embed",
        *(
            f"patch_embed.{side}_affine.{name}"
            for side in ("pre", "post")
            for name in ("alpha", "beta")
        ),
    }
    ours, published = undecayed(net()), undecayed(net(decay="published"))
    assert ours - published == matrices
    assert "cls_token" in published and "blocks.0.mlp.bn2.weight" in published
    assert not any(name.endswith("conv2.weight") for name in ours)


def test_batch_norms_of_one_process_are_plain():
    """In one process there is nothing to synchronise; names are alike, so weights are shared."""
    norms = [m for m in net(sync_batch_norm="all").modules() if "BatchNorm" in type(m).__name__]
    assert norms and all(type(m) is nn.BatchNorm2d for m in norms)


@pytest.mark.parametrize("works", [True, False])
def test_batch_norms_are_synchronised_where_the_processes_work_on_gpus(works, monkeypatch):
    """Not where GPUs are but device=cpu: torch's synchronised form refuses tensors of the host."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: works)
    model = net()
    norms = [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert norms and all(isinstance(m, nn.SyncBatchNorm) == works for m in norms)
    monkeypatch.undo()
    alone = net().state_dict()
    assert model.state_dict().keys() == alone.keys()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in model.state_dict().items())


def test_other_channels_and_interface():
    model = net(in_chans=1, num_classes=3)
    assert model(images(channels=1)).shape == (2, 3)
    assert model.patch_embed.pre_affine.alpha.shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="1 channels"):
        model(images())
    full = timm.create_model("dhvt_tiny_cifar_patch4", **SMALL).eval()
    tokens = full.forward_features(images())
    torch.testing.assert_close(full.forward_head(tokens), full(images()))
    final, maps = full.forward_intermediates(images())
    assert len(maps) == 2 and maps[0].shape == (2, 16, 4, 4)
    torch.testing.assert_close(final, tokens)
    full.reset_classifier(0)
    assert full(images()).shape == (2, 16)
    wide = net(representation_size=8)
    assert wide(images()).shape == (2, 5) and "pre_logits.fc.weight" in wide.state_dict()
    groups = timm.models.group_parameters(full, full.group_matcher())
    assert {n for names in groups.values() for n in names} == {
        n for n, _ in full.named_parameters()
    }


def test_gradients_with_and_without_recomputation():
    """Drop path off, so that both passes see the same; every parameter gets one."""
    gradients = []
    for recompute in (False, True):
        model = net()
        model.set_grad_checkpointing(recompute)
        model(images()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("patch_size", [2, 4, 16])
def test_an_image_alone_has_the_gradients_it_has_in_a_batch(patch_size):
    """With running statistics; a batch norm of one image is where torch may misread strides."""
    gradients = []
    for batch in (1, 2):
        model = net(patch_size=patch_size, img_size=3 * patch_size).double()
        x = images(1, size=model.img_size).double().repeat(batch, 1, 1, 1).requires_grad_()
        model(x).square().sum().div(batch).backward()
        gradients.append([x.grad[0] * batch, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patch_size": 8}, "patches of 2, 4, 16 pixels, not of 8"),
        ({"distilled": True}, "no distilled form"),
        ({"decay": "none"}, "decay must be one of exempt, published"),
        ({"sync_batch_norm": "some"}, "sync_batch_norm must be one of all, stem, none"),
        ({"embed_dim": 17, "num_heads": 1}, "not a multiple of 2"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1, not 0"),
        ({"patch_size": 0}, "patch_size must be a whole number from 1, not 0"),
        ({"attn_drop_rate": 1.5}, r"attn_drop_rate must lie in \[0, 1\), not 1.5"),
    ],
)
def test_bad_options_say_what_is_wrong(options, said):
    with pytest.raises(ValueError, match=said) as error:
        net(**options)
    assert "\n" not in str(error.value)


def test_compiles_in_one_piece():
    torch.compiler.reset()
    model, x = net(), images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
