"""Losses are least where they should be, harmless on small batches, in float32 at least."""

import math

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from dinov2.losses import CrossEntropy, dino_loss, ibot_loss, koleo_loss


def test_dino_loss_is_least_for_equal_distributions():
    logits = torch.randn(1, 4, 6, dtype=torch.float64)
    teacher = (logits / 0.1).softmax(dim=-1)
    least = dino_loss(logits, teacher)
    assert least < dino_loss(logits + 0.1 * torch.randn_like(logits), teacher)
    entropy = torch.special.entr(teacher).sum(dim=-1).mean()
    torch.testing.assert_close(least, entropy)


def test_dino_loss_sums_over_pairs_of_crops():
    student, teacher = torch.randn(3, 4, 6), torch.randn(2, 4, 6).softmax(dim=-1)
    pairs = [dino_loss(s[None], t[None]) for s in student for t in teacher]
    torch.testing.assert_close(dino_loss(student, teacher), sum(pairs))


def test_rows_of_weight_zero_do_not_count():
    student, teacher = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6).softmax(dim=-1)
    weights = torch.tensor([0.5, 0.5, 1.0, 0.0, 0.0])
    loss = ibot_loss(student, teacher, weights, 2)
    loss.backward()
    torch.testing.assert_close(loss, ibot_loss(student[:3], teacher[:3], weights[:3], 2))
    assert not student.grad[3:].any()


def test_ibot_loss_is_the_mean_over_images_of_the_mean_over_their_patches():
    student, logits = torch.randn(2, 5, 6, dtype=torch.float64)
    teacher, images = logits.softmax(dim=-1), ([0, 1, 2], [3, 4])
    weights = torch.tensor([1 / len(rows) for rows in images for _ in rows], dtype=torch.float64)
    entropies = -(teacher * (student / 0.1).log_softmax(dim=-1)).sum(dim=-1)
    expected = torch.stack([entropies[rows].mean() for rows in images]).mean()
    torch.testing.assert_close(ibot_loss(student, teacher, weights, 2), expected)


def test_koleo_is_of_the_distance_to_the_nearest_row_on_the_sphere():
    x = torch.randn(7, 4, dtype=torch.float64)
    unit = x / x.norm(dim=-1, keepdim=True)
    distances = (unit[:, None] - unit).norm(dim=-1).fill_diagonal_(torch.inf)
    expected = -distances.amin(dim=-1).log().mean()
    torch.testing.assert_close(koleo_loss(x), expected, rtol=1e-5, atol=1e-5)


def test_koleo_spreads_features():
    x = torch.randn(6, 4, requires_grad=True)
    loss = koleo_loss(x)
    (step,) = torch.autograd.grad(loss, x)
    assert koleo_loss(x - 0.01 * step) < loss
    torch.testing.assert_close(koleo_loss(3 * x), loss)


def test_koleo_of_one_row_is_of_no_distance_without_a_gradient():
    x = torch.randn(1, 4, requires_grad=True)
    koleo_loss(x).backward()
    torch.testing.assert_close(koleo_loss(x).item(), -math.log(1e-8 * (1 + 4**0.5)))
    assert not x.grad.any()


def test_koleo_of_opposite_rows_is_of_their_distance():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(koleo_loss(x), -torch.tensor(2.0).log())


def test_koleo_of_equal_rows_is_finite():
    x = torch.ones(3, 4, requires_grad=True)
    koleo_loss(x).backward()
    assert koleo_loss(x).isfinite() and x.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened(autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        student = torch.randn(2, 3, 6).bfloat16()
        teacher = torch.randn(2, 3, 6).softmax(dim=-1)
        assert dino_loss(student, teacher).dtype == torch.float32
        assert koleo_loss(student[0]).dtype == torch.float32


def test_cross_entropy_has_the_gradient_of_its_definition():
    student = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(4, 6, dtype=torch.float64).softmax(dim=-1)
    assert torch.autograd.gradcheck(lambda s: dino_loss(s, teacher[None]), [student])
    log_probs = (student / 0.1).log_softmax(dim=-1)
    torch.testing.assert_close(
        dino_loss(student, teacher[None]), -(teacher * log_probs).sum(dim=(0, -1)).mean()
    )


def test_of_the_students_logits_nothing_is_kept_twice():
    student = torch.randn(3, 4, 64).bfloat16().requires_grad_()
    teacher = torch.randn(1, 4, 64).softmax(dim=-1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = dino_loss(student, teacher)
    large = [t for t in kept if t.numel() == student.numel()]
    assert len(large) == 1 and large[0].data_ptr() == student.data_ptr()
    loss.backward()
    assert student.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("crops", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_compiled_nothing_wide_is_made_nor_kept(crops):
    """The same numbers; of the logits' size there is the gradient alone, as narrow as they are."""
    student = torch.randn(crops, 4, 96).bfloat16().requires_grad_()
    teacher = torch.randn(4, 96).softmax(dim=-1)
    module, kept = CrossEntropy(), []
    expected = module(student, teacher, 0.1)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    module.compile(fullgraph=True)

    def compiled():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            entropies = module(student, teacher, 0.1)
        return entropies, *torch.autograd.grad(entropies.sum(), student)

    (entropies, found), code = run_and_get_code(compiled)
    torch.testing.assert_close(entropies, expected)
    torch.testing.assert_close(found, gradient)
    large = {t.data_ptr() for t in kept if t.numel() >= teacher.numel()}
    assert large == {student.data_ptr(), teacher.data_ptr()}
    shape = f"= empty_strided_cpu(({crops}, 4, 96), "
    made = [line for text in code for line in text.splitlines() if shape in line]
    assert len(made) == 1 and "torch.bfloat16" in made[0]
