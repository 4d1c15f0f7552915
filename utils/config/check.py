"""`--check`: show what a config would build and its cost, without data, memory or a GPU."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from utils.config.build import build, check_targets, plain, resolve
from utils.effective_batch import micro_batches
from utils.errors import UserError
from utils.folders import check_run_folder
from utils.online_weights import is_address, without_downloads

if TYPE_CHECKING:
    from torch import nn


VALID = "the config is valid"
# Keywords of data sets that say where the images are.
LOCATIONS = ("root", "file", "train_shards", "val_shards")


class UnreadImages:
    """A stand-in for the data set, with ImageNet's length and no images."""

    def __len__(self) -> int:
        return 1_281_167


def check(config: Any, further: Callable[[], Sequence[str] | None] = lambda: None) -> None:
    """Validate every target, build the networks, print the config and their cost.

    Raises `UserError` if a constructor, or the run itself, would refuse the config. `further` is
    what only a command knows: it raises `UserError`, or returns notes that are told too.
    """
    content = plain(config)
    check_run_folder(content)
    check_targets(content)
    lines = [*look_at_data(content), *look_at_weights(content), *describe(content)]
    _show(content, [*(further() or ()), *lines])


def check_runs(
    config: Mapping[str, Any],
    runs: Mapping[str, Any],
    further: Callable[[], object] = lambda: None,
) -> None:
    """As `check`, for a config that is made of trainings: their costs by their names.

    What is no training but a path to load from is not looked at. A UserError names the training.
    """
    check_run_folder(config)
    lines = []
    for name, run in runs.items():
        if not isinstance(run, dict):
            continue
        try:
            check_targets(run)
            check_run(run)
            told = [*look_at_data(run), *look_at_weights(run), *describe(run)[:-1]]
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        lines += [f"{name}: {line}" for line in told]
    further()
    _show(config, [*lines, VALID])


def look_at_data(content: Mapping[str, Any]) -> list[str]:
    """A note where no folder of the data is given, and for each that is not on this machine.

    It may be on the cluster's. No images are listed. UserError for a folder of images that holds
    splits in place of classes.
    """
    from utils.data.images import class_folders, folder, refuse_splits

    data = content.get("data") or {}
    roots = {key: data[key] for key in ("root", "val_root") if isinstance(data.get(key), str)}
    paths = {key: os.path.abspath(os.path.expanduser(root)) for key, root in roots.items()}
    train = data.get("train") or {}
    is_folder = "_target_" in train and resolve(train["_target_"]) is folder
    with contextlib.suppress(OSError):  # it may not be listed by this user
        if is_folder and os.path.isdir(paths.get("root", "")):
            refuse_splits(paths["root"], class_folders(paths["root"]))
    nowhere = [
        "note: data.root is not given; without it a run stops at once"
        for node in (data.get("train"), data.get("val"))
        if isinstance(node, Mapping) and data.get("root") is None and _is_nowhere(node)
    ]
    return nowhere[:1] + [
        f"note: data.{key}: there is no {path} on this machine"
        for key, path in paths.items()
        if not os.path.exists(path)
    ]


def _is_nowhere(node: Mapping[str, Any]) -> bool:
    given = [node[key] for key in LOCATIONS if key in node]
    return bool(given) and not any(given)


def look_at_weights(content: Mapping[str, Any]) -> list[str]:
    """A note for each file of weights that is not on this machine, as `look_at_data` for folders.

    An http address is none: the launcher downloads it.
    """
    training = content.get("training") or {}
    given = {"weights": content.get("weights"), "training.weights": training.get("weights")}
    files = {key: path for key, path in given.items() if path and isinstance(path, str)}
    return [
        f"note: {key}: there is no {path} on this machine"
        for key, path in files.items()
        if not is_address(path) and not os.path.exists(os.path.expanduser(path))
    ]


def _show(content: Mapping[str, Any], lines: Sequence[str]) -> None:
    import yaml

    print(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100))
    print("\n".join(f"# {line}" for line in lines))  # so that the whole stays YAML


def describe(content: dict[str, Any]) -> list[str]:
    """Lines with parameters and multiply-adds of the networks, and the batch.

    Raises `UserError` for settings that a run would refuse before it reads data.
    """
    from utils.config.settings import check_settings
    from utils.flops import count_one_image

    if "recipe" in content:  # of a training
        check_settings(content)
    elif not content.get("backbone"):
        raise UserError(f"backbone must be given, not {content.get('backbone')!r}")
    for name, node in (content.get("probes") or {}).items():
        _check_parts(node, f"probes.{name}")
    if content.get("logging"):
        from utils.sinks import check_sinks

        check_sinks(**content["logging"])
    net, recipe = networks(content)
    size = image_size(recipe, content["backbone"], net)
    name = str(content["backbone"]["_target_"]).rpartition(".")[2]
    count = count_one_image(net, size, backward=False)
    missing = f", without {', '.join(count.uncounted)}" if count.uncounted else ""
    billions = count.forward / 2e9
    shown = f"{billions:.2f}" if billions >= 1 else f"{billions:.3g}"
    lines = [
        f"backbone {name}: {_millions(net)} parameters, "
        f"{shown} G multiply-adds at {size} x {size}{missing}"
    ]
    if recipe is not None:
        lines += [
            f"{part}: {_millions(module)} parameters"
            for part, module in recipe.clipped_parts().items()
            if not isinstance(module, type(net))  # that is the backbone
        ]
        lines.append(describe_batch(content, recipe))
    return [*lines, VALID]


def _check_parts(node: Any, where: str) -> None:
    """UserError for a probe that its constructor refuses; of one that reads data, for its parts."""
    if not isinstance(node, Mapping):
        return
    if "_target_" in node and _of_evaluation(node):
        build({where: node})
    else:
        for key, part in node.items():
            _check_parts(part, f"{where}.{key}")


def _of_evaluation(node: Any) -> bool:
    """Whether all targets of a node are of `evaluation`: none is a data set, which reads files."""
    if isinstance(node, list):
        return all(map(_of_evaluation, node))
    if not isinstance(node, Mapping):
        return True
    own = str(node.get("_target_", "evaluation.")).startswith("evaluation.")
    return own and all(map(_of_evaluation, node.values()))


def describe_batch(content: Mapping[str, Any], recipe: Any) -> str:
    """The line of a training's images per step, over all processes of its launcher.

    UserError where they cannot make the effective batch; `networks` leaves that out.
    """
    launcher = content["launcher"]
    processes = 1 if launcher["kind"] == "here" else launcher["nodes"] * launcher["gpus_per_node"]
    accumulation = micro_batches(
        content["recipe"].get("effective_batch_size"),
        recipe.batch_size_per_gpu,
        processes,
        content["recipe"].get("accumulation"),
    )
    batch = recipe.batch_size_per_gpu * accumulation * processes
    return (
        f"batch {batch} = {recipe.batch_size_per_gpu} images x {accumulation} "
        f"micro-batches x {processes} processes"
    )


def networks(content: dict[str, Any], *, download: bool = False) -> tuple["nn.Module", Any]:
    """The backbone and the recipe (None without one) on the meta device: shapes without memory.

    The optimiser is built as well, so that its errors show. Error messages name the config keys.
    Weights that would have to be downloaded are left out, unless with `download`.
    """
    import torch

    from utils.optimizers import make_optimizer
    from utils.recipe import checked_groups

    if not download:
        content = without_downloads(content)
    with torch.device("meta"):
        factory = _factory("backbone", content["backbone"])
        if not content.get("recipe"):
            return factory(), None
        node = dict(content["recipe"])
        # It is for the run's number of processes, not for this one; `describe_batch` checks it.
        if (node.get("effective_batch_size") or 0) > 0:
            node["effective_batch_size"] = None
        recipe = _factory("recipe", node)(backbone=factory, dataset=UnreadImages())
        if content.get("optimizer"):
            optimizer = _factory("optimizer", content["optimizer"])
            make_optimizer(optimizer, checked_groups(recipe), recipe)
        return factory(), recipe


def check_run(content: dict[str, Any]) -> None:
    """UserError for a training whose run folder holds a run that it would not go on from."""
    from utils.start import check_resume

    def make_recipe() -> Any:
        return networks(content)[1]

    if content.get("recipe"):
        check_resume(content, make_recipe)


def _factory(key: str, node: dict[str, Any]) -> Any:
    return build({key: {**node, "_partial_": True}})[key]


def image_size(recipe: Any, backbone: dict[str, Any], net: "nn.Module") -> int:
    """Pixels a side of the recipe's images; without its word, of those the net is built for."""
    size = getattr(recipe, "image_size", None) or backbone.get("img_size")
    default: dict[str, Any] = getattr(net, "default_cfg", {}) or {}
    if isinstance(size, list):  # [height, width]; most nets take squares
        size = size[0]
    return int(size or default.get("input_size", (3, 224, 224))[-1])


def _millions(net: "nn.Module") -> str:
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
