"""Every network starts as the published one does, in parameters and in what they do not tell."""

import math
import re

import pytest
import timm

import octic  # noqa: F401  (registers the models)

PATCH, DIM = 8, 256
SMALL = {"img_size": 64, "patch_size": PATCH, "embed_dim": DIM, "depth": 2, "num_heads": 4}
SMALL |= {"num_classes": 50, "num_register_tokens": 8, "mask_token": True}


def uniform(fan_in: int) -> float:
    """Deviation of uniform numbers up to the inverse root of the fan in."""
    return 1 / math.sqrt(3 * fan_in)


# Names, then mean and deviation of what they hold; the first that fits counts.
EVERYWHERE = [
    (r"norm\d?(\.scaling)?\.(weight|alpha_\w+)", 1.0, 0.0),
    (r"(norm\d?|attn|mlp|head)\..*(bias|beta)|mask_token", 0.0, 0.0),
    (r"(attn|mlp|head|invariant_proj)\..*weight", 0.0, 0.02),
    (r"invariant_proj.bias", 0.0, 0.0),
    (r"register_tokens", 0.0, 1e-6),
]
PLAIN = [
    (r"patch_embed", 0.0, uniform(3 * PATCH**2)),
    (r"pos_embed", 0.0, 0.02),
]
# The trained quarter of a filter is all that it has; a cell of positions is a sum of two.
OCTIC = [
    (r"patch_embed", 0.0, uniform(3 * (PATCH // 2) ** 2)),
    (r"pos_embed", 0.0, 0.16 * math.sqrt(0.5)),
]
MIRROR = [
    (r"patch_embed", 0.0, uniform(3 * PATCH**2 // 2)),
    (r"pos_embed", 0.0, 0.02),
]
FAMILIES = {  # deviation of the class token, initial layer scale
    "deit_small_patch16_LS": (0.02, 1e-4, PLAIN),
    "dinov2_vit_small_patch16": (1e-6, 1e-5, PLAIN),
    "hybrid_deit_small_patch16": (0.16, 1e-4, OCTIC),
    "d8_inv_early_deit_small_patch16": (0.16, 1e-4, OCTIC),
    "hybrid_dinov2_vit_small_patch16": (1e-6, 1e-5, OCTIC),
    "d2_deit_small_patch16_LS": (0.02, 1e-4, MIRROR),
    "hybrid_deit_small_patch16_LS": (0.02, 1e-4, MIRROR),
    "d2_inv_early_deit_small_patch16_LS": (0.02, 1e-4, MIRROR),
}
# Epsilons of the norms, how branches are dropped, and the offset in resampling positions.
UNTOLD = {
    "deit_small_patch16_LS": ({1e-6}, "sample", 0.0),
    "dinov2_vit_small_patch16": ({1e-6}, "subset", 0.1),
    "hybrid_deit_small_patch16": ({1e-5, 1e-6}, "sample", 0.0),
    "d8_inv_early_deit_small_patch16": ({1e-5, 1e-6}, "sample", 0.0),
    "hybrid_dinov2_vit_small_patch16": ({1e-5, 1e-6}, "subset", 0.0),
    "d2_deit_small_patch16_LS": ({1e-6}, "sample", 0.0),
    "hybrid_deit_small_patch16_LS": ({1e-6}, "sample", 0.0),
    "d2_inv_early_deit_small_patch16_LS": ({1e-6}, "sample", 0.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_starts_as_the_published_one(name):
    class_token, layer_scale, embedding = FAMILIES[name]
    table = [*EVERYWHERE, *embedding]
    table += [(r"cls_token", 0.0, class_token), (r"\.ls\d\.", layer_scale, 0.0)]
    for key, values in timm.create_model(name, **SMALL).double().named_parameters():
        mean, std = next((m, s) for names, m, s in table if re.search(names, key))
        centred = values.detach().flatten() - mean
        error = 4 / math.sqrt(len(centred))  # four standard errors, of the mean and of the root
        assert centred.mean().abs() <= error * std + 1e-9, key
        assert centred.square().mean().sqrt().item() == pytest.approx(std, rel=error, abs=1e-9), key


@pytest.mark.parametrize("name", FAMILIES)
def test_what_no_parameter_tells_is_as_published(name):
    """A file of weights loads without it, and gives other features."""
    net = timm.create_model(name, **SMALL)
    epsilons = {layer.eps for layer in net.modules() if hasattr(layer, "eps")}
    (mode,) = {block.drop_path_mode for block in net.blocks}
    assert (epsilons, mode, getattr(net, "position_offset", 0.0)) == UNTOLD[name]
