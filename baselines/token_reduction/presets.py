"""The seven methods by name, each in its sound and in its published form."""

import inspect
from typing import Any

from baselines.token_reduction.act import ClusteredAttention
from baselines.token_reduction.ats import AdaptiveSampling
from baselines.token_reduction.clustering import Hourglass
from baselines.token_reduction.evit import EViT
from baselines.token_reduction.evo_vit import EvoViT
from baselines.token_reduction.options import FORMS
from baselines.token_reduction.reducer import Reducer
from baselines.token_reduction.smyrf import Smyrf
from baselines.token_reduction.tome import ToMe
from utils.ranges import OutOfRange, check_word

METHODS: dict[str, type[Reducer]] = {
    "hourglass": Hourglass,
    "evit": EViT,
    "tome": ToMe,
    "evo_vit": EvoViT,
    "ats": AdaptiveSampling,
    "act": ClusteredAttention,
    "smyrf": Smyrf,
}
# What Expedit-SWAG computes, where it differs from the defaults of the constructors.
PUBLISHED: dict[str, dict[str, Any]] = {
    "hourglass": {"reconstruction": "l2"},
    "evit": {"score": "all", "fuse_token": False, "exact_counts": False},
    "tome": {"weighs_mean": False},
    "evo_vit": {"fast_update": False},
    "ats": {"residual": "normed", "mask_padding": False},
    "act": {"form": "published", "seed": None},
    "smyrf": {"form": "published", "seed": None},
}


def make_reducer(method: str | Reducer, /, form: str = "sound", **options: Any) -> Reducer:
    """The reducer of that name: hourglass, evit, tome, evo_vit, ats, act, smyrf.

    A reducer that was built elsewhere, with its options, is returned unchanged.

    form: "sound", the form of the original papers without the faults of Expedit-SWAG; or
        "published", what Expedit-SWAG computes and the published rows were measured with.
    options: keywords of the reducer's class; they override those of the form.
    """
    if isinstance(method, Reducer):
        return method
    check_word("method", method, METHODS)
    check_word("form", form, FORMS)
    known = inspect.signature(METHODS[method]).parameters
    strange = sorted(set(options) - set(known))
    if strange:
        raise ValueError(
            f"{method} takes no {', '.join(strange)} (known: {', '.join(sorted(known))})"
        )
    preset = PUBLISHED.get(method, {}) if form == "published" else {}
    try:
        return METHODS[method](**{**preset, **options})
    except OutOfRange as error:
        raise OutOfRange(f"options.{error}") from error
