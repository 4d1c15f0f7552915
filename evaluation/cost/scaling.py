"""Model the time of a step on many GPUs, with the bytes that ranks send measured here.

The model is arithmetic on stated assumptions, not a measurement: operations over a sustained rate,
bytes over bandwidths, messages times latency. See docs/scaling.md for the formulas.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from evaluation.cost import traffic
from evaluation.cost.settings import whole_numbers
from evaluation.results import print_table
from utils.communication import Part, sent_bytes, step_payload
from utils.config.build import plain
from utils.config.check import networks
from utils.config.compose import compose_config
from utils.errors import UserError
from utils.flops import count_one_image
from utils.ranges import check_count, check_range

LAYOUTS = ("replicate", "shard", "hybrid")
WIDTH = 2  # bytes of a parameter that is sent, bfloat16
GATHERINGS = 3  # of a sharded unit: student's forward and backward pass, teacher's forward pass
NETS = {"octic": "hybrid_dinov2_vit_small_patch16", "plain": "dinov2_vit_small_patch16"}
SMALL = [
    *("backbone.embed_dim=64", "backbone.depth=4", "backbone.num_heads=4", "device=cpu"),
    *("recipe.batch_size_per_gpu=4", "recipe.accumulation=2", "recipe.crops.local_crops_number=2"),
    "recipe.dino_head={num_prototypes: 128, hidden_dim: 64, bottleneck_dim: 32}",
    *("probes.knn=null", "probes.linear=null", "probes.segmentation=null"),
]


class Cluster(NamedTuple):
    """Assumptions about the machines; rates are what one GPU gets, in either direction."""

    gpus_per_node: int
    tflops: float  # sustained, of 10^12 floating-point operations per second
    node_gb_s: float  # between the GPUs of a node, 10^9 bytes per second
    network_gb_s: float  # between nodes
    latency_us: float  # of one message


class Work(NamedTuple):
    """The work of one step, which does not depend on the number of GPUs."""

    operations_per_image: float  # forward and backward, of student and teacher
    parts: list[Part]
    num_units: int  # collectives of a pass: blocks, and what is outside of them


class Step(NamedTuple):
    """Seconds of a step on `gpus` GPUs: computing, sending, and both, one after the other."""

    gpus: int
    layout: str
    micro_batches: int
    compute_s: float
    send_s: float

    @property
    def apart_s(self) -> float:
        """Seconds of a step without overlap of computing and sending."""
        return self.compute_s + self.send_s

    @property
    def together_s(self) -> float:
        """Seconds of a step with full overlap of computing and sending."""
        return max(self.compute_s, self.send_s)


def predict(work: Work, cluster: Cluster, layout: str, gpus: int, *, batch: int, most: int) -> Step:
    """One step of `batch` images on `gpus` GPUs, with at most `most` images on a GPU at a time."""
    own = batch / gpus
    micro_batches = math.ceil(own / most)
    compute = own * work.operations_per_image / (cluster.tflops * 1e12)
    node = min(cluster.gpus_per_node, gpus)
    payload = step_payload(work.parts, layout, micro_batches=micro_batches, width=WIDTH)
    if layout == "hybrid":
        groups = {"all_gather": node, "reduce_scatter": node, "all_reduce": gpus // node}
        payload["all_reduce"] //= node  # each GPU of a node reduces its shard
    else:
        groups = dict.fromkeys(payload, gpus)
    seconds = 0.0
    for kind, size in payload.items():
        within = groups[kind] <= cluster.gpus_per_node and not (
            layout == "hybrid" and kind == "all_reduce"
        )
        rate = cluster.node_gb_s if within else cluster.network_gb_s
        seconds += sent_bytes(kind, size, groups[kind]) / (rate * 1e9)
        times = 1 if layout == "replicate" else micro_batches
        times *= GATHERINGS if kind == "all_gather" else 1
        hops = (groups[kind] - 1) * (2 if kind == "all_reduce" else 1)
        if size and hops:
            seconds += hops * work.num_units * times * cluster.latency_us * 1e-6
    return Step(gpus, layout, micro_batches, compute, seconds)


def work_of(file: str) -> tuple[Work, int]:
    """The work of a step of a DINOv2 run file, and the images that a GPU takes at a time.

    Operations of the heads are left out: they see few tokens.
    """
    content = plain(compose_config(file))
    net, recipe = networks(content)
    if not hasattr(recipe, "student"):
        raise UserError(f"{file}: the model of a step is of the DINOv2 recipe")
    crops = recipe.crops
    large = count_one_image(net, crops.global_crops_size, backward=False).forward
    small = count_one_image(net, crops.local_crops_size, backward=False).forward
    student = 2 * large + crops.local_crops_number * small
    again = 1 if content["training"]["activation_checkpointing"] else 0
    units = len(net.blocks) + len(recipe.student)  # the backbone outside its blocks, and heads
    work = Work((3 + again) * student + 2 * large, parts_of(recipe), units)
    return work, recipe.batch_size_per_gpu


def parts_of(recipe: Any) -> list[Part]:
    """What a DINOv2 recipe lets the loop send: the parts of the student and of the teacher."""
    return [
        Part(sum(p.numel() for p in module.parameters()), trained)
        for modules, trained in ((recipe.student, True), (recipe.teacher, False))
        for module in modules.values()
    ]


def measured(processes: Sequence[int]) -> list[list[Any]]:
    """Rows: net, processes, layout, and by collective the payload measured and by formula."""
    cases = [(net, layout) for net in NETS for layout in ("replicate", "shard")]
    configs = [
        plain(
            compose_config(
                "dinov2/quickstart.yaml",
                [f"backbone={NETS[net]}", *SMALL, f"training.sharding={layout}"],
            )
        )
        for net, layout in cases
    ]
    formula = [
        step_payload(parts_of(networks(config)[1]), layout, micro_batches=2)
        for config, (_, layout) in zip(configs, cases, strict=True)
    ]
    rows = []
    for count in processes:
        payloads = traffic.measure(configs, count)
        for (net, layout), expected, found in zip(cases, formula, payloads, strict=True):
            for kind in ("all_gather", "reduce_scatter", "all_reduce"):
                told, said = expected[kind], found[kind]
                ratio = f"{said / told:.3f}" if told else "-"
                if said or told:
                    rows.append([net, count, layout, kind, f"{said:,.0f}", f"{told:,.0f}", ratio])
    return rows


def show(words: argparse.Namespace) -> None:
    """Print the table that a command line (`evaluation.commands.scaling`) asks for."""
    _print_measured(words) if words.what == "measure" else _print_model(words)


def _print_measured(words: argparse.Namespace) -> None:
    counts = whole_numbers("--processes", words.processes)
    for count in counts:
        check_count("--processes", count, 2)  # one alone sends nothing
    columns = ["net", "processes", "layout", "collective", "measured\nbytes", "formula\nbytes"]
    protocol = (
        "payload of one optimiser step, gloo on this machine; dinov2/quickstart.yaml with a small "
        "net, 2 micro-batches per step, float32"
    )
    print_table("what a step sends", [*columns, "ratio"], measured(counts), protocol=protocol)


def _print_model(words: argparse.Namespace) -> None:
    batch, numbers = words.batch, whole_numbers("--gpus", words.gpus)
    rates = (words.tflops, words.node_gb_s, words.network_gb_s)
    for flag, rate in zip(("--tflops", "--node-gb-s", "--network-gb-s"), rates, strict=True):
        check_range(flag, rate, ends="()")
    for flag, count in (("--gpus-per-node", words.gpus_per_node), ("--batch", batch)):
        check_count(flag, count, 1)
    check_range("--latency-us", words.latency_us)
    cluster = Cluster(words.gpus_per_node, *rates, words.latency_us)
    for gpus in numbers:
        if batch % gpus or (gpus > cluster.gpus_per_node and gpus % cluster.gpus_per_node):
            raise UserError(f"--gpus {gpus}: must divide {batch} images and fill its nodes")
    work, most = work_of(words.config_file)
    rows = []
    for gpus in numbers:
        for layout in LAYOUTS if gpus > 1 else ("replicate",):
            step = predict(work, cluster, layout, gpus, batch=batch, most=most)
            ideal = batch * work.operations_per_image / (cluster.tflops * 1e12) / gpus
            rows.append(
                [
                    gpus,
                    layout if gpus > 1 else "-",
                    batch // gpus,
                    *(f"{1e3 * s:.0f}" for s in (step.compute_s, step.send_s)),
                    *(f"{1e3 * s:.0f}" for s in (step.together_s, step.apart_s)),
                    f"{100 * ideal / step.together_s:.0f} to {100 * ideal / step.apart_s:.0f}",
                ]
            )
    columns = ["GPUs", "layout", "images\nper GPU", "computing\nms", "sending\nms"]
    columns += ["step, all\noverlapped ms", "step, nothing\noverlapped ms", "efficiency\n%"]
    trained = sum(part.parameters for part in work.parts if part.trained)
    assumed = (
        f"{cluster.tflops:g} TFLOP/s sustained per GPU, {cluster.node_gb_s:g} GB/s within a node "
        f"of {cluster.gpus_per_node}, {cluster.network_gb_s:g} GB/s per GPU between nodes, "
        f"{cluster.latency_us:g} us per message, ring algorithm"
    )
    counted = (
        f"{trained / 1e6:.0f} M trained parameters, "
        f"{work.operations_per_image / 1e9:.0f} GFLOP per image, {batch} images per step"
    )
    title = f"model of a step: {words.config_file}"
    print_table(title, columns, rows, protocol=f"assumed: {assumed}; counted: {counted}")
