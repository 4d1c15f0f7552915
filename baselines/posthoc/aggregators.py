"""Join the T copies of one image into one result, independent of the order of the copies.

An aggregator of level `embedding` joins the inputs of the head, one of level `logit` its outputs.
Each obeys f(P z) = f(z) for every permutation P of the copies, which makes the classifier around it
invariant. `form` is `sound`, or `published` where the published formula has a fault.

Letters in shapes: B images, T copies, D channels of an embedding or a logit, C classes.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.ranges import OutOfRange, check_count, check_counts, check_word

FORMS = ("sound", "published")
LEVELS = ("embedding", "logit")
EPSILON = 1e-8  # of the published log-odds


class Aggregator(nn.Module):
    """Base: joins copies [B T D] to [B D]; `level`: embedding (inputs of the head) or logit."""

    level = "embedding"
    forms: tuple[str, ...] = ("sound",)

    def __init__(self, *, form: str = "sound") -> None:
        super().__init__()
        check_word("form", form, FORMS)
        # For most aggregators the published form has no fault.
        self.form = form if form in self.forms else "sound"

    def extra_repr(self) -> str:
        """The form that is computed."""
        return f"form={self.form!r}"

    @property
    def learned(self) -> bool:
        """Whether there are parameters to train."""
        return any(True for _ in self.parameters())


class Mean(Aggregator):
    """The mean embedding."""

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T D] to [B D]."""
        return z.mean(dim=1)


class Max(Aggregator):
    """The largest value of each component."""

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T D] to [B D]."""
        return z.max(dim=1).values


class Sum(Aggregator):
    """The sum of embeddings; equivalent to the mean for a head that begins with a LayerNorm."""

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T D] to [B D]."""
        return z.sum(dim=1)


class MeanLogits(Aggregator):
    """The mean of logits: test-time augmentation."""

    level = "logit"

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T C] to [B C]."""
        return z.mean(dim=1)


class MostProbable(Aggregator):
    """log p, p the normalised product of the copies' probabilities at temperature T // 2.

    Computed as softmax(sum_t l_t / (T // 2)), in which the normalisers of the copies cancel, so it
    neither underflows nor divides by zero for T = 1. `published` gives
    log((p + 1e-8) / (1 - p + 1e-8)), which has the same class, but whose softmax is not p.
    Departs from the published code, which multiplies probabilities: their product is 0 in float32
    for many classes or copies.
    """

    level = "logit"
    forms = FORMS

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T C] to [B C]."""
        temperature = max(1, z.shape[1] // 2)
        scores = z.sum(dim=1) / temperature
        if self.form == "sound":
            return scores.log_softmax(dim=-1)
        p = scores.softmax(dim=-1)
        return torch.log((p + EPSILON) / (1 - p + EPSILON))


class MostCertain(Aggregator):
    """The logits of the copy whose most probable class is the most probable of all.

    `published` takes for each class the logit of the copy that gives this class the highest
    probability: a patchwork of several copies, which the paper's text does not describe.
    """

    level = "logit"
    forms = FORMS

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T C] to [B C]."""
        if self.form == "published":
            return z.gather(1, z.softmax(dim=-1).argmax(dim=1, keepdim=True))[:, 0]
        # Probabilities near 1 round to 1; then the first such copy would win, not the most certain.
        top, best = z.max(dim=-1, keepdim=True)
        log_odds = top[..., 0] - z.scatter(-1, best, -torch.inf).logsumexp(dim=-1)
        copy = log_odds.argmax(dim=1)
        return z[torch.arange(len(z), device=z.device), copy]


class LearnedScore(Aggregator):
    """A weighted mean, sum_t w_t z_t, w the softmax over t of a two-layer score of z_t.

    `published` divides the scores by their sum, which may have either sign or be near zero.
    """

    forms = FORMS

    def __init__(self, dim: int, *, hidden_dim: int = 128, form: str = "sound") -> None:
        super().__init__(form=form)
        check_counts(1, dim=dim, hidden_dim=hidden_dim)
        self.fc = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T D] to [B D]."""
        return (z * self.weights(z)).sum(dim=1)

    def weights(self, z: Tensor) -> Tensor:
        """The weight of each copy [B T 1]."""
        scores = self.fc(z)
        if self.form == "published":
            return scores / scores.sum(dim=1, keepdim=True)
        return scores.softmax(dim=1)


class LearnedAttention(Aggregator):
    """A class token that attends to the copies, which have no positions, layer by layer.

    x = x + MHA1(n), n = LN1(x); x = ReLU(LN2(x)), which replaces the residual stream; x = x +
    MHA2(x). Departs from the published constructor: `hidden_dim` and `dropout`, which had no
    effect, are gone.
    """

    def __init__(
        self, dim: int, *, num_heads: int = 4, num_layers: int = 2, form: str = "sound"
    ) -> None:
        super().__init__(form=form)
        check_counts(1, dim=dim, num_heads=num_heads)
        check_count("num_layers", num_layers)
        if dim % num_heads:
            raise ValueError(f"embeddings of {dim} channels do not split into {num_heads} heads")
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.transformer = nn.ModuleList(CopyAttention(dim, num_heads) for _ in range(num_layers))

    def forward(self, z: Tensor) -> Tensor:
        """Join [B T D] to [B D]."""
        x = torch.cat([self.cls_token.expand(len(z), -1, -1).to(z.dtype), z], dim=1)
        for layer in self.transformer:
            x = layer(x)
        return x[:, 0]


class CopyAttention(nn.Module):
    """One layer of `LearnedAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(dim)
        self.attn1 = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.layer_norm_2 = nn.LayerNorm(dim)
        self.attn2 = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B 1+T D] to tokens."""
        n = self.layer_norm_1(x)
        x = x + self.attn1(n, n, n, need_weights=False)[0]
        x = torch.relu(self.layer_norm_2(x))
        return x + self.attn2(x, x, x, need_weights=False)[0]


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "mean": Mean,
    "max": Max,
    "sum": Sum,
    "mean_logits": MeanLogits,
    "most_probable": MostProbable,
    "most_certain": MostCertain,
    "learned_score": LearnedScore,
    "learned_attention": LearnedAttention,
}
LEARNED = ("learned_score", "learned_attention")


def make_aggregator(
    name: str | Aggregator, dim: int | None = None, *, form: str = "sound", **options: Any
) -> Aggregator:
    """The aggregator of that name; `dim` is the embedding's width, needed where it learns.

    An aggregator that was built elsewhere is copied, so that no two nets share its weights.
    options: `hidden_dim` of learned_score, `num_heads` and `num_layers` of learned_attention.
    """
    if isinstance(name, Aggregator):
        check_word(f"level of {type(name).__name__}", name.level, LEVELS)
        return copy.deepcopy(name)
    check_word("aggregator", name, AGGREGATORS)
    check_word("form", form, FORMS)
    if name not in LEARNED:
        if options:
            raise ValueError(f"aggregator {name} takes no {', '.join(options)}")
        return AGGREGATORS[name](form=form)
    if dim is None:
        raise ValueError(f"aggregator {name} needs its option dim, the width of the head's input")
    known = {"learned_score": {"hidden_dim"}, "learned_attention": {"num_heads", "num_layers"}}
    unknown = options.keys() - known[name]
    if unknown:
        raise ValueError(
            f"aggregator {name} takes no {', '.join(sorted(unknown))}; known: "
            f"{', '.join(sorted(known[name]))}"
        )
    try:
        return AGGREGATORS[name](dim, form=form, **options)
    except OutOfRange as error:
        raise OutOfRange(f"aggregator_options.{error}") from error
