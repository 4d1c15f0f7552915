"""A net's keywords are of the kind that its class says, and its numbers have a meaning."""

import math

import pytest
import timm
from torch import nn

import octic.models  # noqa: F401  # registers
from vit.keywords import check_keywords
from vit.vision_transformer import VisionTransformer

WRONG = [
    ("init_values", math.nan, "must be finite and at least 0, not nan"),
    ("init_values", -1, "must be finite and at least 0, not -1"),
    ("init_values", True, "must be a number or null, not True"),
    ("norm_eps", math.inf, "must be finite"),
    ("norm_eps", "x", "must be a number, not 'x'"),
    ("mlp_ratio", -0.5, "must be finite"),
    ("drop_rate", math.nan, r"must lie in \[0, 1\], not nan"),
    ("attn_drop_rate", 2, r"must lie in \[0, 1\], not 2"),
    ("qkv_bias", "no", "must be true or false, not 'no'"),
    ("num_classes", 0.5, "must be a whole number, not 0.5"),
    ("img_size", 2.5, "must be a whole number or a list, not 2.5"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG)
@pytest.mark.parametrize("name", ["deit_tiny_patch16_LS", "hybrid_deit_tiny_patch16_LS"])
def test_a_registered_model_refuses(name: str, key: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} {said}"):
        timm.create_model(name, **{key: value})


def test_what_has_a_meaning_passes() -> None:
    check_keywords(
        VisionTransformer,
        {"init_values": None, "mlp_ratio": 4, "img_size": [32, 48], "qkv_bias": False, "else": "x"},
    )


def test_keywords_that_a_constructor_passes_on() -> None:
    class Child(VisionTransformer):
        def __init__(self, *, own: bool = False, **options: object) -> None:
            super().__init__()

    for key in ("own", "qkv_bias"):
        with pytest.raises(ValueError, match=f"{key} must be true or false"):
            check_keywords(Child, {key: "no"})
    check_keywords(nn.Linear, {"in_features": 3})
