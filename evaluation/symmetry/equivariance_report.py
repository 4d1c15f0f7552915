"""The equivariance report of one or several nets (experiments/test_equivariance.py runs it)."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evaluation.features.dataset import full_float32_products
from evaluation.image_size import image_size_of
from evaluation.nets import (
    chosen_backbone,
    make_net,
    name_of,
    num_classes_of,
    weights_in_words,
    weights_of,
)
from evaluation.progress import say
from evaluation.results import print_table
from evaluation.sample import sample_images
from evaluation.symmetry.angles import AngleError, angle_errors, angles_of
from evaluation.symmetry.equivariance import (
    MOVES_PATCHES,
    Measured,
    greatest,
    logit_errors,
    measure,
    octic_only,
    worst_error,
)
from evaluation.symmetry.equivariance_pictures import draw_angle_errors, draw_layer_errors
from utils import distributed
from utils.config.build import plain
from utils.data.embedded import photographs
from utils.data.images import ImageFolder
from utils.errors import UserError
from utils.folders import check_folder
from utils.joining import session
from utils.ranges import check_count, check_range, check_sizes, check_word
from utils.results_file import write_results
from utils.symmetry import SYMMETRIES

TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
NONE = None, None


class Report(NamedTuple):
    """All errors of one net."""

    measured: Measured
    logits: dict[str, tuple[float, float]]  # empty for a net without a classifier
    angles: dict[float, AngleError]
    claimed: float | None  # largest error of the laws that the net claims; None: it claims none
    image_size: int


def report(config: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every net of the config, print tables, write results.json and two pictures.

    Reads the keys of configs/equivariance.yaml. Exits with code 1 and one line if a net breaks a
    law that it claims. Every rank must call this; the first one measures.
    """
    config = dict(plain(config))
    _check(config)
    figures: dict[str, Any] = {}
    broken: list[str] = []
    check_folder(config["output_dir"])
    with session(config["device"]) as device:
        if distributed.is_main():
            tolerance = _tolerance(config)
            config["backbone"] = chosen_backbone(config)
            nodes = config["backbones"] or {name_of(config["backbone"]): config["backbone"]}
            reports = {name: _measure(node, config, device) for name, node in nodes.items()}
            for name, part in reports.items():
                _print_layers(name, part, _protocol(nodes[name], config, part, device))
            if config["angle_step"]:
                _print_angles(reports)
            figures = {name: _figures(part) for name, part in reports.items()}
            _write(config, reports, figures, device)
            broken = [
                line for name in reports if (line := _verdict(name, reports[name], tolerance))
            ]
        figures, broken = distributed.broadcast_object((figures, broken))
    if broken:
        print(f"error: {'; '.join(broken)}", file=sys.stderr)
        raise SystemExit(1)
    return figures


def _check(config: Mapping[str, Any]) -> None:
    """UserError for a value with which no net could be measured, or none could be refused."""
    if config["backbones"] and not isinstance(config["backbones"], Mapping):
        raise UserError(f"backbones must be a mapping of names to nets, not {config['backbones']}")
    check_word("dtype", config["dtype"], TOLERANCES)
    check_range("shake", config["shake"])
    check_count("num_images", config["num_images"], 1)
    check_sizes(image_size=config["image_size"])
    angles_of(config["angle_step"])
    if config["tolerance"] is not None:
        check_range("tolerance", config["tolerance"])


def own_images(config: Mapping[str, Any], size: int) -> Tensor:
    """The images [B 3 size size] that the key `images` of a config names."""
    count, source = config["num_images"], str(config["images"])
    if source == "random":
        generator = torch.Generator().manual_seed(config["seed"])
        return torch.randn(count, 3, size, size, generator=generator)
    dataset = photographs() if source == "photographs" else ImageFolder(source, labels=False)
    return sample_images(dataset, size=size, count=count)


def _measure(node: Mapping[str, Any], config: Mapping[str, Any], device: torch.device) -> Report:
    weights = None if config["backbones"] else config["weights"]
    net = make_net(node, weights, seed=config["seed"])
    _shake(net, config["shake"], config["seed"])
    own_size = image_size_of(net)
    size = config["image_size"] or own_size
    dtype = getattr(torch, config["dtype"])
    images = own_images(config, size).to(device, dtype)
    net = net.to(device, dtype)
    angles = angles_of(config["angle_step"])
    with full_float32_products(device):
        measured = measure(net, images, shown=True)
        # torchvision's classifiers take only images of their own size.
        classifies = num_classes_of(net) > 0 and size == own_size
        logits = logit_errors(net, images) if classifies else {}
        by_angle = angle_errors(net, images, angles, shown=True)
    return Report(measured, logits, by_angle, _claimed(net, measured, logits), size)


def _shake(net: nn.Module, deviation: float, seed: int) -> None:
    if not deviation:
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=deviation)


def _claimed(
    net: Any, measured: Measured, logits: Mapping[str, tuple[float, float]]
) -> float | None:
    """The worst error of the laws that must hold: octic layers, and an invariant net's end."""
    errors = [worst_error(octic_only(measured.layers))]
    if getattr(net, "invariant", False):
        for element in (element.name for element in net.group.elements):
            errors += [*measured.turns[element], logits.get(element, NONE)[0]]
    return greatest(errors)


def _tolerance(config: Mapping[str, Any]) -> float:
    given = config["tolerance"]
    return TOLERANCES[config["dtype"]] if given is None else given


def _verdict(name: str, part: Report, tolerance: float) -> str | None:
    """Print how well the law holds; returns an error line if it does not."""
    if part.claimed is None:
        say(f"{name}: claims no law")
        return None
    # Written so that NaN also counts as a breach.
    if not part.claimed <= tolerance:
        return f"{name} breaks its law: relative error {part.claimed:.1e}, allowed {tolerance:.0e}"
    say(f"{name}: the law holds to {part.claimed:.1e} (allowed {tolerance:.0e})")
    return None


def _rows(part: Report) -> dict[str, dict[str, float | None]]:
    """Errors by element, of every layer and of the outputs."""
    rows = {f"{name} ({layer.kind})": layer.errors for name, layer in part.measured.layers.items()}
    turns = part.measured.turns
    rows["class token, end"] = {element: error.cls for element, error in turns.items()}
    if any(error.patches is not None for error in turns.values()):
        rows["patches, end"] = {element: error.patches for element, error in turns.items()}
    if part.logits:
        rows["logits"] = {element: error for element, (error, _) in part.logits.items()}
    return rows


def _print_layers(name: str, part: Report, protocol: str) -> None:
    rows = [
        (label, *(None if error is None else f"{error:.1e}" for error in by_element.values()))
        for label, by_element in _rows(part).items()
    ]
    if part.logits:
        same = (f"{100 * share:.0f} %" for _, share in part.logits.values())
        rows.append(("same class", *same))
    print_table(
        f"{name}: relative error |f(g x) - g f(x)| / |f(x)|",
        ("layer", *SYMMETRIES),
        rows,
        protocol=protocol,
    )


def _print_angles(reports: Mapping[str, Report]) -> None:
    columns = ["angle"]
    rows: dict[float, list[str]] = {}
    for name, part in reports.items():
        has_patches = any(error.patches is not None for error in part.angles.values())
        columns += [f"{name}: class token", *(["patches"] if has_patches else [])]
        for angle, error in part.angles.items():
            row = rows.setdefault(angle, [f"{angle:g}"])
            row.append(f"{error.cls:.3f} ({error.cls_control:.3f})")
            if error.patches is not None:
                row.append(f"{error.patches:.3f} ({error.patches_control:.3f})")
    print_table(
        "any angle: relative error (in brackets: turned there and back, interpolation alone)",
        columns,
        list(rows.values()),
        protocol="images in their inscribed disc, turned counter-clockwise, bilinear; quarter "
        "turns exact; the map of patches turned likewise, compared one cell inside the disc",
    )


def _protocol(
    node: Mapping[str, Any], config: Mapping[str, Any], part: Report, device: torch.device
) -> str:
    source = "random numbers" if config["images"] == "random" else config["images"]
    weights = weights_in_words(node, None if config["backbones"] else config["weights"])
    shaken = f" shaken by {config['shake']:g}" if config["shake"] else ""
    size = part.image_size
    return (
        f"{config['num_images']} images of {size} x {size} ({source}); weights: "
        f"{weights}{shaken}; {config['dtype']} on {device.type}, seed {config['seed']}; "
        f"{_acting(part.measured)}"
    )


def _acting(measured: Measured) -> str:
    """How g acts on the layers of each kind there is."""
    kinds = list(dict.fromkeys(layer.kind for layer in measured.layers.values()))
    mixed = [f"{kind} layers: g mixes channels too" for kind in kinds if kind not in MOVES_PATCHES]
    moved = [f"{kind}: it moves patches alone" for kind in kinds if kind in MOVES_PATCHES]
    return "; ".join(mixed + moved)


def _figures(part: Report) -> dict[str, Any]:
    return {
        "largest error of the law claimed": part.claimed,
        "image_size": part.image_size,
        "layers": _rows(part),
        "same class": {element: share for element, (_, share) in part.logits.items()},
        "angles": {f"{angle:g}": error._asdict() for angle, error in part.angles.items()},
    }


def _write(
    config: Mapping[str, Any],
    reports: Mapping[str, Report],
    figures: Mapping[str, Any],
    device: torch.device,
) -> None:
    folder = Path(config["output_dir"])
    keys = ("backbone", "backbones", "weights", "shake", "images", "num_images", "angle_step")
    protocol = {key: config[key] for key in (*keys, "dtype", "seed")} | {"device": device.type}
    protocol["weights"] = weights_of(config["backbone"], config["weights"])
    protocol |= {"tolerance": _tolerance(config), "error": "|f(g x) - g f(x)| / |f(x)|"}
    if config["backbones"]:
        del protocol["backbone"], protocol["weights"]
    paths = [write_results(folder, "equivariance", protocol=protocol, figures=figures)]
    rows = {name: _rows(part) for name, part in reports.items()}
    paths.append(draw_layer_errors(rows, folder / "errors_by_layer.png", dtype=config["dtype"]))
    by_angle = folder / "errors_by_angle.png"
    if config["angle_step"]:
        by_name = {name: part.angles for name, part in reports.items()}
        paths.append(draw_angle_errors(by_name, by_angle))
    else:  # That of an earlier call would stand beside results it does not belong to.
        by_angle.unlink(missing_ok=True)
    say(f"written: {', '.join(str(path) for path in paths)}")
