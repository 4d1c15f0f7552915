"""Published checkpoint layouts load strictly; wrong, truncated and hostile files are refused."""

import argparse
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import octic  # noqa: F401  (registers the models)
from octic import OcticVisionTransformer
from octic.invariants import INVARIANTIZATIONS
from tests.published_names import published_vit_name
from vit.finetune import adapt_state, load_adapted
from vit.keys import check_fit, from_published, rename_published, renamed
from vit.weights import load_state, load_weights, read_state

LAYOUTS = json.loads(
    (Path(__file__).parents[1] / "parity/selection/octic/checkpoint_layouts.json").read_text()
)
PLAIN = {"vit_huge": "dinov2_vit_huge_patch16", "vit_large": "dinov2_vit_large_patch16"}
WRAPPINGS = ("", "_orig_mod.", "backbone.", "module.backbone.", "_fsdp_wrapped_module.backbone.")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("layout", LAYOUTS["models"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_published_layout_loads_strictly(layout: str, wrapping: str) -> None:
    """All 14 listings, in each on-disk wrapping; the invariantization is taken from the file."""
    entry = LAYOUTS["models"][layout]
    name = entry.get("registered_name") or PLAIN[entry["arch_name"]]
    state = {
        # Zero strides: real tensors of those shapes without their memory.
        wrapping + key: torch.zeros(()).expand(shape)
        for key, shape in entry["state_dict"].items()
    }
    with torch.device("meta"):
        net = timm.create_model(name)
    load_state(net, state)
    if "invariant" in layout:
        assert net.invariant == ("polynomial" if "polynomial" in layout else "power_spectrum")
    frozen = len(entry["frozen_zero_parameters"])
    assert len(net.state_dict()) == entry["keys"] - frozen


def small(name: str = "d8_inv_early_dinov2_vit_small_patch16", **options: Any) -> nn.Module:
    """A small model of a registered family."""
    return timm.create_model(name, **{**SMALL, **options})


def published_spelling(net: nn.Module, deit: bool) -> dict[str, Tensor]:
    """The model's weights as the reference stores them, zero token parts included."""
    state = {}
    for name, tensor in net.state_dict().items():
        spelled = published_vit_name(name, octic=True, deit=deit)
        state[spelled] = tensor
        if spelled.endswith("token.0") or spelled.endswith("tokens.0"):
            for part in range(1, 5 if deit else 8):
                state[f"{name}.{part}"] = torch.zeros_like(tensor)
    return state


@pytest.mark.parametrize(
    "ours", ["ls1.gamma", "ls2.alpha_A1", "blocks.3.ls1.gamma", "ls21.gamma", "blocks.3.ls11.gamma"]
)
def test_a_published_layer_scale_is_found_again_in_a_net_or_a_block_of_its_own(ours):
    published = published_vit_name(ours, deit=True)
    assert re.fullmatch(r"(blocks\.3\.)?gamma_[12](_1)?(\.alpha_A1)?", published)
    assert list(rename_published({published: torch.ones(1)})[0]) == [ours]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_name_of_the_model_may_be_that_of_a_wrapper(wrapping):
    """As `patch_embed.backbone` of timm's hybrids; or end like one."""
    net = nn.ModuleDict({"backbone": nn.Linear(1, 1), "my_module": nn.Linear(1, 1)})
    state = {wrapping + name: tensor + 1 for name, tensor in net.state_dict().items()}
    found = from_published(state, net)
    assert list(found) == list(net.state_dict())
    for name, tensor in found.items():
        assert torch.equal(tensor, state[wrapping + name])


@pytest.mark.parametrize("wrapping", ("", "_orig_mod.", "module.", "module._orig_mod."))
def test_a_name_behind_a_wrapper_is_the_models_before_another_of_its_names(wrapping):
    """A net with a classifier of its own beside its backbone's, in either order."""
    for names in (("head", "backbone"), ("backbone", "head")):
        parts = {"head": nn.Linear(2, 1), "backbone": nn.ModuleDict({"head": nn.Linear(2, 1)})}
        net = nn.ModuleDict({name: parts[name] for name in names})
        state = {wrapping + name: tensor for name, tensor in net.state_dict().items()}
        for name, tensor in from_published(state, net).items():
            assert tensor is state[wrapping + name]


CONTENTS = {
    "deit3.pth": lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}, "epoch": 3,
                            "args": argparse.Namespace(lr=3e-3)},
    "dinov2.pth": lambda s: {"teacher": {**{f"backbone.{k}": v for k, v in s.items()},
                                         "dino_head.mlp.0.weight": torch.zeros(2, 2)}},
    "resume.pth": lambda s: {"model": s, "optimizer": {"lr": np.float64(0.004)}, "iteration": 7},
    "bare.pth": lambda s: s,
    "state_dict.pth": lambda s: {"state_dict": s},
}  # fmt: skip


@pytest.mark.parametrize("file", CONTENTS)
@pytest.mark.parametrize("deit", (False, True))
def test_files_round_trip(tmp_path: Path, file: str, deit: bool) -> None:
    """Each container, in both spellings, gives back the same outputs."""
    source, target = small(num_register_tokens=2), small(num_register_tokens=2)
    torch.save(CONTENTS[file](published_spelling(source, deit)), tmp_path / file)
    load_weights(target, tmp_path / file)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(source.eval()(x), target.eval()(x))


def test_safetensors_and_invariantization_detection(tmp_path: Path) -> None:
    """A file of polynomials turns a power-spectrum model into what the file needs."""
    for name in (n for n in INVARIANTIZATIONS if n not in ("trivial", "power_spectrum")):
        source, target = small(invariant=name), small()
        save_file(source.state_dict(), tmp_path / "x.safetensors")
        load_weights(target, tmp_path / "x.safetensors")
        assert target.invariant == name
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(source.eval()(x), target.eval()(x))


def test_no_weight_of_a_file_is_lost_by_renaming() -> None:
    """Of two spellings of one weight ours counts, else the first; the other keeps its name."""
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)

    def rename(name: str) -> str:
        return name.replace("old", "new").removeprefix("module.")

    assert renamed({"old.x": a, "module.y": b}, rename) == {"new.x": a, "y": b}
    assert renamed({"old.x": a, "new.x": b}, rename) == {"new.x": b, "old.x": a}
    assert renamed({"new.x": b, "old.x": a}, rename) == {"new.x": b, "old.x": a}
    found = renamed({"old.x": a, "module.old.x": b, "module.new.x": c}, rename)
    assert found == {"new.x": a, "module.old.x": b, "module.new.x": c}


def test_a_net_that_changes_itself_to_a_file_keeps_its_dtype() -> None:
    source, target = small(invariant="max_filtering").double(), small().double()
    load_state(target, source.state_dict())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(source.eval()(x), target.eval()(x))


@pytest.mark.parametrize("old", (False, True))
def test_what_a_published_file_holds_besides_is_no_obstacle(tmp_path: Path, old: bool) -> None:
    """Blocks in chunks, constants, both heads, numpy's numbers; torch's older format of files."""
    source, target = small(), small()
    state = {re.sub(r"^blocks", "blocks.0", key): v for key, v in source.state_dict().items()}
    for name in ("dino_head.w", "ibot_head.w", "invariantization.rotation_action"):
        state[name] = torch.ones(2)
    content = {"teacher": state, "best": np.float32(1), "seen": np.int64(3), "done": np.bool_(True)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    load_weights(target, tmp_path / "x.pth")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(source.eval()(x), target.eval()(x))


def test_weights_are_taken_from_where_they_are_asked_for(tmp_path: Path) -> None:
    """A teacher before the model that it taught, unless another is named."""
    nets = {name: small("dinov2_vit_small_patch16") for name in ("model", "teacher", "ema")}
    path, x = tmp_path / "both.pth", torch.randn(1, 3, 32, 32)
    torch.save({name: net.state_dict() for name, net in nets.items()}, path)
    for container, expected in ((None, "teacher"), ("model", "model"), ("ema", "ema")):
        target = small("dinov2_vit_small_patch16")
        load_weights(target, path, container=container)
        assert torch.equal(target.eval()(x), nets[expected].eval()(x))
    with pytest.raises(ValueError, match=r"both\.pth: no key 'student'; it has model, teach"):
        read_state(path, container="student")


def test_invariants_of_one_width_stay_the_models_own() -> None:
    """`trivial` and `linear` have weights alike: a model loads its own file as itself."""
    for name, group in (("trivial", "D4"), ("trivial", "mirror"), ("linear", "D4")):
        source = small(invariant=name, group=group)
        target = small(invariant=name, group=group)
        load_state(target, source.state_dict())
        assert target.invariant == name
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(source.eval()(x), target.eval()(x))


def test_wrong_weights_name_what_misses_and_what_is_left_over(tmp_path: Path) -> None:
    """A plain model's file for an octic one, another width, another depth."""
    torch.save(small("dinov2_vit_small_patch16").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain\.pth: .*missing: .*left over: "):
        load_weights(small(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="of another shape: .*in the file"):
        load_state(small(embed_dim=128), small().state_dict())
    with pytest.raises(ValueError, match=r"left over: blocks\.2"):
        load_state(small(), small(depth=4, octic_equi_break_layer=1).state_dict())


def test_of_many_names_that_do_not_fit_the_first_three_are_listed() -> None:
    """In their own order, and the others are counted."""
    wanted = {f"w{number}": torch.zeros(1) for number in range(10)}
    listed = "missing: w0, w1, w2"
    with pytest.raises(ValueError, match="fit an OcticNet; left over: x$"):
        check_fit({"x": torch.zeros(1)}, {}, "OcticNet")
    with pytest.raises(ValueError, match=f"fit a Net; {listed}$"):
        check_fit({name: wanted[name] for name in list(wanted)[3:]}, wanted, "Net")
    with pytest.raises(ValueError, match=f"fit a Net; {listed} and 7 more; left over: y, x$"):
        check_fit({"x": torch.zeros(1)}, wanted, "Net", also_left_over=["y"])


def test_a_file_of_ours_that_does_not_fit_tells_of_what_network_it_is(tmp_path: Path) -> None:
    """So that its sizes need not be searched for."""
    made = {"_target_": "octic.models.hybrid_x", "_partial_": True, "embed_dim": 64, "depth": 2}
    path = tmp_path / "model.safetensors"
    save_file(small().state_dict(), path, {"constructor": json.dumps(made)})
    for load in (load_weights, load_adapted):
        with pytest.raises(ValueError) as told:
            load(small(embed_dim=128), path)
        assert str(told.value).endswith("; the file is of hybrid_x with embed_dim=64, depth=2")
        assert str(told.value).count(str(path)) == 1


def test_a_weight_under_two_names_is_refused() -> None:
    """Which of the two counts is not for us to say."""
    net = small()
    state = dict(net.state_dict())
    state["module.norm.weight"] = 2 * state["norm.weight"]
    for load in (load_state, lambda net, state: adapt_state(state, net)):
        with pytest.raises(ValueError, match=r"left over: module\.norm\.weight"):
            load(net, state)


def test_tokens_outside_the_trivial_irrep_are_refused() -> None:
    """A stored token part that is not zero cannot be expressed, so it is not dropped."""
    net = small()
    state = published_spelling(net, deit=False)
    state["cls_token.3"] = torch.ones_like(state["cls_token.3"])
    with pytest.raises(ValueError, match=r"left over: cls_token\.3"):
        from_published(state, net)


def test_bad_files_get_one_clear_line(tmp_path: Path) -> None:
    """Missing, empty, truncated, no weights, another type."""
    good = tmp_path / "good.pth"
    torch.save(small().state_dict(), good)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(good.read_bytes()[:5000])
    content = good.read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "hello.pth").write_text("hello world\n")  # its unpickler says 101
    (tmp_path / "config.yaml").write_text("name: x\noutput_dir: y\n")  # no opcode fits its bytes
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    for name, words in {
        "absent.pth": "no such weights file",
        "truncated.pth": "truncated or not a torch file",
        "half.pth": r"truncated or not a torch file \([^.]*central directory\)$",
        "empty.pth": "truncated or not a torch file",
        "text.pth": "(truncated or not|refused)",
        "hello.pth": "truncated or not a torch file$",
        "config.yaml": "truncated or not a torch file",
        "short.safetensors": "truncated or not a safetensors file",
        "list.pth": "not named weights",
        "nothing.pth": "holds no weights",
    }.items():
        with pytest.raises(ValueError, match=words) as caught:
            read_state(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


class Hostile:
    """Pickles as a call that would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", (False, True))
def test_hostile_pickles_execute_nothing(tmp_path: Path, legacy: bool) -> None:
    """A file that would run a command when unpickled is refused and runs nothing."""
    mark, file = tmp_path / "mark", tmp_path / "hostile.pth"
    if legacy:
        file.write_bytes(pickle.dumps({"teacher": Hostile(mark)}))
    else:
        torch.save({"teacher": Hostile(mark)}, file)
    with pytest.raises(ValueError, match=r"hostile\.pth"):
        read_state(file)
    assert not mark.exists()


def test_weights_that_do_not_fit_leave_the_invariantization() -> None:
    """A model changes itself to a file only if the whole file fits."""
    net, other = (
        OcticVisionTransformer(**SMALL, invariant=name) for name in ("power_spectrum", "polynomial")
    )
    state = other.state_dict()
    kept, before = net.invariantization, {k: v.clone() for k, v in net.state_dict().items()}
    for load in (load_state, lambda net, state: adapt_state(state, net)):
        with pytest.raises(ValueError, match="missing: norm.weight"):
            load(net, {name: value for name, value in state.items() if name != "norm.weight"})
        assert net.invariant == "power_spectrum" and net.invariantization is kept
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    load_state(net, state)
    assert net.invariant == "polynomial"


def test_a_hybrid_does_not_become_invariant_by_a_file() -> None:
    """It takes over which invariants, but not whether there are any."""
    net = small("hybrid_dinov2_vit_small_patch16")
    with pytest.raises(ValueError, match=r"left over: invariant"):
        load_state(net, small().state_dict())
    assert net.invariant is False and net.invariantization is None


@pytest.mark.parametrize("group", ("mirror", "C4", "D4"))
def test_invariants_before_the_head_are_told_by_its_width(group: str) -> None:
    """Two of one width cannot be: then they are the model's own. A file without a head is named."""
    x, options = torch.randn(1, 3, 32, 32), SMALL | {"invariant_at": "head", "group": group}
    for theirs, ours in (
        ("power_spectrum", "trivial"),
        ("trivial", "power_spectrum"),
        ("linear",) * 2,
    ):
        source, target = (OcticVisionTransformer(**options, invariant=n) for n in (theirs, ours))
        load_state(target, source.state_dict())
        assert target.invariant == theirs
        assert torch.equal(source.eval()(x), target.eval()(x))
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("head.")}
    with pytest.raises(ValueError, match=r"missing: head\.bias, head\.weight"):
        load_state(target, state)
