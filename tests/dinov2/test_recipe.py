"""The recipe keeps its promises to the loop, in every family and with every option."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dinov2.masking import padded_mask_rows
from dinov2.schedules import Schedules
from tests.dinov2.tiny import HEAD, Noise, make_backbone, make_batch, make_recipe, to_double
from utils.optimizers import apply_schedules, clip_parts, make_optimizer

FAMILIES = ("plain", "hybrid", "invariant")


def make_training(recipe):
    return make_optimizer(torch.optim.AdamW, recipe.param_groups(), recipe)


def take_step(recipe, optimizer, step: int, *batches) -> dict[str, torch.Tensor]:
    apply_schedules(optimizer, recipe.schedules, step)
    optimizer.zero_grad()
    for batch in batches:
        losses = recipe.losses(batch, step)
        (losses["loss"] / len(batches)).backward()
    clip_parts(recipe.clipped_parts(), 3.0)
    optimizer.step()
    recipe.after_step(step)
    return losses


def gradients(recipe) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in recipe.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("separate", [False, True])
def test_every_trainable_parameter_gets_a_gradient(family, centering, separate):
    recipe = make_recipe(family, centering=centering, separate_head=separate)
    losses = recipe.losses(make_batch(recipe), 0)
    losses["loss"].backward()
    assert all(value.isfinite() and value.ndim == 0 for value in losses.values())
    assert {n for n, p in recipe.student.named_parameters() if p.grad is None} == set()
    assert all(p.grad is None for p in recipe.teacher.parameters())


def test_what_is_shown_and_what_is_optimised():
    recipe = make_recipe(dino_loss_weight=2.0, ibot_loss_weight=3.0, koleo_loss_weight=0.5)
    losses = recipe.losses(make_batch(recipe), 0)
    crops = losses["dino_local_crops_loss"], losses["dino_global_crops_loss"]
    optimised = 2 * sum(crops) + 2 * losses["koleo_loss"] + 3 * 2 * losses["ibot_loss"]
    torch.testing.assert_close(losses["loss"].detach(), optimised)
    shown = sum(crops) + losses["koleo_loss"] + losses["ibot_loss"]
    torch.testing.assert_close(losses["total_loss"], shown)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_crops_give_the_gradients_of_looped_ones(family):
    recipe = make_recipe(family).double()
    batch = to_double(make_batch(recipe))
    recipe.losses(batch, 0)["loss"].backward()
    packed = gradients(recipe)
    recipe.zero_grad()
    backbone = recipe.student["backbone"]
    encode = backbone.encode
    backbone.encode = lambda crops, masks: [
        encode([crop], [mask])[0] for crop, mask in zip(crops, masks, strict=True)
    ]
    recipe.losses(batch, 0)["loss"].backward()
    looped = gradients(recipe)
    assert packed.keys() == looped.keys()
    for name in packed:
        torch.testing.assert_close(packed[name], looped[name], rtol=1e-9, atol=1e-12)


def test_crops_are_encoded_in_one_call(monkeypatch):
    recipe = make_recipe()
    calls = []
    backbone = recipe.student["backbone"]
    encode = backbone.encode
    backbone.encode = lambda crops, masks: calls.append(len(crops)) or encode(crops, masks)
    recipe.losses(make_batch(recipe), 0)
    assert calls == [2]


def split_batch(batch: dict[str, torch.Tensor], parts: int, size: int) -> list[dict]:
    """Micro-batches of a batch; crops are crop-major, so images are picked in strides."""
    result = []
    for part in range(parts):
        images = torch.arange(size).chunk(parts)[part]
        micro = {}
        for name in ("global_crops", "local_crops", "masks"):
            micro[name] = batch[name].unflatten(0, (-1, size))[:, images].flatten(0, 1)
        rows = padded_mask_rows(micro["masks"], int(micro["masks"].sum()))
        rows["mask_weights"] = rows["mask_weights"].double()
        result.append(micro | rows)
    return result


def test_micro_batches_accumulate_to_the_whole_batch():
    """Without KoLeo and with a fixed centre nothing depends on who shares a micro-batch."""
    options = {"koleo_loss_weight": 0.0, "dataset": Noise(8)}
    recipe = make_recipe(**options).double()
    batch = to_double(make_batch(recipe, 4))
    recipe.losses(batch, 0)["loss"].backward()
    whole = gradients(recipe)
    recipe.after_step(0)
    center = recipe.dino_targets.ema.center.clone()

    torch.manual_seed(0)
    split = make_recipe(**options).double()
    split.student.load_state_dict(recipe.student.state_dict())
    split.teacher.load_state_dict(recipe.student.state_dict())
    for micro in split_batch(batch, 2, 4):
        (split.losses(micro, 0)["loss"] / 2).backward()
    found = gradients(split)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-9, atol=1e-12)
    split.after_step(0)
    torch.testing.assert_close(split.dino_targets.ema.center, center)


def test_the_teacher_is_the_moving_average_of_the_student():
    recipe = make_recipe(schedules=Schedules(warmup_epochs=0, momentum=(0.9, 0.9)))
    before = [p.clone() for p in recipe.teacher.parameters()]
    for parameter in recipe.student.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    recipe.after_step(0)
    pairs = zip(before, recipe.student.parameters(), recipe.teacher.parameters(), strict=True)
    for old, student, teacher in pairs:
        torch.testing.assert_close(teacher.data, 0.9 * old + 0.1 * student.data)


def test_the_teacher_never_trains():
    recipe = make_recipe(drop_path_rate=0.5).train()
    assert recipe.student.training and not recipe.teacher.training
    assert not any(p.requires_grad for p in recipe.teacher.parameters())
    recipe.eval()
    assert not recipe.student.training
    crops = make_batch(recipe)["global_crops"]
    recipe.train()
    first, second = (recipe.exported(crops) for _ in range(2))
    assert torch.equal(first, second)


def test_the_last_layer_is_frozen_at_first():
    recipe = make_recipe()
    assert recipe.schedules["last_layer_lr"](2) == 0 < recipe.schedules["last_layer_lr"](3)
    optimizer = make_training(recipe)
    before = recipe.student["dino_head"].last_layer.weight_v.clone()
    take_step(recipe, optimizer, 1, make_batch(recipe))
    assert torch.equal(before, recipe.student["dino_head"].last_layer.weight_v)


def test_no_local_crops():
    recipe = make_recipe(local_crops_number=0)
    batch = make_batch(recipe)
    assert "local_crops" not in batch
    losses = recipe.losses(batch, 0)
    assert losses["dino_local_crops_loss"] == 0 and losses["loss"].isfinite()


def test_the_mean_is_over_the_pairs_that_there_are():
    """Of 2 global and 2 local crops a global one makes 3 pairs with a teacher's, alone 1."""
    recipe = make_recipe(local_crops_number=2).double()
    batch = to_double(make_batch(recipe))
    alone = {name: value for name, value in batch.items() if name != "local_crops"}
    both, single = (recipe.losses(b, 0)["dino_global_crops_loss"] for b in (batch, alone))
    torch.testing.assert_close(single, 3 * both)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("which", ["dino", "ibot", "koleo"])
def test_each_loss_can_be_switched_off(which, separate):
    few = HEAD | {"num_prototypes": 7}  # the two heads need not be alike
    recipe = make_recipe(separate_head=separate, ibot_head=few, **{f"{which}_loss_weight": 0.0})
    assert ("ibot_head" in recipe.student) == (separate and which != "ibot")
    losses = recipe.losses(make_batch(recipe), 0)
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert losses[{"dino": "dino_global_crops_loss"}.get(which, f"{which}_loss")] == 0


def test_something_must_be_learnt():
    with pytest.raises(ValueError, match="nothing to learn"):
        make_recipe(dino_loss_weight=0, ibot_loss_weight=0, koleo_loss_weight=0)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_batch_of_one_image(centering):
    recipe = make_recipe(batch_size_per_gpu=1, centering=centering)
    optimizer = make_training(recipe)
    for step in range(2):
        losses = take_step(recipe, optimizer, step, make_batch(recipe, 1, seed=step))
        assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    recipe = make_recipe(family)
    batch = make_batch(recipe)
    exact = recipe.losses(batch, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = recipe.losses(batch, 0)
    losses["loss"].backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.03, atol=0.03)
    assert all(g.isfinite().all() for g in gradients(recipe).values())


def test_training_goes_on_as_if_never_stopped():
    """What is saved is all there is: the next loss has the same bits."""

    def run(recipe, optimizer, steps):
        batches = recipe.batches(steps[0])
        return [take_step(recipe, optimizer, step, next(batches))["loss"] for step in steps]

    recipe = make_recipe()
    optimizer = make_training(recipe)
    run(recipe, optimizer, range(3))
    recipe_state = {k: v.clone() for k, v in recipe.state_dict().items()}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    expected = run(recipe, optimizer, range(3, 6))
    torch.manual_seed(99)
    fresh = make_recipe()
    fresh.load_state_dict(recipe_state)
    optimizer = make_training(fresh)
    optimizer.load_state_dict(optimizer_state)
    assert run(fresh, optimizer, range(3, 6)) == expected


def test_it_learns():
    recipe = make_recipe(
        koleo_loss_weight=0.0, schedules=Schedules(warmup_epochs=0, lr=0.03, momentum=(0.9, 0.9))
    )
    optimizer, batch = make_training(recipe), make_batch(recipe)
    losses = [take_step(recipe, optimizer, 3, batch)["loss"].item() for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]


def test_rates_and_epochs_follow_the_effective_batch():
    schedules = Schedules(warmup_epochs=0)
    recipe = make_recipe(
        batch_size_per_gpu=2, accumulation=2, epoch_length=0, epochs=5, schedules=schedules
    )
    assert (recipe.epoch_length, recipe.total_steps) == (3, 15)
    assert recipe.schedules["lr"](0) == pytest.approx(4e-3 * (4 / 1024) ** 0.5)
    large = make_recipe(batch_size_per_gpu=64, epoch_length=-1)
    assert large.epoch_length == 1


def test_batches_come_from_the_loader():
    recipe = make_recipe(accumulation=2)
    batches = recipe.batches(1)
    batch = next(batches)
    assert batch["global_crops"].shape == (6, 3, 16, 16)
    assert batch["local_crops"].shape == (6, 3, 8, 8)
    assert batch["masks"].shape == (6, 16)
    again = next(recipe.batches(1))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(next(batches)["global_crops"], batch["global_crops"])


def test_parts_are_wrapped_with_their_blocks():
    recipe = make_recipe()
    seen = []

    def wrap(module, units=(), methods=()):
        seen.append((type(module).__name__, len(units)))
        return module

    recipe.parallelize(wrap)
    parts = [("OcticVisionTransformer", 2), ("DINOHead", 0)] * 2
    assert seen == [*parts, ("CrossEntropy", 0), ("EmaCenter", 0), ("EmaCenter", 0)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"dino_loss_weight": 0.0}, marks=pytest.mark.slow),
        pytest.param({"ibot_loss_weight": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_compiled_losses_are_the_same_and_compiled_once(options):
    """Temperatures that move from step to step make no new graph after the second."""
    torch.compiler.reset()
    graphs = []

    def wrap(module, units=(), methods=()):
        if not list(module.parameters()):
            module.compile(fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph)
        return module

    eager = make_recipe(**options).double()
    compiled = copy.deepcopy(eager)
    compiled.parallelize(wrap)
    made = []
    for step in range(4):
        batch = to_double(make_batch(eager, seed=step))
        found = [recipe.losses(batch, step) for recipe in (eager, compiled)]
        torch.testing.assert_close(found[1], found[0])
        for recipe, losses in zip((eager, compiled), found, strict=True):
            recipe.zero_grad()
            losses["loss"].backward()
            recipe.after_step(step)
        torch.testing.assert_close(gradients(compiled), gradients(eager), rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))
        made.append(len(graphs))
    assert len({eager.schedules["teacher_temp"](step) for step in range(4)}) > 2
    assert made[0] and made[1] == made[3]


def test_backbones_that_do_not_fit_are_refused():
    class WithBatchNorm(nn.Module):
        embed_dim, patch_size = 8, 4

        def __init__(self, drop_path_rate: float = 0.0) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def encode(self, crops, masks): ...

    with pytest.raises(ValueError, match=r"cannot train batch norms \(norm\)"):
        make_recipe(backbone=WithBatchNorm)
    with pytest.raises(ValueError, match="Linear has no encode"):
        make_recipe(backbone=lambda **_: nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="global_crops_size 16 x 16 is not a multiple of the patch size 6"
    ):
        make_recipe(backbone=make_backbone("plain", img_size=12, patch_size=6))


# Start from given weights.


def published_teacher(recipe) -> dict:
    state = recipe.teacher.state_dict()
    return {"teacher": {name: torch.randn_like(value) for name, value in state.items()}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_file_gives_backbone_and_heads(tmp_path, family):
    recipe = make_recipe(family, separate_head=True)
    content = published_teacher(recipe)
    torch.save(content, tmp_path / "teacher_checkpoint.pth")
    recipe.load_weights(str(tmp_path / "teacher_checkpoint.pth"))
    for parts in (recipe.student, recipe.teacher):
        for name, value in parts.state_dict().items():
            assert torch.equal(value, content["teacher"][name])
    assert not any(p.requires_grad for p in recipe.teacher.parameters())


def test_a_backbone_file_leaves_the_heads(tmp_path):
    recipe = make_recipe()
    weights = {k: torch.randn_like(v) for k, v in recipe.exported.state_dict().items()}
    save_file(weights, tmp_path / "net.safetensors")
    head = recipe.student["dino_head"].mlp[0].weight.clone()
    recipe.load_weights(str(tmp_path / "net.safetensors"))
    assert torch.equal(recipe.student["dino_head"].mlp[0].weight, head)
    assert torch.equal(recipe.teacher["backbone"].norm.weight, weights["norm.weight"])


def test_a_file_that_does_not_fit_says_why(tmp_path):
    torch.save(published_teacher(make_recipe(separate_head=True)), tmp_path / "two.pth")
    with pytest.raises(
        ValueError, match="two.pth: has dino_head and ibot_head.*separate_head=true"
    ):
        make_recipe().load_weights(str(tmp_path / "two.pth"))
    content = published_teacher(make_recipe(dino_head=HEAD | {"num_prototypes": 32}))
    content["teacher"].pop("dino_head.mlp.2.bias")
    torch.save(content, tmp_path / "other.pth")
    said = (
        r"other.pth: dino_head: .*missing: mlp.2.bias; .*weight_g \(32, 1\) in the file, \(24, 1\)"
    )
    with pytest.raises(ValueError, match=said):
        make_recipe().load_weights(str(tmp_path / "other.pth"))
    content = published_teacher(make_recipe())
    content["teacher"]["backbone.extra"] = torch.zeros(1)
    torch.save(content, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="left over: .*extra"):
        make_recipe().load_weights(str(tmp_path / "more.pth"))


def test_a_network_without_stochastic_depth_is_told_of_none():
    told = []

    def backbone(**keywords):
        told.append(keywords)
        return make_backbone("plain")(**keywords)

    make_recipe(backbone=backbone, drop_path_rate=None)
    make_recipe(backbone=backbone, drop_path_rate=0.2)
    assert told == [{}, {}, {"drop_path_rate": 0.2}, {"drop_path_rate": 0.0}]
