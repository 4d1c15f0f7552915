"""Runners of DeiT III: schedules, LAMB, losses, decay groups, and complete steps of the recipe."""

import json
from pathlib import Path
from typing import Any

import torch
from timm.data.mixup import mixup_target
from timm.optim import Lamb
from torch import Tensor, nn

import octic.models
import vit.models
from deit.losses import classification_loss, cosub_loss
from deit.param_groups import undecayed
from deit.recipe import DeiT
from deit.schedules import SHAPES, Schedules
from evaluation.probes.class_metrics import ClassCounts
from tests.parity.harness import NotBuilt, check, load, strip
from tests.parity.ssl_steps import has_qkv_bias
from tests.published_names import published_vit_name
from utils.optimizers import apply_schedules, clip_parts, make_optimizer
from utils.schedules import Constant
from vit.keys import from_published

DTYPES = (torch.float64, torch.float32)
CONSTRUCTORS = {
    "hybrid": octic.models.hybrid_deit_small_patch16,
    "invariant": octic.models.d8_inv_early_deit_small_patch16,
    "plain": vit.models.deit_small_patch16_LS,
}
Case = dict[str, Any]
SCHEDULER = {  # DeiT's own defaults
    "sched": "cosine",
    "lr": 5e-4,
    "lr_noise": None,
    "unscale_lr": False,
    "batch_size": 64,
    "epochs": 300,
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "decay_epochs": 30,
    "decay_rate": 0.1,
}


def run_schedule(case: Case, folder: Path) -> None:
    """The rate of every epoch, late as published; a resumed published run is late after its first.

    Departs from DeiT: the epoch we resume at runs at the uninterrupted run's rate, not one ahead.
    """
    data, args = load(case, folder), SCHEDULER | case["args"]["args"]
    if args["sched"] not in SHAPES or args["lr_noise"] is not None:
        raise NotBuilt(f"sched {args['sched']}, lr_noise {args['lr_noise']}")
    batch_size = args["batch_size"] * case["args"].get("world_size", 1)
    build = {"epochs": args["epochs"], "epoch_length": 3, "batch_size": batch_size}
    keys = ("lr", "warmup_epochs", "warmup_lr", "min_lr", "decay_epochs", "decay_rate")
    given = {key: args[key] for key in keys}
    given |= {
        "shape": args["sched"],
        "lr_scaling": "none" if args["unscale_lr"] else "linear_wrt_512",
    }
    late = Schedules(**given, update="one_epoch_late").build(**build)["lr"]
    right = Schedules(**given, update="every_epoch").build(**build)["lr"]
    exact = Schedules(**given).build(**build)["lr"]

    def rates(schedule: Any, epochs: range) -> Tensor:
        for epoch in epochs:
            if schedule is not exact:
                assert schedule(3 * epoch) == schedule(3 * epoch + 2)
        return torch.tensor([schedule(3 * e) for e in epochs], dtype=torch.float64)

    tol, every = case["tolerance"], range(args["epochs"])
    check("lr", rates(late, every), data["out.lr_used_per_epoch"], tol, "floored")
    first = case["args"]["resume_at"]
    stored = data["out.lr_used_from_resumed_epoch"]
    check("resumed at", rates(right, range(first, first + 1)), stored[:1], tol, "floored")
    check("resumed", rates(late, range(first + 1, len(every))), stored[1:], tol, "floored")
    assert torch.equal(rates(exact, every), rates(right, every))


def run_lamb(case: Case, folder: Path) -> None:
    """Trajectories of timm's Lamb against timm's and the restated apex rule, in both layouts."""
    args = case["args"]
    options = {"apex": apex_options(args.get("apex_kw", {})), "timm": args.get("timm_kw", {})}
    same = options["apex"] == options["timm"]
    for which in ("both",) if same else tuple(options):
        names = tuple(options) if same else (which,)
        for foreach in (None, False):
            for dtype in DTYPES:
                run_trajectory(case, load(case, folder, dtype), names, foreach, options[names[0]])


def run_trajectory(
    case: Case,
    data: dict[str, Tensor],
    names: tuple[str, ...],
    foreach: bool | None,
    options: dict[str, Any],
) -> None:
    """All steps of one case with one set of options, against the trajectories of these names."""
    args, tol = case["args"], case["tolerance"]
    count = len(args["shapes"])
    parameters = [nn.Parameter(data[f"in.param.{i}"].clone()) for i in range(count)]
    groups = [
        {"params": [p for i, p in enumerate(parameters) if (i in args["decay_idx"]) == decayed]}
        for decayed in (False, True)
    ]
    optimizer = Lamb(
        [g for g in groups if g["params"]], eps=args["eps"], foreach=foreach, **options
    )
    decayed = {id(p) for p in groups[1]["params"]}
    for step in range(args["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = args["lr"][step]
            group["weight_decay"] = args["weight_decay"] * (id(group["params"][0]) in decayed)
        gradients = [data[f"in.grad.{step}.{i}"] for i in range(count)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        check("norm", norm, data[f"out.apex.global_grad_norm.{step}"], tol, "floored")
        optimizer.step()
        for which in names:
            for i, parameter in enumerate(parameters):
                name = f"out.{which}.param.{step}.{i}"
                check(name, parameter, data[name], tol, "floored")


def apex_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of apex's FusedLAMB in timm's spelling."""
    if not given.get("adam_w_mode", True):
        raise NotBuilt("LAMB with weight decay in the gradient")
    spelling = {"use_nvlamb": "always_adapt"}
    options = {spelling.get(k, k): v for k, v in given.items() if k != "adam_w_mode"}
    if "max_grad_norm" in options:
        options["max_grad_norm"] = options["max_grad_norm"] or None
    return options


def run_targets(case: Case, folder: Path) -> None:
    """Mixed targets, their binarised form, the losses and accuracies."""
    args = case["args"]
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        logits, labels = data["in.logits"].requires_grad_(), data["in.labels"]
        mixed = mixup_target(labels, args["num_classes"], args["lam"], args["smoothing"])
        bce = classification_loss(logits, mixed)
        soft = classification_loss(logits, mixed, loss="ce")
        counts = ClassCounts(1, args["num_classes"])
        counts.add(logits.detach()[None], labels)
        accuracies = counts.fractions()
        ours = {
            "out.targets_mixed": mixed,
            "out.targets_bce": (mixed > 0).to(dtype),
            "out.bce": bce,
            "out.grad.bce": torch.autograd.grad(bce, logits)[0],
            "out.soft_ce": soft,
            "out.grad.soft_ce": torch.autograd.grad(soft, logits)[0],
            "out.label_smoothing_ce": classification_loss(
                logits, labels, loss="ce", smoothing=args["smoothing"]
            ),
            "out.eval_ce": classification_loss(logits, labels, loss="ce"),
            "out.acc1": 100 * accuracies[1].item(),
            "out.acc5": 100 * accuracies[5].item(),
        }
        check_all(case, ours, data)


def run_cosub(case: Case, folder: Path) -> None:
    """The loss of two subnetworks that learn from each other."""
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        first, second = (data[f"in.out{i}"].requires_grad_() for i in range(2))
        loss = cosub_loss(first, second, data["in.targets"])
        loss.backward()
        ours = {"out.loss": loss, "out.grad.out0": first.grad, "out.grad.out1": second.grad}
        check_all(case, ours, data)


def run_decay_groups(case: Case, folder: Path) -> None:
    """Which parameters decay, by published names (compilation changes no name of ours).

    Departs from DeiT: there a compiled plain ViT decays its positions and its class token, whose
    names it no longer knows.
    """
    for entry in json.loads((folder / case["file"]).read_text()):
        model = make_model({"qkv_bias": has_qkv_bias(entry["no_decay"])} | entry["model"])
        octic_names = entry["model"]["family"] != "plain"
        exempt = undecayed(model)
        groups = {
            key: {name.removeprefix("_orig_mod.") for name in entry[key]}
            for key in ("no_decay", "decay")
        }
        if entry["compiled_prefix"] and not octic_names:
            lost = {"pos_embed", "cls_token"} & groups["decay"]
            groups = {"no_decay": groups["no_decay"] | lost, "decay": groups["decay"] - lost}
        for name, _ in model.named_parameters():
            theirs = published_vit_name(name, octic=octic_names, deit=True)
            assert theirs in groups["no_decay" if name in exempt else "decay"], name
        assert sum(map(len, groups.values())) == len(list(model.parameters()))


def run_steps(case: Case, folder: Path) -> None:
    """Complete steps: our recipe, optimiser and moving average."""
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        model = {"qkv_bias": has_qkv_bias(data)} | case["args"]["model"]
        ours = train_steps(case["args"] | {"model": model}, data, dtype)
        for optimizer in case["args"]["optimizers"]:  # one rule under two names
            for name in data:
                if name.startswith(f"out.{optimizer}."):
                    ours[name] = ours[name.replace(optimizer, "lamb", 1)]
        for name in data:
            if name.startswith("out."):
                kind = "tolerance" if ".grad." in name else "tolerance_non_grad"
                check(f"{dtype} {name}", ours[name], data[name], case[kind], "floored")


def train_steps(
    args: dict[str, Any], data: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Run the steps of a case; returns everything that it stores, the optimiser called `lamb`."""
    recipe = DeiT(
        backbone=lambda **keywords: make_model({**args["model"], **keywords}),
        dataset=range(args["batch"]),  # its length is all that is asked for
        epochs=1,
        epoch_length=args["steps"],
        batch_size_per_gpu=args["batch"],
        drop_path_rate=0.0,
        loss="bce" if args["bce_loss"] else "ce",
        ema_decay=args["ema_decay"],
        schedules=Schedules(warmup_epochs=0, weight_decay=args["weight_decay"]),
    ).to(dtype)
    recipe.schedules["lr"] = Constant(args["lr"])
    state = from_published(strip(data, "state."), recipe.model)
    average = recipe.model if recipe.ema is None else recipe.ema  # one and the same at decay 0
    recipe.model.load_state_dict(state)
    average.load_state_dict(state)
    optimizer = make_optimizer(
        lambda groups: Lamb(groups, eps=args["opt_eps"]), recipe.param_groups(), recipe
    )
    octic_names = args["model"]["family"] != "plain"

    def named(part: nn.Module) -> dict[str, nn.Parameter]:
        return {
            published_vit_name(name, octic=octic_names, deit=True): p
            for name, p in part.named_parameters()
        }

    ours: dict[str, Tensor] = {}
    for step in range(args["steps"]):
        images, labels = data[f"in.images.{step}"], data[f"in.labels.{step}"]
        targets = mixup_target(
            labels, args["model"]["num_classes"], args["lam"][step], args["smoothing"]
        )
        ours[f"out.targets_mixed.{step}"] = targets
        binary = (targets > 0).to(dtype)
        ours[f"out.targets_loss.{step}"] = binary if args["bce_loss"] else targets
        if step == 0:
            ours["out.logits.0"] = recipe.model(images)
        apply_schedules(optimizer, recipe.schedules, step)
        optimizer.zero_grad(set_to_none=True)
        loss = recipe.losses({"images": images, "targets": targets}, step)["loss"]
        loss.backward()
        ours[f"out.lamb.loss.{step}"] = loss
        if step == 0:
            ours |= {f"out.grad.0.{n}": p.grad.clone() for n, p in named(recipe.model).items()}
        ours[f"out.grad_norm.{step}"] = clip_parts(recipe.clipped_parts())["model"]
        optimizer.step()
        recipe.after_step(step)
    ours |= {f"out.lamb.after.{n}": p for n, p in named(recipe.model).items()}
    ours |= {f"out.lamb.ema_after.{n}": p for n, p in named(average).items()}
    return ours


def make_model(model: dict[str, Any]) -> nn.Module:
    """The network of a case."""
    spelling = {"init_scale": "init_values"}
    keywords = {spelling.get(k, k): v for k, v in model.items() if k != "family"}
    pooled = keywords.pop("global_pool", False)
    if pooled and model["family"] != "plain":  # which the plain one takes and does not read
        keywords |= {"global_pool": "avg", "class_token": False}
    return CONSTRUCTORS[model["family"]](**keywords)


def check_all(case: Case, ours: dict[str, Any], data: dict[str, Tensor]) -> None:
    """Every stored output against ours."""
    for name in data:
        if name.startswith("out."):
            check(f"{case['name']} {name}", ours[name], data[name], case["tolerance"], "floored")


RUNNERS = {
    ("recipes", kind): runner
    for kind, runner in {
        "timmcos": run_schedule,
        "lamb": run_lamb,
        "targets": run_targets,
        "cosub": run_cosub,
        "deit": run_steps,
        "deit_weight_decay_groups*": run_decay_groups,
    }.items()
}
