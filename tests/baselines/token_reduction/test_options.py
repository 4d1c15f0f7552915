"""Options as files and command lines give them: what is taken, and what is refused in one line."""

import pytest

from baselines.token_reduction.evit import EViT
from baselines.token_reduction.options import block_list, each, rates_of_blocks
from baselines.token_reduction.presets import METHODS, make_reducer
from baselines.token_reduction.reduced import reduced as build_reduced
from baselines.token_reduction.reducer import Facts
from tests.baselines.token_reduction.toys import DEPTH, reduced, timm_net
from utils.config.build import build
from utils.errors import UserError
from utils.ranges import check_count

FACTS = Facts(depth=DEPTH, first=0, num_prefix=1, has_class_token=True, head_dim=8)
NUMBERS = "must be a number or a list of numbers, not"
REFUSED = [
    ("evit", {"keep_rate": "high"}, "keep_rate must be a number, not 'high'"),
    ("evit", {"keep_rate": 0}, r"keep_rate must lie in \(0, 1\], not 0"),
    ("evit", {"keep_rate": True}, "keep_rate must be a number, not True"),
    ("evit", {"locations": "3,6"}, f"locations {NUMBERS} '3,6'"),
    ("evit", {"locations": 1.5}, "locations must be a whole number from 0, not 1.5"),
    ("evit", {"locations": [1, 1.5]}, r"locations\[1\] must be a whole number from 0, not 1.5"),
    ("evit", {"locations": [-1]}, r"locations\[0\] must be a whole number from 0, not -1"),
    ("evit", {"keep_rates": 0.5}, "must be a list with a rate for every block, not 0.5"),
    ("evit", {"keep_rates": [0.5, 2]}, r"keep_rates\[1\] must lie in \(0, 1\], not 2"),
    ("evit", {"keep_rates": {"x": 0.5}}, "a block of keep_rates must be a whole number"),
    ("evit", {"keep_rates": {2: "low"}}, r"keep_rates\[2\] must be a number, not 'low'"),
    ("evit", {"keep_rates": [0.5], "locations": 1}, "both say where; give one of them"),
    ("evit", {"keep_rates": [0.5], "keep_rate": 0.5}, "both say how many; give one of them"),
    ("evit", {"fuse_token": "yes"}, "fuse_token must be true or false, not 'yes'"),
    ("tome", {"r": "eight"}, f"r {NUMBERS} 'eight'"),
    ("tome", {"r": [4, "x"]}, r"r\[1\] must be a whole number from 0, not 'x'"),
    ("tome", {"r": [4, -1]}, r"r\[1\] must be a whole number from 0, not -1"),
    ("tome", {"r": [4, 4], "inflection": 0.5}, "inflection has nothing to slope; give one"),
    ("tome", {"inflection": "up"}, "inflection must be a number, not 'up'"),
    ("hourglass", {"num_clusters": 16.0}, "num_clusters must be a whole number from 1, not 16.0"),
    ("hourglass", {"num_clusters": 0}, "num_clusters must be a whole number from 1, not 0"),
    ("hourglass", {"num_clusters": [4]}, r"rows and columns as \[4, 4\], not \[4\]"),
    ("hourglass", {"num_clusters": [4, 0]}, r"num_clusters\[1\] must be a whole number from 1"),
    ("hourglass", {"num_clusters": "many"}, f"num_clusters {NUMBERS} 'many'"),
    ("hourglass", {"location": "middle"}, "location must be a whole number from 0"),
    ("hourglass", {"window": 2.5}, "window must be a whole number from 0, not 2.5"),
    ("hourglass", {"nearest": 1.5}, "nearest must be a whole number from -1, not 1.5"),
    ("hourglass", {"temperature": "hot"}, "temperature must be a number, not 'hot'"),
    ("evo_vit", {"location": 2.5}, "location must be a whole number from 0, not 2.5"),
    ("evo_vit", {"keep_rate": "half"}, f"keep_rate {NUMBERS} 'half'"),
    ("evo_vit", {"keep_rate": [1, 0]}, r"keep_rate\[1\] must lie in \(0, 1\], not 0"),
    ("evo_vit", {"keep_rate": [1, 0.5], "location": 1}, "both say where; give one of them"),
    ("evo_vit", {"tradeoff": "even"}, f"tradeoff {NUMBERS} 'even'"),
    ("ats", {"locations": "all"}, f"locations {NUMBERS} 'all'"),
    ("ats", {"locations": [2.0]}, r"locations\[0\] must be a whole number from 0, not 2.0"),
    ("ats", {"num_samples": "few"}, "num_samples 'few' must be a whole number of 1 or more"),
    ("ats", {"num_samples": True}, "num_samples True must be a whole number of 1 or more"),
    ("act", {"query_hashes": 1.5}, "query_hashes must be a whole number from 1, not 1.5"),
    ("act", {"start": "2"}, "start must be a whole number from 0, not '2'"),
    ("act", {"seed": "x"}, "seed must be a whole number from 0, not 'x'"),
    ("smyrf", {"query_cluster_size": 1.5}, "query_cluster_size must be a whole number from 1"),
    ("smyrf", {"key_cluster_size": 0}, "key_cluster_size must be a whole number from 1, not 0"),
    ("smyrf", {"stop": 2.5}, "stop must be a whole number from -1, not 2.5"),
]


@pytest.mark.parametrize(("method", "options", "said"), REFUSED)
def test_what_has_no_meaning_is_refused_where_it_is_given(method, options, said):
    """In one line of ours, before there is a network."""
    with pytest.raises(ValueError, match=said) as error:
        make_reducer(method, **options)
    assert "\n" not in str(error.value)


def test_a_single_block_is_a_list_of_one():
    assert reduced("timm", "evit", locations=3).reducer.rates == {3: 0.6}
    assert reduced("timm", "ats", locations=3).reducer.blocks == {3}
    assert block_list("locations", range(2, 4)) == [2, 3] and block_list("locations", []) == []
    assert each("r", (4, 0), check_count) == [4, 0]


def test_rates_of_some_blocks_may_have_text_as_keys():
    """As the keys of a file or a command line have; and the default is the published rate."""
    assert rates_of_blocks("keep_rates", {"2": 0.5, 4: 1.0}) == {2: 0.5, 4: 1.0}
    for options, rates in (
        ({"keep_rates": {"2": 0.5, 4: 1.0}}, {2: 0.5}),
        ({"keep_rates": [1.0, 0.5] + [1.0] * (DEPTH - 2)}, {1: 0.5}),
        ({"locations": [1]}, {1: 0.7}),
    ):
        found = EViT(**options)
        found.bind(FACTS)
        assert found.rates == rates


def test_every_method_is_built_without_options():
    for method in METHODS:
        make_reducer(method).bind(FACTS)


def test_defaults_divide_the_plain_blocks_of_a_hybrid():
    """As the papers divide the blocks of a net that is plain from the start."""
    plain, hybrid = FACTS._replace(depth=8), FACTS._replace(depth=14, first=6)
    for offset, facts in ((0, plain), (6, hybrid)):
        made = {method: make_reducer(method) for method in METHODS}
        for one in made.values():
            one.bind(facts)
        assert made["hourglass"].at == offset + 4
        assert set(made["evit"].rates) == {offset + 2, offset + 4, offset + 6}
        assert made["evo_vit"].rates == [1.0] * (offset + 2) + [0.5] * 6
        assert made["ats"].blocks == set(range(offset + 2, offset + 8))
        assert made["act"].blocks == made["smyrf"].blocks == range(offset, offset + 8)
        assert made["tome"].schedule == [0] * offset + [8] * 8
    falling = make_reducer("tome", r=6, inflection=-1.0)
    falling.bind(hybrid._replace(depth=12))
    assert falling.schedule == [0] * 6 + [12, 9, 7, 4, 2, 0]


def test_a_config_names_the_option_with_its_place():
    node = {
        "_target_": "baselines.token_reduction.reduced.reduced",
        "backbone": {"_target_": "vit.models.deit_small_patch16_LS", "_partial_": True},
        "options": {"r": "eight"},
    }
    with pytest.raises(UserError, match=r"^options\.r must be a number or a list"):
        build(node)
    with pytest.raises(ValueError, match=r"^options\.keep_rate must be a number"):
        build_reduced(timm_net(), method="evit", options={"keep_rate": "high"})


@pytest.mark.parametrize("method", METHODS)
def test_options_are_shown_without_what_a_network_adds(method):
    """No drawn projections, which are tables of numbers."""
    shown = repr(reduced("ours", method).reducer)
    assert shown.startswith(f"{METHODS[method].__name__}(") and "tensor" not in shown
    assert ("draws=Draws(seed=0)" in shown) == (method in ("act", "smyrf"))


def test_the_form_among_the_options_is_pointed_to_its_place():
    with pytest.raises(ValueError, match="form is a keyword of its own, not one of options"):
        build_reduced(timm_net, method="act", options={"form": "published"})
