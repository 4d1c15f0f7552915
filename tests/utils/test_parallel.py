"""Wrapping keeps names and numbers; clipping is per part; optimiser state goes by name."""

import copy
import inspect
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from tests.utils.loop_case import Net, TinyRecipe
from utils import parallel
from utils.config.build import resolve
from utils.errors import UserError
from utils.optimizers import (
    apply_schedules,
    clip_parts,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from utils.precision import Precision

CPU = torch.device("cpu")


def test_alone_nothing_is_sharded_and_recomputation_changes_no_number():
    net = Net()
    twin = copy.deepcopy(net)
    wrap = parallel.make_wrap(CPU, Precision("fp32"), activation_checkpointing=True)
    assert wrap(net, units=net.blocks) is net
    assert list(net.state_dict()) == list(twin.state_dict())
    x = torch.randn(4, 6)
    for each in (net, twin):
        torch.manual_seed(1)
        each(x).square().sum().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_alone_the_gradients_need_no_look_at_the_modules(monkeypatch):
    net = Net()
    net(torch.randn(4, 6)).sum().backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    monkeypatch.setattr(nn.Module, "named_modules", None)  # what every walk begins with
    gradients = parallel.Gradients(net)
    gradients.set_sync(False)
    gradients.finish()
    monkeypatch.undo()
    assert all(torch.equal(p.grad, before[name]) for name, p in net.named_parameters())


def test_what_has_no_parameters_is_compiled_and_not_sharded(monkeypatch):
    sharded = []
    monkeypatch.setattr(parallel, "make_mesh", lambda device, sharding: "mesh")
    monkeypatch.setattr(parallel, "fully_shard", lambda module, **_: sharded.append(module))
    wrap = parallel.make_wrap(CPU, Precision("fp32"), compile=True)
    bare, linear = nn.GELU(), nn.Linear(2, 2)
    assert wrap(bare) is bare and wrap(linear) is linear
    assert bare._compiled_call_impl is not None and sharded == [linear]


def test_of_fsdp_s_warnings_that_of_views_alone_is_silent(monkeypatch):
    hook = inspect.getsource(FSDPState._register_pre_backward_hook)
    warning = "FSDP2-wrapped module ({cls}) returned a view tensor"
    if torch.__version__ >= "2.14":  # 2.11 does not warn
        assert warning in hook, "torch says it otherwise"
    monkeypatch.setattr(parallel, "make_mesh", lambda device, sharding: object())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        parallel.make_wrap(torch.device("cpu"), Precision("fp32", torch.device("cpu")))
        warnings.warn("FSDP2-wrapped module (FSDPNet) returned a view tensor. An", stacklevel=1)
        warnings.warn("FSDP2-wrapped module (FSDPNet) is odd", stacklevel=1)
    assert [str(one.message) for one in told] == ["FSDP2-wrapped module (FSDPNet) is odd"]


def test_unknown_sharding_and_precision_are_refused():
    with pytest.raises(UserError, match="replicate, shard, hybrid"):
        parallel.make_mesh(CPU, "zero3")
    with pytest.raises(UserError, match="fp32, tf32, bf16, fp16"):
        Precision("half")
    assert Precision("auto", "cpu").mode == "fp32"


def test_to_device_keeps_the_nest():
    batch = {"a": [torch.zeros(2), (torch.ones(1), 3)], "b": "text"}
    moved = parallel.to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta
    assert (moved["a"][1][1], moved["b"]) == (3, "text")


def test_blocks_are_found_in_an_adapter_too():
    net = Net()
    adapter = nn.Module()
    adapter.net = net
    assert parallel.blocks_of(net) == parallel.blocks_of(adapter) == list(net.blocks)
    assert parallel.blocks_of(nn.Linear(2, 2)) == []


def test_each_part_is_clipped_by_its_own_norm():
    torch.manual_seed(0)
    parts = {"a": nn.Linear(3, 3).double(), "b": nn.Linear(3, 3).double(), "none": nn.Linear(2, 2)}
    for scale, part in zip((1e-3, 10.0), (parts["a"], parts["b"]), strict=True):
        (part(torch.ones(2, 3).double()).square().sum() * scale).backward()
    twins = {name: copy.deepcopy(part) for name, part in parts.items()}
    for name, part in parts.items():
        for ours, theirs in zip(part.parameters(), twins[name].parameters(), strict=True):
            theirs.grad = None if ours.grad is None else ours.grad.clone()
    norms = clip_parts(parts, 1.0)
    for name, part in twins.items():
        expected = nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        assert norms[name] == pytest.approx(expected.item(), rel=1e-12)
        for ours, theirs in zip(parts[name].parameters(), part.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=0)
    assert norms["a"] < 1 < norms["b"] and norms["none"] == 0


@pytest.mark.parametrize("max_norm", [None, 0.0])
def test_without_a_largest_norm_gradients_are_only_measured(max_norm):
    net = Net()
    net(torch.randn(4, 6)).square().sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    expected = torch.stack([gradient.square().sum() for gradient in before]).sum().sqrt()
    torch.testing.assert_close(clip_parts({"net": net}, max_norm)["net"], expected)
    assert all(map(torch.equal, before, (p.grad for p in net.parameters())))


def test_schedules_reach_every_group():
    recipe = TinyRecipe()
    optimizer = make_optimizer(torch.optim.AdamW, recipe.param_groups(), recipe)
    values = apply_schedules(optimizer, recipe.schedules, 2)
    assert set(values) == set(recipe.schedules)
    lr, decay = values["lr"], values["weight_decay"]
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(lr * 0.5, decay), (lr, 0.0), (0.0, decay)]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (lambda own, other: [], "1 trainable parameters are not in .*, e.g. weight"),
        (lambda own, other: own * 2, "1 trainable parameters are not in .*, e.g. weight"),
        (lambda own, other: [*own, *other], "2 of the 3 parameters in the .* are not the recipe's"),
    ],
)
def test_groups_hold_each_parameter_of_the_recipe_once_and_no_other(params, said):
    """Another's would be trained, and no checkpoint could hold it."""
    recipe, other = nn.Linear(3, 2, bias=False), nn.Linear(3, 2)
    groups = [{"params": params([*recipe.parameters()], [*other.parameters()])}]
    with pytest.raises(UserError, match=said):
        make_optimizer(torch.optim.AdamW, groups, recipe)


def test_with_nothing_to_train_there_is_no_optimizer():
    frozen = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(UserError, match="^there is nothing to train: the parameter groups hold no"):
        make_optimizer(torch.optim.AdamW, [{"params": []}], frozen)


@pytest.mark.parametrize(
    ("factory", "options", "said"),
    [
        ("torch.optim.RMSprop", {"momentum": 1.0}, r"momentum must lie in \[0, 1\), not 1.0"),
        ("timm.optim.Lamb", {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), not 1.0"),
        ("timm.optim.Lamb", {"eps": math.nan}, "eps must be finite and at least 0, not nan"),
    ],
)
def test_options_that_an_optimizer_takes_and_that_mean_nothing_are_refused(factory, options, said):
    recipe = nn.Linear(3, 2)
    make = partial(resolve(factory), **options)
    with pytest.raises(UserError, match=f"^optimizer.{said}$"):
        make_optimizer(make, [{"params": recipe.parameters()}], recipe)


def test_a_schedule_is_scaled_by_the_multipliers_of_each_group():
    recipe = nn.Linear(3, 2)
    multipliers = {"lr_schedule": "slow", "lr_multiplier": 0.5, "weight_decay_multiplier": 3.0}
    groups = [{"params": [recipe.weight]}, {"params": [recipe.bias], **multipliers}]
    optimizer = make_optimizer(torch.optim.AdamW, groups, recipe)
    schedules = {"lr": lambda step: step, "slow": lambda step: 2.0, "weight_decay": lambda _: 0.25}
    assert apply_schedules(optimizer, schedules, 8) == {"lr": 8, "slow": 2, "weight_decay": 0.25}
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(8, 0.25), (1, 0.75)]
    apply_schedules(optimizer, {"lr": lambda step: 1.0, "slow": lambda step: 1.0}, 0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]


def test_norms_of_half_precision_gradients_are_not_of_half_the_range():
    """300 entries of 100 have a square sum beyond float16, and a norm within."""
    part = nn.Linear(300, 1, bias=False).half()
    part.weight.grad = torch.full_like(part.weight, 100.0)
    twin = nn.Linear(1, 300).half()
    for parameter in twin.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    norms = clip_parts({"part": part, "twin": twin})
    assert norms["part"].item() == pytest.approx(100 * 300**0.5, rel=2e-3)
    assert norms["twin"].item() == pytest.approx(100 * 600**0.5, rel=2e-3)


def test_optimizer_state_goes_by_name():
    first, second = TinyRecipe(), TinyRecipe()
    optimizer = make_optimizer(torch.optim.AdamW, first.param_groups(), first)
    first.losses(next(first.batches(0)), 0)["loss"].backward()
    optimizer.step()
    saved = optimizer_state(optimizer, first)
    other = make_optimizer(torch.optim.AdamW, second.param_groups()[::-1], second)
    load_optimizer_state(other, second, saved)
    weight, twin = first.student.blocks[0].weight, second.student.blocks[0].weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], other.state[twin]["exp_avg"])
    second.head.requires_grad_(False)
    smaller = make_optimizer(torch.optim.AdamW, second.param_groups()[:2], second)
    with pytest.raises(UserError, match=r"2 differ, e\.g\. head\.bias"):
        load_optimizer_state(smaller, second, saved)


@pytest.mark.parametrize(
    "name",
    [
        *(f"torch.optim.{name}" for name in ("Adam", "AdamW", "Adafactor", "SGD", "NAdam")),
        *(f"timm.optim.{name}" for name in ("Lamb", "Adafactor", "Adan", "Lion", "Muon")),
    ],
)
def test_an_optimizer_goes_on_where_it_was_saved(name):
    """Whatever its own options and states are: the weights are those of a run without a stop."""
    found = []
    for stopped in (False, True):
        torch.manual_seed(0)
        recipe = nn.Linear(6, 4)
        groups = [{"params": [recipe.weight]}, {"params": [recipe.bias]}]
        optimizer = make_optimizer(resolve(name), groups, recipe)
        for step in range(4):
            if stopped and step == 2:
                saved = optimizer_state(optimizer, recipe)
                optimizer = make_optimizer(resolve(name), groups, recipe)
                load_optimizer_state(optimizer, recipe, saved)
            apply_schedules(
                optimizer, {"lr": lambda step: 0.01, "weight_decay": lambda _: 0.1}, step
            )
            optimizer.zero_grad()
            recipe(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
        found.append(recipe.weight.detach().clone())
    assert torch.equal(*found) and found[0].isfinite().all()


@pytest.mark.parametrize(
    ("device", "keywords", "expected"),
    [
        ("cuda", {}, True),
        ("cuda", {"fused": False}, False),
        ("cuda", {"foreach": True}, None),
        ("cpu", {}, True),
        ("cpu", {"fused": False}, False),
        ("meta", {}, None),
    ],
)
def test_adamw_is_fused_unless_it_is_told_otherwise(device, keywords, expected):
    with FakeTensorMode():
        recipe = nn.Linear(3, 2, device=device)
        groups = [{"params": recipe.parameters()}]
        optimizer = make_optimizer(partial(torch.optim.AdamW, **keywords), groups, recipe)
    assert optimizer.param_groups[0]["fused"] is expected


def test_compiled_units_give_the_same_numbers():
    net = Net(dropout=0.0)
    x = torch.randn(4, 6)
    expected = net(x)
    for block in net.blocks:
        block.compile = lambda *a, b=block, **k: nn.Module.compile(b, backend="eager")
    parallel.make_wrap(CPU, Precision("fp32"), compile=True)(net, units=net.blocks)
    torch.testing.assert_close(net(x), expected)
    assert all(block._compiled_call_impl is not None for block in net.blocks)
