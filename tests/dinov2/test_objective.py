"""What a step optimises, written out crop by crop as the papers say it."""

import pytest
import torch
from torch import Tensor

from dinov2.recipe import DINOv2
from dinov2.schedules import Schedules
from tests.dinov2.tiny import HEAD, make_batch, make_recipe, to_double

STUDENT_TEMPERATURE = 0.1
WEIGHTS = {"dino_loss_weight": 2.0, "ibot_loss_weight": 3.0, "koleo_loss_weight": 0.5}


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """Of logits [B K] and probabilities [B K], by row."""
    return -(target * (student / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)


def koleo(features: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest other row, on the sphere."""
    unit = torch.nn.functional.normalize(features)
    apart = (unit[:, None] - unit).norm(dim=-1) + torch.diag(torch.full((len(unit),), torch.inf))
    return -apart.amin(dim=1).log().mean()


def by_definition(recipe, batch, step: int) -> Tensor:
    """The weighted sum of all three losses; every crop goes through the network alone."""
    temperature = recipe.schedules["teacher_temp"](step)
    student, teacher = recipe.student, recipe.teacher
    patch_head = "ibot_head" if "ibot_head" in student else "dino_head"
    crops, masks = batch["global_crops"].chunk(2), batch["masks"].chunk(2)
    local = batch["local_crops"].chunk(recipe.crops.local_crops_number)
    shown = [student["backbone"].encode([c], [m])[0] for c, m in zip(crops, masks, strict=True)]
    with torch.no_grad():
        whole = [teacher["backbone"].encode([crop])[0] for crop in crops]
    logits = [student["dino_head"](seen.cls) for seen in shown]
    logits += [student["dino_head"](student["backbone"].encode([crop])[0].cls) for crop in local]

    def target(head: str, tokens: Tensor, center: Tensor) -> Tensor:
        return ((teacher[head](tokens) - center) / temperature).softmax(-1).detach()

    pairs = [
        cross_entropy(theirs, target("dino_head", seen.cls, recipe.dino_targets.ema.center)).mean()
        for told, seen in enumerate(whole)
        for place, theirs in enumerate(logits)
        if place != told  # no crop is compared with itself
    ]
    images = []  # of every image whose patches are hidden, the mean over these patches
    for ours, theirs, hidden in zip(shown, whole, masks, strict=True):
        for own, goal, mask in zip(ours.patches, theirs.patches, hidden, strict=True):
            told = target(patch_head, goal[mask], recipe.ibot_targets.ema.center)
            found = cross_entropy(student[patch_head](own[mask]), told)
            images.append(found.sum() / mask.sum().clamp(min=1))
    dino, ibot = sum(pairs) / len(pairs), sum(images) / len(images)
    spread = sum(koleo(seen.cls) for seen in shown)
    return 2.0 * dino + 3.0 * ibot + 0.5 * spread


def randomise(recipe) -> None:
    """Student, teacher and centres apart from each other, and no part at zero."""
    for module in (recipe.student, recipe.teacher):
        for parameter in module.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    for targets in (recipe.dino_targets, recipe.ibot_targets):
        targets.ema.center.normal_(std=0.2)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("step", [0, 2])
def test_a_step_optimises_the_definition(separate, step):
    recipe = make_recipe(separate_head=separate, ibot_head=HEAD, **WEIGHTS).double()
    randomise(recipe)
    batch = to_double(make_batch(recipe, 4))
    found = recipe.losses(batch, step)["loss"]
    expected = by_definition(recipe, batch, step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    parameters = list(recipe.student.parameters())
    pairs = zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True)
    for ours, theirs in pairs:
        # KoLeo adds 1e-8 to its distances, which the definition does not.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_centres_follow_whole_crops_and_hidden_patches_alone():
    """The rows that pad a batch to its shape are of no patch that is hidden."""
    recipe = make_recipe().double()
    randomise(recipe)
    batch = to_double(make_batch(recipe, 4))
    assert batch["masks"].sum() < len(batch["mask_indices"])
    (whole,) = recipe.teacher["backbone"].encode([batch["global_crops"]])
    told = {"dino_targets": whole.cls, "ibot_targets": whole.patches[batch["masks"]]}
    expected = {}
    for name, tokens in told.items():
        mean = recipe.teacher["dino_head"](tokens).detach().mean(dim=0)
        expected[name] = 0.9 * getattr(recipe, name).ema.center + 0.1 * mean
    recipe.losses(batch, 0)
    recipe.after_step(0)
    for name, center in expected.items():
        torch.testing.assert_close(getattr(recipe, name).ema.center, center)


def test_the_teacher_follows_at_the_momentum_of_the_step():
    recipe = make_recipe(schedules=Schedules(warmup_epochs=0, momentum=(0.5, 1.0))).double()
    for step in (0, 6):
        randomise(recipe)
        momentum = recipe.schedules["momentum"](step)
        before = [p.clone() for p in recipe.teacher.parameters()]
        recipe.after_step(step)
        pairs = zip(before, recipe.student.parameters(), recipe.teacher.parameters(), strict=True)
        for old, student, teacher in pairs:
            torch.testing.assert_close(teacher, momentum * old + (1 - momentum) * student.detach())


def test_a_term_on_the_tokens_takes_no_second_pass(monkeypatch):
    class Spread(DINOv2):
        def losses_of(self, encoded, targets, batch):
            losses, term = super().losses_of(encoded, targets, batch), encoded[1].cls.var(0).mean()
            return losses | {"loss": losses["loss"] - term, "spread": term.detach()}

    torch.manual_seed(0)
    plain = make_recipe()
    torch.manual_seed(0)
    ours = make_recipe(kind=Spread)
    batch = make_batch(ours)
    net, passes = ours.student["backbone"], []
    encode = net.encode
    monkeypatch.setattr(net, "encode", lambda *args: passes.append(encode(*args)) or passes[-1])
    found = ours.losses(batch, 0)
    assert [len(crops.cls) for crops in passes[0]] == [6, 6] and len(passes) == 1
    spread = passes[0][1].cls.var(0).mean()
    torch.testing.assert_close(found["loss"], plain.losses(batch, 0)["loss"] - spread)
    torch.testing.assert_close(found["spread"], spread.detach())
