"""Runners of the training recipes: DINOv2 through the recipe itself; see deit_cases.py for DeiT."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from submitit.slurm.slurm import SlurmJobEnvironment
from torch import Tensor

from dinov2.centering import Targets, sinkhorn_knopp
from dinov2.head import DINOHead
from dinov2.losses import dino_loss, ibot_loss, koleo_loss
from dinov2.masking import MaskSampler, block_mask, mask_weights
from dinov2.param_groups import multipliers
from dinov2.schedules import Schedules
from tests.parity.harness import NotBuilt, check, load, strip
from tests.parity.ssl_steps import completed, make_backbone, published_name, run_ssl
from utils.meter import Meter
from utils.schedules import Cosine, Schedule

DTYPES = (torch.float64, torch.float32)
Case = dict[str, Any]


def run_dino_loss(case: Case, folder: Path) -> None:
    """The DINO loss and its gradient, summed over pairs of crops."""
    args = case["args"]
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        student = [data[f"in.student.{i}"].requires_grad_() for i in range(args["n_student"])]
        teacher = [data[f"in.teacher.{i}"] for i in range(args["n_teacher"])]
        loss = dino_loss(
            torch.stack(student), torch.stack(teacher), temperature=args.get("student_temp", 0.1)
        )
        loss.backward()
        ours = {"out.loss": loss} | {f"out.grad.student.{i}": s.grad for i, s in enumerate(student)}
        check_all(case, ours, data)


def run_center(case: Case, folder: Path) -> None:
    """Softmax centering with its lagged update."""
    args = case["args"]
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        targets = Targets(args["prototypes"]).to(dtype)
        targets.ema.momentum = args.get("center_momentum", 0.9)
        targets.ema.center.copy_(data["in.center0"].flatten())
        ours = {}
        for i, temperature in enumerate(args["temps"]):
            ours[f"out.center_used.{i}"] = targets.ema.center.clone().view_as(data["in.center0"])
            logits = data[f"in.teacher_out.{i}"]
            # Rows that only pad, as the recipe's buffers have them, must not count.
            padded = torch.cat([logits, 100 * torch.ones_like(logits[:2])])
            valid = torch.arange(len(padded)) < len(logits)
            ours[f"out.probs.{i}"] = targets(padded, temperature, valid)[: len(logits)]
            targets.update()
        ours["out.center_final"] = targets.ema.center.view_as(data["in.center0"])
        check_all(case, ours, data)


def run_sinkhorn(case: Case, folder: Path) -> None:
    """Sinkhorn-Knopp assignment."""
    args = case["args"]
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        logits, rounds = data["in.teacher_out"], args.get("n_iterations", 3)
        padded = torch.cat([logits, 100 * torch.ones_like(logits[:2])])
        valid = torch.arange(len(padded)) < len(logits)
        found = sinkhorn_knopp(padded, args["temp"], valid=valid, num_iterations=rounds)
        check_all(case, {"out.q": found[: len(logits)]}, data)


def run_ibot(case: Case, folder: Path) -> None:
    """The iBOT loss of masked patches, and of all patches by their mask."""
    args = case["args"]
    temperature = args.get("student_temp", 0.1)
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        masks = data["in.masks"]
        weights = mask_weights(masks)
        student = data["in.student"].requires_grad_()
        dense = data["in.dense_student"].requires_grad_()
        masked = ibot_loss(
            student, data["in.teacher"], weights, len(masks), temperature=temperature
        )
        masked.backward()
        dense_loss = ibot_loss(
            dense[masks],
            data["in.dense_teacher"][masks],
            weights,
            len(masks),
            temperature=temperature,
        )
        dense_loss.backward()
        ours = {
            "out.masks_weight": weights,
            "out.mask_indices_list": masks.flatten().nonzero().flatten(),
            "out.loss_masked": masked,
            "out.loss_masked_default_weight": masked,
            "out.loss_dense": dense_loss,
            "out.grad.student": student.grad,
            "out.grad.dense_student": dense.grad,
        }
        check_all(case, ours, data)


def run_koleo(case: Case, folder: Path) -> None:
    """The KoLeo regulariser."""
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        x = data["in.x"].requires_grad_()
        loss = koleo_loss(x)
        loss.backward()
        check_all(case, {"out.loss": loss, "out.grad.x": x.grad}, data)


def run_head(case: Case, folder: Path) -> None:
    """The projection head, loaded by its published names."""
    for dtype in DTYPES:
        data = load(case, folder, dtype)
        head = make_head(case["args"]["ctor"]).to(dtype)
        head.load_state_dict(strip(data, "state."))
        x = data["in.x"].requires_grad_()
        y = head(x)
        (y * data["in.cot"]).sum().backward()
        ours = {"out.y": y, "out.grad.x": x.grad}
        ours |= {f"out.grad.{name}": p.grad for name, p in head.named_parameters()}
        check_all(case, ours, data)


def run_cosine(case: Case, folder: Path) -> None:
    """Cosine with warm-up."""
    data, ctor = load(case, folder), dict(case["args"]["ctor"])
    total, frozen = ctor["total_iters"], ctor.get("freeze_iters", 0)
    later = Cosine(
        base=ctor["base_value"],
        final=ctor["final_value"],
        num_steps=total - frozen,
        warmup_steps=ctor.get("warmup_iters", 0),
        warmup_start=ctor.get("start_warmup_value", 0.0),
    )

    def schedule(step: int) -> float:
        return 0.0 if step < frozen else later(step - frozen)

    ours = {
        "out.schedule": values(schedule, range(total)),
        "out.beyond_end": values(schedule, [total, total + 7]),
    }
    check_all(case, ours, data)


def run_schedules(case: Case, folder: Path) -> None:
    """The five schedules of the recipe."""
    data, overrides = load(case, folder), case["args"]["overrides"]
    optim, teacher = overrides.get("optim", {}), overrides.get("teacher", {})
    effective_batch = case["args"].get("effective_batch")
    lr = optim.get("base_lr", 4e-3) if effective_batch else optim.get("lr", 0.0)
    schedules = Schedules(
        lr=lr,
        lr_scaling=optim.get("scaling_rule", "sqrt_wrt_1024") if effective_batch else "none",
        min_lr=optim.get("min_lr", 1e-6),
        warmup_epochs=optim.get("warmup_epochs", 10),
        freeze_last_layer_epochs=optim.get("freeze_last_layer_epochs", 1),
        weight_decay=(optim.get("weight_decay", 0.04), optim.get("weight_decay_end", 0.4)),
        momentum=(
            teacher.get("momentum_teacher", 0.992),
            teacher.get("final_momentum_teacher", 1.0),
        ),
        teacher_temp=(
            teacher.get("warmup_teacher_temp", 0.04),
            teacher.get("teacher_temp", 0.07),
        ),
        teacher_temp_warmup_epochs=teacher.get("warmup_teacher_temp_epochs", 30),
    ).build(
        epochs=optim.get("epochs", 100),
        epoch_length=overrides.get("train", {}).get("OFFICIAL_EPOCH_LENGTH", 1250),
        batch_size=effective_batch or 1024,
    )
    steps = data["out.iterations"].tolist()
    names = {"wd": "weight_decay"}
    ours = {
        f"out.{name}": values(schedules[names.get(name, name)], steps)
        for name in ("lr", "wd", "momentum", "teacher_temp", "last_layer_lr")
    }
    check_all(case, ours | {"out.iterations": data["out.iterations"]}, data)


def run_param_groups(case: Case, folder: Path) -> None:
    """The published grouping, by published parameter names."""
    for entry in json.loads((folder / case["file"]).read_text()):
        model = entry["model"] and completed(entry["model"], entry["groups"])
        part = make_backbone(model) if model else make_head(entry["head"])
        ours = multipliers(
            part,
            layerwise_decay=entry["layerwise_decay"],
            patch_embed_lr_multiplier=entry["patch_embed_lr_mult"],
            published=True,
        )
        if model:
            ours = {published_name(name, model): value for name, value in ours.items()}
        assert ours.keys() == entry["groups"].keys()
        for name, (lr, weight_decay, is_last) in entry["groups"].items():
            check(name, torch.tensor(ours[name][:2]), torch.tensor([lr, weight_decay]), 1e-12)
            assert ours[name].is_last_layer == is_last, name
        assert len(set(ours.values())) == entry["n_fused_groups"]


def run_mask_generator(case: Case, folder: Path) -> None:
    """Statistics of block-wise masks."""
    rng = random.Random(0)
    for entry in json.loads((folder / case["file"]).read_text()):
        grid = tuple(entry["grid"])
        counts = torch.tensor(
            [
                int(
                    block_mask(grid, entry["target"], rng, max_block=entry["max_num_patches"]).sum()
                )
                for _ in range(entry["draws"])
            ],
            dtype=torch.float64,
        )
        assert counts.max() <= entry["target"]
        error = float(counts.std()) / len(counts) ** 0.5
        assert abs(float(counts.mean()) - entry["mean"]) <= max(0.3, 3 * error), entry


def run_smoothed_value(case: dict[str, Any], folder: Path) -> None:
    """The meter that the console's losses are told with."""
    for row in json.loads((folder / case["file"]).read_text()):
        meter = Meter(row["window_size"], **({"text": row["fmt"]} if row["fmt"] else {}))
        for value, count in row["updates"]:
            meter.update(value, count)
        # The reference's deque goes through a float32 tensor.
        narrow = {name: torch.tensor(getattr(meter, name)).item() for name in ("median", "avg")}
        wide = {name: getattr(meter, name) for name in ("global_avg", "max", "value")}
        assert row["text"] in (str(meter), meter.text.format(**narrow, **wide))
        for name in ("median", "avg", "global_avg", "max", "value"):
            assert math.isclose(getattr(meter, name), row[name], rel_tol=1e-6), name


def run_mask_upperbound(case: Case, folder: Path) -> None:
    """How many images are masked, by how much, and the length of the buffer."""
    for entry in json.loads((folder / case["file"]).read_text()):
        sampler = MaskSampler(
            sample_probability=entry["mask_sample_probability"],
            ratio_min_max=entry["mask_ratio_min_max"],
        )
        size = entry["n_global_images"], entry["n_tokens"]
        intervals = [[int(low), int(high)] for low, high in sampler.intervals(*size)]
        assert len(intervals) == entry["n_masked_images"]
        assert intervals == entry["target_intervals"]
        assert sampler.upperbound(*size) == entry["upperbound"]


def run_node_list(case: Case, folder: Path) -> None:
    """The nodes of a job, as the launcher has them from submitit, the first being the master.

    Departs from octic-vits: there "a,b[1-2]" gives the nodes "a,b1" and "a,b2", as everything
    before a bracket is one prefix. No node is called so; the stored names are taken apart first.
    """
    for entry in json.loads((folder / case["file"]).read_text()):
        stored = [name for joined in entry["nodes"] for name in joined.split(",")]
        with patch.dict(os.environ, {"SLURM_JOB_NODELIST": entry["nodelist"]}):
            assert SlurmJobEnvironment().hostnames == list(dict.fromkeys(stored))


def check_all(case: Case, ours: dict[str, Tensor], data: dict[str, Tensor]) -> None:
    """Every stored output against ours."""
    for name in data:
        if name.startswith("out."):
            check(f"{case['name']} {name}", ours[name], data[name], case["tolerance"], "floored")


def values(schedule: Schedule, steps: Any) -> Tensor:
    """A schedule's values as a tensor."""
    return torch.tensor([schedule(step) for step in steps], dtype=torch.float64)


def make_head(ctor: dict[str, Any]) -> DINOHead:
    """A head from the published constructor's arguments."""
    if ctor.get("use_bn"):
        raise NotBuilt("a head with batch norms, which DINOv2 itself refuses to train")
    return DINOHead(
        ctor["in_dim"],
        num_prototypes=ctor["out_dim"],
        hidden_dim=ctor.get("hidden_dim", 2048),
        bottleneck_dim=ctor.get("bottleneck_dim", 256),
        num_layers=max(ctor.get("nlayers", 3), 1),
        mlp_bias=ctor.get("mlp_bias", True),
    )


RUNNERS = {
    ("recipes", kind): runner
    for kind, runner in {
        "dino_loss": run_dino_loss,
        "center": run_center,
        "sk": run_sinkhorn,
        "ibot": run_ibot,
        "koleo": run_koleo,
        "head": run_head,
        "cosine": run_cosine,
        "sched": run_schedules,
        "ssl": run_ssl,
        "param_groups*": run_param_groups,
        "mask_generator*": run_mask_generator,
        "mask_upperbound*": run_mask_upperbound,
        "smoothed_value*": run_smoothed_value,
        "slurm_node_list*": run_node_list,
    }.items()
}
