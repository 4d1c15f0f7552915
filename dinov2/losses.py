"""Losses of DINOv2: DINO on class tokens, iBOT on masked patches, KoLeo on features.

Caron et al. 2021 (DINO), Zhou et al. 2022 (iBOT), Sablayrolles et al. 2019 (KoLeo). Targets are
probabilities (see `dinov2.centering`), students are logits; everything is computed in float32 at
least. Letters in shapes: S student crops, T teacher crops, B images, M masked patches, K
prototypes, D channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from utils.precision import at_least_float32


class _CrossEntropy(torch.autograd.Function):
    """-sum_k teacher log softmax(student / temperature): logits [S B K], teacher [B K] to [S B].

    Saves memory: of size [S B K] only the logits are kept and only their gradient is made. Softmax
    is computed one slice [B K] at a time, in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        found = student.new_zeros(student.shape[:-1], dtype=at_least_float32(student[:0]).dtype)
        for logits, out in zip(student, found, strict=True):
            log_probs = F.log_softmax(at_least_float32(logits) / temperature, dim=-1)
            out.sub_(log_probs.mul_(teacher).sum(dim=-1))
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher = ctx.saved_tensors
        mass = teacher.sum(dim=-1, keepdim=True)
        d_student = torch.empty_like(student)
        for logits, slope, out in zip(student, grad / ctx.temperature, d_student, strict=True):
            probs = torch.softmax(at_least_float32(logits) / ctx.temperature, dim=-1)
            out.copy_(probs.mul_(mass).sub_(teacher).mul_(slope[:, None]))
        return d_student, None, None


class CrossEntropy(nn.Module):
    """`_CrossEntropy` as a module, which can be compiled into few kernels for all slices."""

    def forward(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Logits [S B K] and targets [B K] to [S B]."""
        if not torch.compiler.is_compiling():
            return _CrossEntropy.apply(student, teacher, temperature)
        # Compiled, this too makes no float32 copy and keeps only the logits, without the loop.
        scores = at_least_float32(student) / temperature
        return ((scores.logsumexp(dim=-1, keepdim=True) - scores) * teacher).sum(dim=-1)


def dino_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.1,
    cross_entropy: Callable[..., Tensor] = _CrossEntropy.apply,
) -> Tensor:
    """Cross entropy, averaged over images, summed over all pairs of a student and a teacher crop.

    student: logits [S B K]; teacher: probabilities [T B K].
    """
    # The sum over teachers first: it is linear, and the student's tensors are the large ones.
    return cross_entropy(student, teacher.sum(dim=0), temperature).sum(dim=0).mean()


def ibot_loss(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    num_images: int,
    *,
    temperature: float = 0.1,
    cross_entropy: Callable[..., Tensor] = _CrossEntropy.apply,
) -> Tensor:
    """Weighted cross entropy of masked patches, per image.

    student: logits [M K]; teacher: probabilities [M K]; weights: [M], for the mean over an image's
    patches 1 / number masked in the image; 0 for rows that only pad.
    """
    entropies = cross_entropy(student[None], teacher, temperature)[0]
    return (entropies * weights).sum() / num_images


def koleo_loss(features: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Minus the mean log distance of each row of [B D] to its nearest neighbour, all on the sphere.

    Spreads the features of a batch evenly. A single row is its own neighbour: a constant, the loss
    of a distance of about `eps`, without a gradient.
    """
    with torch.autocast(device_type=features.device.type, enabled=False):
        features = at_least_float32(features)
        features = F.normalize(features, eps=eps, dim=-1)
        with torch.no_grad():
            similarity = features @ features.T
            # Not -1, which an opposite row has as well: the row would be its own neighbour.
            nearest = similarity.fill_diagonal_(-torch.inf).argmax(dim=1)
        distance = (features - features[nearest] + eps).norm(dim=-1)
        return -torch.log(distance + eps).mean()
