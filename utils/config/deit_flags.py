"""The flags of DeiT's training code, their values, and what becomes of each.

Flags that are simply other names for a config key are in `utils.config.flags`.
"""

from collections.abc import Iterable

from utils.config.command_line import Option

LAMB = ["optimizer._target_='timm.optim.Lamb'"]
SGD = [
    *("optimizer._target_='torch.optim.SGD'", "~optimizer.betas", "~optimizer.eps"),
    "optimizer.nesterov=true",
]
OPTIMIZERS = {
    **{"fusedlamb": LAMB, "lamb": LAMB, "sgd": SGD},
    "adamw": ["optimizer._target_='torch.optim.AdamW'"],
}
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
DATA_SETS = {
    "IMNET": ["data=imagenet"],
    "CIFAR": ["data=cifar100"],
    "CIFAR-10": ["data=cifar10"],
    "INAT": ["data=inaturalist", "data.year=2018"],
    "INAT19": ["data=inaturalist", "data.year=2019"],
    **{domain: ["data=domainnet", f"data.domain={domain}"] for domain in DOMAINS},
}
CLASSES = {"IMNET": 1000, "CIFAR": 100, "CIFAR-10": 10, "INAT": 8142, "INAT19": 1010}
CLASSES |= dict.fromkeys(DOMAINS, 345)
DISTILLATIONS = ("none", "soft", "hard")
TEACHER = {  # DeiT's own defaults
    "--distillation-type": "none",
    "--distillation-alpha": "0.5",
    "--distillation-tau": "1.0",
    "--teacher-model": "regnety_160",
    "--teacher-path": "",
}
CATEGORY = "--inat-category"
SPECTRUM = "--symmetrized-asym-feats"
AUGMENTATION = "recipe.augmentation"
OPTIONS = {
    "--model": Option("backbone", "any of configs/backbone, or of timm"),
    "--data-set": Option("data", "IMNET, CIFAR, INAT, INAT19, ...; sets the number of classes too"),
    "--nb-classes": Option("backbone.num_classes", "of the classifier"),
    "--inat-category": Option("data.category", "rank that is told apart"),
    "--opt": Option("optimizer", f"{', '.join(OPTIMIZERS)}, or a class such as torch.optim.AdamW"),
    "--opt-betas": Option("optimizer.betas", "two numbers"),
    "--opt-eps": Option("optimizer.eps", "of all but sgd"),
    "--momentum": Option("optimizer.momentum", "of sgd"),
    "--sched": Option("recipe.schedules.shape", "of the learning rate: cosine, step"),
    "--decay-epochs": Option("recipe.schedules.decay_epochs", "of --sched step"),
    "--decay-rate": Option("recipe.schedules.decay_rate", "of --sched step"),
    "--unscale-lr": Option("recipe.schedules.lr_scaling", "the rate as it is; the default", "none"),
    "--drop": Option("backbone.drop_rate", "dropout before the classifier"),
    "--no-model-ema": Option("recipe.ema_decay", "no average of the weights", "0"),
    "--use-amp": Option("training.precision", "with a loss scaler, as published", "fp16"),
    "--no-use-amp": Option("training.precision", "as mirror ResMLPs were trained", "tf32"),
    SPECTRUM: Option("backbone.invariant", "of mirror nets without a plain part", "power_spectrum"),
    "--attn-mixer": Option("backbone.attention_mixer", "of mirror nets", "true"),
    "--mixup": Option("recipe.mixing.mixup", "Beta parameter of mixup"),
    "--cutmix": Option("recipe.mixing.cutmix", "Beta parameter of CutMix"),
    "--cutmix-minmax": Option("recipe.mixing.cutmix_minmax", "two numbers"),
    "--mixup-prob": Option("recipe.mixing.probability", "that a batch is mixed"),
    "--mixup-switch-prob": Option("recipe.mixing.switch_probability", "that it is CutMix"),
    "--mixup-mode": Option("recipe.mixing.mode", "batch, pair or elem"),
    "--smoothing": Option("recipe.smoothing", "of labels; without --bce-loss, recipe.loss=ce"),
    "--distillation-type": Option("recipe.distillation.kind", ", ".join(DISTILLATIONS)),
    "--distillation-alpha": Option("recipe.distillation.alpha", "the teacher's share of the loss"),
    "--distillation-tau": Option("recipe.distillation.tau", "temperature of soft"),
    "--teacher-model": Option("recipe.distillation.teacher", "a network of timm (regnety_160)"),
    "--teacher-path": Option("recipe.distillation.weights", "its weights (timm's own)"),
    "--aa": Option(f"{AUGMENTATION}.auto_augment", "RandAugment, unless --ThreeAugment"),
    "--train-interpolation": Option(f"{AUGMENTATION}.interpolation", "without 3-Augment"),
    "--reprob": Option(f"{AUGMENTATION}.erase_probability", "random erasing, without 3-Augment"),
    "--remode": Option(f"{AUGMENTATION}.erase_mode", "what is filled in, without 3-Augment"),
    "--recount": Option(f"{AUGMENTATION}.erase_count", "boxes per image, without 3-Augment"),
    "--eval-crop-ratio": Option("probes.accuracy.eval_crop_ratio", "of the images judged"),
}
# These need other settings to have an effect.
CONDITIONAL = (
    *(name for name, option in OPTIONS.items() if option.key.startswith(f"{AUGMENTATION}.")),
    *("--opt-eps", "--momentum", "--decay-epochs", "--decay-rate", "--mixup-switch-prob"),
    SPECTRUM,
)
PAIRS = ("--opt-betas", "--cutmix-minmax")  # flags with two values
SAME = {
    "--num_workers": "--num-workers",
    "--data_path": "--data-path",
    "--job_dir": "--output-dir",
    "--dr": "--decay-rate",
    "--use_volta32": "--use-volta32",
}
# Flag -> how many words follow it, and why nothing depends on it.
NO_EFFECT = {
    "--ThreeAugment": (0, "3-Augment is what this recipe does"),
    "--train-mode": (0, "that is the default"),
    "--model-ema": (0, "the average is kept unless recipe.ema_decay is 0"),
    "--model-ema-force-cpu": (0, "the average stays where the model is"),
    "--dist-eval": (0, "the images judged are always shared out over the processes"),
    **dict.fromkeys(
        ("--fused-attn", "--no-fused-attn"), (0, "attention is fused wherever it can be")
    ),
    **dict.fromkeys(("--no-symmetrized-asym-feats", "--no-attn-mixer"), (0, "that is the default")),
    "--no-zip-dataloader": (0, "archives are not read; data=shards and data=lmdb are"),
    "--high-precision-matmul": (0, "TF32 goes with every training.precision but fp32"),
    **dict.fromkeys(("--pin-mem", "--no-pin-mem"), (0, "memory is pinned where there is a GPU")),
    "--distributed": (0, "the launcher knows"),
    **dict.fromkeys(("--world_size", "--dist_url", "--local_rank"), (1, "the launcher knows")),
    "--start_epoch": (1, "the run folder knows"),
    **dict.fromkeys(("--cooldown-epochs", "--patience-epochs"), (1, "neither in DeiT")),
}
REFUSED = {
    **dict.fromkeys(
        ("--eval", "--rot-eval", "--flop-eval"),
        "judging is experiments/eval_deit.py --model NAME --eval FILE",
    ),
    **dict.fromkeys(
        ("--test_speed", "--only_test_speed", "--visualize_mask", "--n_visualization"),
        "experiments/eval_deit.py does that, with the same flags",
    ),
    **dict.fromkeys(("--lr-noise", "--lr-noise-pct", "--lr-noise-std"), "noise is not offered"),
    "--resplit": "split augmentation is not offered",
    "--zip-dataloader": "archives are not read; data=shards and data=lmdb are",
}


def lacks_spectrum(model: str) -> str:
    """Why `SPECTRUM` has no effect on a model, as in the published code; nothing where it has."""
    if model.startswith(("d2_deit_", "d2_convnext_", "resmlp_equi_d2_")):
        return ""
    return f": {model} is no net whose blocks are all mirror-equivariant"


def is_packed(words: Iterable[str]) -> bool:
    """Whether EViT's flag asks for ImageNet's images in two files, in the place of its tree."""
    return not {"--use-lmdb", "--use_lmdb"}.isdisjoint(words)
