"""Whose a word is that neither a wrapper nor what it wraps knows."""

import pytest
from torch import nn

from baselines.posthoc.symmetrized import symmetrized
from baselines.token_reduction.reduced import reduced
from baselines.wrapping import make_backbone
from utils.config.build import build
from utils.errors import UserError

WRAPPERS = {
    "reduced": "baselines.token_reduction.reduced.reduced",
    "symmetrized": "baselines.posthoc.symmetrized.symmetrized",
}


def node(wrapper: str) -> dict:
    inner = {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True}
    return {"_target_": WRAPPERS[wrapper], "backbone": inner}


@pytest.mark.parametrize(
    ("wrapper", "word", "said"),
    [
        (
            "reduced",
            "metod",
            "^Reduced takes no 'metod'; did you mean 'method'.*form, method",
        ),
        ("symmetrized", "agregator", "^Symmetrized takes no 'agregator'; .* mean 'aggregator'"),
        ("reduced", "num_clases", "mean 'num_classes'.*; nor does Reduced .known: form, method"),
        ("symmetrized", "xyz", "takes no 'xyz'.*num_heads.*; nor does Symmetrized .known: aggreg"),
    ],
)
def test_a_word_that_neither_knows_is_held_against_both(wrapper, word, said):
    """The hint comes first, and the words of both are there."""
    with pytest.raises(UserError, match=said) as error:
        build(node(wrapper), **{word: 3})
    assert "\n" not in str(error.value) and "VisionTransformer takes no" in str(error.value)


@pytest.mark.parametrize(
    ("build_wrapper", "word", "said"),
    [
        (symmetrized, "groop", "Symmetrized takes no 'groop'; did you mean 'group'"),
        (reduced, "metod", "Reduced takes no 'metod'; did you mean 'method'"),
        (symmetrized, "num_classes", "^num_classes: the backbone is built already"),
    ],
)
def test_a_built_backbone_takes_no_words(build_wrapper, word, said):
    """A slip in the wrapper's own word is one, whatever the backbone is."""
    with pytest.raises(ValueError, match=said):
        build_wrapper(nn.Linear(2, 2), **{word: "D4"})


def test_plain_factories_are_read_too_and_other_errors_stay():
    def strict(width: int) -> nn.Module:
        return nn.Linear(width, width)

    def failing(width: int) -> nn.Module:
        raise ValueError(f"width {width} is none")

    assert isinstance(make_backbone(strict, {"width": 2}, "Reduced", ["method"]), nn.Linear)
    with pytest.raises(ValueError, match="Reduced takes no 'metod'; did you mean 'method'"):
        make_backbone(strict, {"width": 2, "metod": 3}, "Reduced", ["method"])
    with pytest.raises(ValueError, match="^width 2 is none$"):
        make_backbone(failing, {"width": 2}, "Reduced", ["method"])
