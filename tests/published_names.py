"""From our names of parameters to the published ones: what the loaders of weights undo."""

import re

from baselines.posthoc.keys import AGGREGATOR
from vit.keys import TOKENS


def published_vit_name(name: str, *, octic: bool = True, deit: bool = False) -> str:
    """The published name of one of our parameters, in DINOv2's or DeiT III's spelling."""
    if octic and name in TOKENS:
        return f"{name}.0"
    if deit:
        # The second of parallel branches.
        name = re.sub(r"(^|\.)ls([12])1(?=\.|$)", r"\1ls\2_1", name)
        return re.sub(r"(^|\.)ls([12](?:_1)?)(\.gamma)?(?=\.|$)", r"\1gamma_\2", name)
    return name


def published_posthoc_name(name: str, aggregator: str) -> str:
    """The published name of one of our parameters, for a learned aggregator of that name."""
    prefix = {"learned_score": "scoring_model.", "learned_attention": "aggregation_model."}
    if name.startswith(AGGREGATOR) and aggregator in prefix:
        return prefix[aggregator] + name.removeprefix(AGGREGATOR)
    return name
