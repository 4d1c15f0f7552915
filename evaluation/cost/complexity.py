"""Compare parameters, multiply-adds, speed and memory of nets with those of their plain twins."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.cost import machine
from evaluation.cost.counting import count_cost
from evaluation.cost.cross_check import Untraceable, count_with_fvcore, explain_difference
from evaluation.cost.models import (
    ALL,
    Group,
    Node,
    find_backbone,
    make_groups,
    make_net,
    own_size,
    registered,
)
from evaluation.cost.peaks import Peak, arithmetic_of, find_peak
from evaluation.cost.picture import draw_costs, heights
from evaluation.cost.published_table import measure_table
from evaluation.cost.settings import Settings, check_outputs, choose_device, read_settings
from evaluation.cost.table import Result, in_words, print_results, write_json
from evaluation.cost.timing import (
    Contestant,
    free_memory,
    measure_in_turn,
    ratio_of,
    speed_of,
    unless_out_of_memory,
)
from evaluation.progress import say
from utils import distributed
from utils.config.build import plain
from utils.flops import count_operations
from utils.joining import session
from utils.parallel import allow_variants
from utils.precision import float32_products_in
from utils.ranges import check_count


def measure(config: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the nets of `config["models"]`; reads the keys of configs/complexity.yaml.

    With `config["table"]` it measures the rows of that published table instead. Prints the table,
    and writes `json_file` and `picture_file` if they are given. Each pass of a group is printed,
    and the JSON written, as soon as it is measured; an interrupt prints the table of the passes
    measured so far. A net that runs out of memory is reported, and the others go on. Of several
    processes, the first measures and the others wait.
    UserError for invalid names and settings, and for operators without a formula.
    """
    config = dict(plain(config))
    name = choose_device(config["device"])
    with session("cpu" if name == "mps" else name) as found:
        device = torch.device("mps") if name == "mps" else found
        settings = read_settings(config, device)
        check_outputs(config)
        results: dict[str, Any] = {}
        if distributed.is_main():
            with _numerics(config["threads"], device):
                run = measure_table if config.get("table") else _measure
                results = run(config, settings)
        distributed.barrier()
    return results


def _measure(config: dict[str, Any], settings: Settings) -> dict[str, Result]:
    groups = make_groups(config["models"], config["twins"], size=settings.size)
    names = [name for group in groups for name in group.names]
    keywords = config["keywords"] or {}
    sizes = {name: settings.size or own_size(name, keywords.get(name)) for name in names}
    nodes = {
        name: find_backbone(name, size=sizes[name], keywords=keywords.get(name)) for name in names
    }
    if ALL in config["models"] and settings.size:
        others = ", ".join(name for name in registered() if name not in sizes)
        say(f"left out, as they are for images of another size: {others}")
    results = {}
    for group in groups:
        for name in group.names:
            say(f"counting {name}")
            cost = count_cost(name, nodes[name], size=sizes[name])
            twin = None if name == group.twin else group.twin
            results[name] = Result(name, twin, cost, sizes[name], keywords.get(name) or {})
    if config["picture_file"] and config["picture_y"] == "accuracy":
        heights(list(results.values()), "accuracy")  # raises now, not after the measurement
    protocol, peak = describe(settings, set(sizes.values()))
    if peak:
        _say_what_is_measured(config, settings, protocol, estimate_s(results, settings, peak))
    file = Path(config["json_file"]) if config["json_file"] else None

    def keep() -> None:
        if file:
            write_json(file, results, protocol, peak)

    try:
        for index, group in enumerate(groups):
            if settings.passes or config["operators"] or config["fvcore"]:
                say(f"group {index + 1} of {len(groups)}: {', '.join(group.names)}")
                _measure_group(group, nodes, results, config, settings, keep)
    except BaseException:  # also on an interrupt: print what was measured so far
        if any(result.speeds for result in results.values()):
            print_results(list(results.values()), settings, protocol, peak)
        raise
    print_results(list(results.values()), settings, protocol, peak)
    if file:
        keep()
        say(f"written: {file}")
    if config["picture_file"]:
        path = Path(config["picture_file"])
        draw_costs(list(results.values()), path, protocol, y=config["picture_y"])
        say(f"picture: {path}")
    return results


def _measure_group(
    group: Group,
    nodes: Mapping[str, Node],
    results: Mapping[str, Result],
    config: Mapping[str, Any],
    settings: Settings,
    keep: Callable[[], None],
) -> None:
    contestants = {}
    batches: dict[tuple[int, ...], torch.Tensor] = {}  # nets of one size share their images
    for name in group.names:
        place = partial(make_net, name, nodes[name], settings.device, seed=settings.seed)
        net = unless_out_of_memory(place)
        if net is None:
            results[name].lost += settings.passes
            say(f"{name}: not enough memory for its weights")
            continue
        size = results[name].size
        shape = (settings.batch_size, getattr(net, "in_chans", 3), size, size)
        if shape not in batches:
            batches[shape] = torch.randn(shape, device=settings.device)
        images = batches[shape]
        _count_as_it_runs(net, images[:1], results[name], config, settings)
        contestants[name] = Contestant(
            net, images, dtype=settings.dtype, compile=settings.compile, graphs=settings.graphs
        )
    for kind in settings.passes if contestants else ():
        turns, lost = measure_in_turn(
            contestants,
            kind,
            steps=settings.steps,
            rounds=settings.rounds,
            warmup=settings.warmup,
        )
        for name in lost:
            results[name].lost.append(kind)
        for name, own in turns.items():
            results[name].speeds[kind] = speed_of(own, settings.batch_size)
            if name != group.twin and group.twin in turns:
                results[name].ratios[kind] = ratio_of(own, turns[group.twin])
        for name in turns:
            say(in_words(results[name], kind))
        keep()
    contestants.clear()
    if settings.compile:
        torch.compiler.reset()
    free_memory()


def _count_as_it_runs(
    net: nn.Module,
    image: torch.Tensor,
    result: Result,
    config: Mapping[str, Any],
    settings: Settings,
) -> None:
    # Before the blocks are compiled, as compiled blocks have other operators.
    if config["operators"]:
        half = settings.dtype
        with torch.autocast(settings.device.type, dtype=half, enabled=half is not None):
            result.operators = count_operations(net.eval(), image)
    if config["fvcore"]:
        try:
            theirs = result.fvcore = count_with_fvcore(net, result.size)
        except Untraceable as error:  # the other figures stand
            say(f"fvcore: {result.name}: not counted: {error}")
        else:
            say(explain_difference(result.name, result.cost.multiply_adds, theirs))


@contextmanager
def _numerics(threads: int | None, device: torch.device) -> Iterator[None]:
    """Set the number of threads; on CUDA allow TF32 for float32 products, as published."""
    if threads is not None:
        check_count("threads", threads, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    allow_variants()
    try:
        with float32_products_in("high") if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


def describe(settings: Settings, sizes: Set[int]) -> tuple[dict[str, Any], Peak | None]:
    """The protocol, which is all that the figures depend on, and the device's peak for speeds.

    sizes: of the nets' images; the protocol's is None if there are several.
    """
    device = settings.device
    arithmetic = arithmetic_of(device, settings.dtype)
    peak = find_peak(device, arithmetic) if settings.passes else None
    protocol = {
        **machine.describe(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "command": shlex.join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "batch_size": settings.batch_size,
        "size": next(iter(sizes)) if len(sizes) == 1 else None,
        "arithmetic": arithmetic,
        "mode": settings.mode,
        "compile": settings.compile,
        "graphs": settings.graphs,
        "steps": settings.steps,
        "rounds": settings.rounds,
        "warmup": settings.warmup,
        "passes": list(settings.passes),
        "training_step": "forward, loss, backward, AdamW",
        "peak_flops": peak.flops if peak else None,
        "peak_source": peak.source if peak else None,
        "seed": settings.seed,
    }
    return protocol, peak


def estimate_s(results: Mapping[str, Result], settings: Settings, peak: Peak) -> float:
    """Estimated seconds of all steps, at half of the device's peak."""
    turns = settings.rounds + (settings.warmup > 0)
    steps = settings.steps + settings.warmup + turns
    passes = [r.operations(kind) for r in results.values() for kind in settings.passes]
    return steps * settings.batch_size * sum(passes) / (peak.flops / 2)


def _say_what_is_measured(
    config: Mapping[str, Any], settings: Settings, protocol: Mapping[str, Any], seconds: float
) -> None:
    device = settings.device.type
    say(f"device: {protocol['device']} ({device}), {protocol['threads']} threads")
    if config["amp"] and settings.dtype is None:
        say("--amp has no effect: this CPU has no bfloat16 products; float32 is measured")
    chosen = ", ".join(f"{key} {getattr(settings, key)}" for key in settings.defaulted)
    if chosen:
        say(f"by default on this device: {chosen}")
    if (config["rounds"] or 0) > settings.rounds:
        say(f"rounds: {settings.rounds}, not {config['rounds']}: each needs a timed step")
    besides = ", compilation besides" if settings.compile else ""
    say(f"about {seconds / 60:.1f} min at half of the device's peak{besides}")
