"""Every row of the published cost tables of Expedit-SWAG (Liang et al. 2022), as stated there.

GFLOPs are multiply-adds by the rules of `baselines.token_reduction.costs`. "FPS" is taken as
batch 1, "Throughput" as a large batch, on a GPU that is not named.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

L16, H14 = "swag_vit_l16_in1k", "swag_vit_h14_in1k"
BASE = "base"


class Stated(NamedTuple):
    """The figures of a row."""

    gflops: float
    fps: float
    throughput: float  # images per second
    accuracy: float  # top-1 on ImageNet in percent, with the published weights


class Free(NamedTuple):
    """A cost that depends on weights and image: the count of the closed form, solved for.

    ACT: clusters, the mean over blocks; ATS: tokens behind its block.
    """

    solution: int  # gives the stated GFLOPs
    least: int  # from here to `most` within 1 % of them
    most: int


class Row(NamedTuple):
    """One row: options are keywords of the reducer, which its preset `published` completes."""

    method: str  # of `baselines.token_reduction.presets`, or BASE
    model: str
    options: Mapping[str, Any]
    stated: Stated
    free: Free | None = None


ROWS = (
    Row("base", L16, {}, Stated(364.8, 12.7, 14.7, 88.1)),
    Row("hourglass", L16, {"location": 12, "num_clusters": 529}, Stated(275.8, 15.8, 19.5, 87.8)),
    Row("hourglass", L16, {"location": 6, "num_clusters": 529}, Stated(228.5, 19.4, 24.3, 87.7)),
    Row("hourglass", L16, {"location": 8, "num_clusters": 256}, Stated(179, 23.3, 29.7, 87.2)),
    Row("evit", L16, {"keep_rate": 0.8}, Stated(264.9, 17.4, 20.1, 87.9)),
    Row("evit", L16, {"keep_rate": 0.7}, Stated(227.1, 19.7, 23.5, 87.8)),
    Row("evit", L16, {"keep_rate": 0.5}, Stated(170.2, 24.9, 31, 87.1)),
    Row("tome", L16, {"r": 10}, Stated(317.5, 13.8, 15.7, 88)),
    Row("tome", L16, {"r": 20}, Stated(271.2, 16.2, 18.9, 87.9)),
    Row("tome", L16, {"r": 40}, Stated(184.3, 22.7, 28.1, 87.7)),
    Row("act", L16, {"query_hashes": 16}, Stated(333.5, 9.5, 13, 85.1), Free(417, 354, 479)),
    Row("act", L16, {"query_hashes": 20}, Stated(341.8, 9.2, 12.4, 87.3), Free(572, 508, 636)),
    Row("act", L16, {"query_hashes": 24}, Stated(346.2, 9, 11.9, 87.8), Free(653, 588, 718)),
    Row("act", L16, {"query_hashes": 32}, Stated(352.5, 8.8, 11.3, 88), Free(769, 702, 835)),
    Row("ats", L16, {"locations": [20]}, Stated(323.3, 14, 16.2, 84), Free(280, 216, 342)),
    Row("ats", L16, {"locations": [18]}, Stated(306.2, 14.8, 17.1, 80.4), Free(353, 315, 391)),
    Row("ats", L16, {"locations": [16]}, Stated(292.1, 15.5, 17.9, 76), Free(415, 389, 441)),
    Row("evo_vit", L16, {"location": 18, "keep_rate": 0.4}, Stated(307, 14.8, 17.2, 87.6)),
    Row("evo_vit", L16, {"location": 8, "keep_rate": 0.6}, Stated(259.1, 17.7, 19.7, 86.3)),
    Row("evo_vit", L16, {"location": 8, "keep_rate": 0.4}, Stated(210.6, 20.8, 25, 84)),
    Row("smyrf", L16, {"start": 12, "query_cluster_size": 64}, Stated(392, 6.01, 6.66, 86.5)),
    Row("smyrf", L16, {"start": 12, "query_cluster_size": 32}, Stated(365.6, 6.54, 7.32, 86.3)),
    Row("smyrf", L16, {"start": 12, "query_cluster_size": 16}, Stated(352.4, 6.64, 7.48, 86)),
    Row("base", H14, {}, Stated(1023.2, 5, 5.3, 88.5)),
    Row("hourglass", H14, {"location": 10, "num_clusters": 676}, Stated(652.4, 7.4, 8.4, 88.4)),
    Row("hourglass", H14, {"location": 4, "num_clusters": 625}, Stated(514.1, 9.8, 11, 87.6)),
    Row("hourglass", H14, {"location": 8, "num_clusters": 324}, Stated(422.7, 11.2, 13.1, 87.4)),
    Row("evit", H14, {"keep_rate": 0.7}, Stated(632.3, 8, 8.6, 88.4)),
    Row("evit", H14, {"keep_rate": 0.6}, Stated(544.4, 9.2, 10, 88.3)),
    Row("evit", H14, {"keep_rate": 0.5}, Stated(472, 10.3, 11.5, 88)),
    Row("tome", H14, {"r": 10}, Stated(890, 5.3, 5.9, 88.5)),
    Row("tome", H14, {"r": 20}, Stated(760, 6.3, 7.1, 88.4)),
    Row("tome", H14, {"r": 40}, Stated(516.9, 9.2, 10.7, 88.2)),
    Row("act", H14, {"query_hashes": 16}, Stated(923.3, 4.4, 5, 83.8), Free(496, 417, 574)),
    Row("act", H14, {"query_hashes": 20}, Stated(943.5, 4.3, 4.8, 87.5), Free(667, 587, 748)),
    Row("act", H14, {"query_hashes": 24}, Stated(956, 4.2, 4.6, 88.2), Free(772, 691, 854)),
    Row("act", H14, {"query_hashes": 32}, Stated(978.5, 4.1, 4.4, 88.5), Free(962, 878, 1045)),
    Row("ats", H14, {"locations": [18]}, Stated(731.4, 6.8, 7.2, 88), Free(499, 475, 522)),
    Row("ats", H14, {"locations": [16]}, Stated(693.4, 7.3, 7.7, 87.5), Free(513, 494, 532)),
    Row("ats", H14, {"locations": [14]}, Stated(676.3, 7.1, 7.3, 87.1), Free(576, 560, 592)),
    Row("evo_vit", H14, {"location": 16, "keep_rate": 0.6}, Stated(799.8, 6, 6.6, 88.1)),
    Row("evo_vit", H14, {"location": 14, "keep_rate": 0.5}, Stated(713.5, 6.8, 7.5, 87.4)),
    Row("evo_vit", H14, {"location": 14, "keep_rate": 0.3}, Stated(602, 8.1, 8.9, 85.6)),
    Row("smyrf", H14, {"start": 16, "query_cluster_size": 64}, Stated(1063.8, 2.77, 2.87, 87.3)),
    Row("smyrf", H14, {"start": 16, "query_cluster_size": 32}, Stated(1005.3, 2.84, 3.01, 87.4)),
    Row("smyrf", H14, {"start": 16, "query_cluster_size": 16}, Stated(975.98, 2.89, 3.04, 87.2)),
)
