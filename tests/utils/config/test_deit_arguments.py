"""Command lines of the DeiT code are understood as they stand, and mistakes are said."""

from pathlib import Path

import pytest

from evaluation.commands.eval_deit import read_deit_arguments
from utils.config.build import check_targets, plain
from utils.config.command_line import Option, read_words
from utils.config.compose import compose_config
from utils.config.deit_arguments import parse_deit_training, read_deit_training
from utils.config.deit_flags import NO_EFFECT, OPTIONS, REFUSED
from utils.config.files import CONFIGS
from utils.config.flags import slurm_minutes
from utils.errors import UserError

# The command of DeiT III's README for ViT-B at 192 pixels, and that of its distilled predecessor.
DEIT3 = (
    "--model deit_base_patch16_LS --data-path data --output_dir out --batch 256 --lr 3e-3 "
    "--epochs 800 --weight-decay 0.05 --sched cosine --input-size 192 --eval-crop-ratio 1.0 "
    "--reprob 0.0 --smoothing 0.0 --warmup-epochs 5 --drop 0.0 --seed 0 --opt fusedlamb "
    "--warmup-lr 1e-6 --mixup .8 --drop-path 0.2 --cutmix 1.0 --unscale-lr --repeated-aug "
    "--bce-loss --color-jitter 0.3 --ThreeAugment --dist-eval --num_workers 8"
)
FLAGS_OF_DEIT = """
batch-size epochs model input-size drop drop-path model-ema model-ema-decay model-ema-force-cpu
use-amp opt opt-eps opt-betas clip-grad momentum weight-decay sched lr lr-noise lr-noise-pct
lr-noise-std warmup-lr min-lr decay-epochs warmup-epochs cooldown-epochs patience-epochs decay-rate
color-jitter aa smoothing train-interpolation repeated-aug reprob remode recount resplit mixup
cutmix cutmix-minmax mixup-prob mixup-switch-prob mixup-mode teacher-model distillation-type
distillation-alpha distillation-tau cosub finetune attn-only data-path data-set inat-category
output_dir device seed resume start_epoch eval rot-eval flop-eval eval-crop-ratio dist-eval
num_workers pin-mem train-mode bce-loss unscale-lr ThreeAugment src compile high-precision-matmul
wandb world_size dist_url ngpus nodes timeout partition use-volta32 a40 comment exclude email
"""


def parse(words: str) -> dict:
    return parse_deit_training(words.split())


def test_a_net_without_a_recipe_of_its_own_has_a_name():
    config = parse("--model deit_base_patch16_36x1_LS --data-path data")
    assert config["backbone"]["_target_"] == "vit.models.deit_base_patch16_36x1_LS"


def test_the_published_command(capsys):
    config = parse(DEIT3)
    recipe, schedules = config["recipe"], config["recipe"]["schedules"]
    assert config["backbone"]["_target_"].endswith("deit_base_patch16_LS")
    assert (config["name"], config["output_dir"]) == ("deit_base_patch16_LS", "out")
    assert (recipe["batch_size_per_gpu"], recipe["epochs"], recipe["num_workers"]) == (256, 800, 8)
    assert (schedules["lr"], schedules["weight_decay"], schedules["shape"]) == (
        3e-3,
        0.05,
        "cosine",
    )
    assert config["optimizer"]["_target_"] == "timm.optim.Lamb"
    assert recipe["augmentation"]["input_size"] == config["backbone"]["img_size"] == 192
    assert "erase_probability" not in recipe["augmentation"]
    assert "--reprob has no effect with 3-Augment, in DeiT either" in capsys.readouterr().out


# A script of "Flopping for FLOPs", whose flags are DeiT's and some more.
RESMLP = (
    "--model resmlp_equi_d2_24 --batch 256 --lr 5e-3 --drop-path 0.2 --epochs 400 "
    "--weight-decay 0.2 --sched cosine --input-size 224 --reprob 0.25 --color-jitter 0.3 "
    "--eval-crop-ratio 1.0 --nodes 2 --ngpus 4 --smoothing 0.1 --warmup-epochs 5 --drop 0.0 "
    "--seed 1337 --opt fusedlamb --warmup-lr 1e-6 --mixup .8 --cutmix 1.0 "
    "--aa rand-m9-mstd0.5-inc1 --unscale-lr --repeated-aug --high-precision-matmul --fused-attn "
    "--no-use-amp --no-zip-dataloader --tgpu A100 --compile"
)


def test_a_script_of_the_mirror_nets_is_the_run_file_and_its_machines():
    given, file = parse(RESMLP), plain(compose_config(CONFIGS / "deit" / "resmlp_equi_d2_24.yaml"))
    own = ("launcher", "cluster")
    assert {k: v for k, v in given.items() if k not in own} == {
        k: v for k, v in file.items() if k not in own
    }
    launcher, cluster = given["launcher"], given["cluster"]
    assert (launcher["kind"], launcher["nodes"], launcher["gpus_per_node"]) == ("slurm", 2, 4)
    assert cluster["gpu_type"] == "A100"


def test_flags_of_the_mirror_nets():
    words = "--model d2_deit_tiny_patch16_LS --symmetrized-asym-feats --attn-mixer"
    config = parse(f"{words} --time 0-32:00:00 --job_dir out")
    assert config["backbone"]["invariant"] == "power_spectrum"
    assert config["backbone"]["attention_mixer"] is True and config["output_dir"] == "out"
    assert config["launcher"]["timeout_min"] == 32 * 60


@pytest.mark.parametrize(
    "model", ["hybrid_deit_tiny_patch16_LS", "d2_inv_early_deit_tiny_patch16_LS"]
)
def test_a_net_without_symmetrized_features_stays_what_it_is(model):
    """The published code ignores the flag there; here it would make the net invariant early."""
    words = ["--model", model, "--symmetrized-asym-feats"]
    for read in (read_deit_training, read_deit_arguments):
        found, notes = read(words)
        assert not any("invariant" in word for word in found)
        assert [note.split(":")[0] for note in notes] == [f"{words[2]} has no effect"]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:01", 91),
        ("2:30:00", 150),
        ("1-2", 1560),
        ("1-0:5", 1445),
        ("3-0:0:0", 4320),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, minutes):
    assert slurm_minutes(text) == minutes


# Its commands for fine-tuning B/16 at 384 pixels and, after ImageNet-21k, at 224.
FINETUNE = (
    "--model deit_base_patch16_LS --data-path data --batch 32 --lr 1e-5 --epochs 20 "
    "--weight-decay 0.1 --sched cosine --input-size 384 --eval-crop-ratio 1.0 --reprob 0.0 "
    "--smoothing 0.1 --warmup-epochs 5 --drop 0.0 --nb-classes 1000 --seed 0 --opt adamw "
    "--warmup-lr 1e-6 --mixup .8 --drop-path 0.15 --cutmix 1.0 --unscale-lr --no-repeated-aug "
    "--aa rand-m9-mstd0.5-inc1 --finetune model.pth"
)
AFTER_21K = (
    "--model deit_base_patch16_LS --batch 64 --lr 0.0003 --epochs 50 --weight-decay 0.02 "
    "--reprob 0.0 --smoothing 0.1 --nb-classes 1000 --opt fusedlamb --mixup 0 --drop-path 0.15 "
    "--cutmix 1.0 --unscale-lr --no-repeated-aug --color-jitter 0.3 --ThreeAugment --src"
)


def test_the_run_file_of_the_fine_tuning_is_the_published_command():
    """The command alone has the batch, the schedule's form and the precision of ours."""
    file = parse("--config-file configs/deit/finetune.yaml data.root=data --finetune model.pth")
    said = parse(FINETUNE)
    for config in (file, said):
        del config["name"], config["output_dir"], config["checkpoint"], config["probe_every"]
        assert config["training"].pop("precision") in ("fp16", "auto")
        assert config["recipe"].pop("effective_batch_size") in (512, 2048)
        assert config["recipe"].pop("sampler") in ("distributed", "shuffled")
        assert config["recipe"]["schedules"].pop("update") in ("one_epoch_late", "every_step")
        config["recipe"]["augmentation"].pop("color_jitter", None)  # none beside RandAugment
        config["backbone"].pop("num_classes", None)  # 1000 is its own
    assert said == file


def test_cross_entropy_and_randaugment_are_meant_where_nothing_else_can_be():
    recipe = parse(AFTER_21K)["recipe"]
    assert (recipe["loss"], recipe["smoothing"], recipe["mixing"]["mixup"]) == ("ce", 0.1, 0)
    assert recipe["augmentation"]["crop"] == "simple"
    assert recipe["augmentation"]["_target_"].endswith("ThreeAugment")
    both = parse(FINETUNE + " --ThreeAugment --bce-loss --smoothing 0")["recipe"]
    assert both["augmentation"]["_target_"].endswith("ThreeAugment") and both["loss"] == "bce"


def test_every_flag_of_deit_is_known():
    from utils.config.flags import FLAGS

    known = {name for flag in FLAGS for name in flag.names}
    known |= {*OPTIONS, *NO_EFFECT, *REFUSED, "--num_workers"}
    assert not [flag for flag in FLAGS_OF_DEIT.split() if f"--{flag}" not in known]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--mixup 0 --cutmix 0.0", "recipe.mixing=null"),
        ("--mixup 0 --mixup-mode elem", "recipe.mixing.mixup=0 recipe.mixing.mode='elem'"),
        ("--cutmix-minmax 0.2 0.8", "recipe.mixing.cutmix_minmax=[0.2,0.8]"),
        ("--opt-betas 0.9 0.95", "optimizer.betas=[0.9,0.95]"),
        ("--opt torch.optim.AdamW", "optimizer._target_='torch.optim.AdamW'"),
        ("--opt adamw", "optimizer._target_='torch.optim.AdamW'"),
        ("--no-model-ema --use-amp", "recipe.ema_decay=0 training.precision=fp16"),
        (
            "--data-set INAT --inat-category family",
            "data=inaturalist data.year=2018 data.category='family'",
        ),
        ("recipe.mixing.mixup=0.4 --mixup 0.3", "recipe.mixing.mixup=0.3 recipe.mixing.mixup=0.4"),
        ("--model deit_base_patch16_LS --name mine", "backbone=deit_base_patch16_LS --name mine"),
        (
            "--model hybrid_deit_tiny_patch16_LS",
            "backbone=hybrid_deit_tiny_patch16_LS name='hybrid_deit_tiny_patch16_LS'",
        ),
        (
            "--data-set INAT --inat-category name",
            "data=inaturalist data.year=2018 backbone.num_classes=8142 data.category='name'",
        ),
        ("--data-set IMNET --use-lmdb", "backbone.num_classes=1000 --use-lmdb"),
        (
            "--data-set INAT19",
            "data=inaturalist data.year=2019 backbone.num_classes=1010",
        ),
        ("--data-set CIFAR-10", "data=cifar10 backbone.num_classes=10"),
        (
            "--data-set sketch",
            "data=domainnet data.domain=sketch backbone.num_classes=345",
        ),
        (
            "--mixup-prob 0.7 --mixup-switch-prob 0.3",
            "recipe.mixing.probability=0.7 recipe.mixing.switch_probability=0.3",
        ),
        (
            "--opt sgd",
            "optimizer._target_='torch.optim.SGD' ~optimizer.betas ~optimizer.eps "
            "optimizer.nesterov=true optimizer.momentum=0.9",
        ),
        ("--drop 0.1", "backbone.drop_rate=0.1"),
        (
            "--sched step --dr 0.2",
            "recipe.schedules.shape='step' recipe.schedules.decay_rate=0.2",
        ),
        ("--use_volta32", "--use-volta32"),
        ("--distillation-type none", "recipe.distillation=null"),
        ("--drop 0.0 --num_workers 3", "--num-workers 3"),
    ],
)
def test_flags_become_keys(words, expected):
    assert read_deit_training(words.split()) == (expected.split(" "), [])


@pytest.mark.parametrize(
    ("words", "left", "said"),
    [
        ("--inat-category name", [], "only INAT"),
        ("--data-set IMNET --inat-category name", ["data=imagenet"], "only INAT"),
        ("--no-fused-attn", [], "attention is fused"),
        ("--no-attn-mixer", [], "the default"),
        ("--no-symmetrized-asym-feats", [], "the default"),
        ("--distributed", [], "the launcher knows"),
        ("--local_rank 0", [], "the launcher knows"),
        ("--decay-rate 0.5", [], "it is of --sched step"),
        ("--momentum 0.9", [], "timm.optim.Lamb has no momentum"),
        (
            "--opt adamw --momentum 0.9",
            ["optimizer._target_='torch.optim.AdamW'"],
            "torch.optim.AdamW has no momentum",
        ),
        ("--opt sgd --opt-eps 1e-8", ["optimizer._target_='torch.optim.SGD'"], "SGD has no eps"),
        ("--cutmix 0 --mixup-switch-prob 0.3", ["recipe.mixing.cutmix=0"], "only one of mixup"),
        ("--mixup 0 --cutmix 0.0 --mixup-prob 1", ["recipe.mixing=null"], "--mixup-prob has no"),
        ("--distillation-tau 1.0", ["recipe.distillation=null"], "there is no teacher"),
        (
            "--distillation-type none --teacher-path t.pth",
            ["recipe.distillation=null"],
            "there is no teacher",
        ),
        (
            "--model deit_small_patch16_shrink_base",
            ["backbone=deit_small_patch16_shrink_base"],
            "--config-file configs/evit/evit_small.yaml;",
        ),
    ],
)
def test_what_has_no_effect_is_said(words, left, said):
    found, notes = read_deit_training(words.split())
    assert found[:1] == left[:1] and len(notes) == 1 and said in notes[0]


# The defaults of DeiT's parser, but for the model and what it does not read, written out.
DEFAULTS = (
    "--batch-size 64 --model deit_base_patch16_LS --input-size 224 --drop 0.0 --drop-path 0.1 "
    "--model-ema --model-ema-decay 0.99996 --opt adamw --opt-eps 1e-8 --momentum 0.9 "
    "--weight-decay 0.05 --sched cosine --lr 5e-4 --warmup-lr 1e-6 --min-lr 1e-5 --decay-epochs 30 "
    "--warmup-epochs 5 --cooldown-epochs 10 --patience-epochs 10 --decay-rate 0.1 "
    "--color-jitter 0.3 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --train-interpolation bicubic "
    "--repeated-aug --train-mode --reprob 0.25 --remode pixel --recount 1 --mixup 0.8 --cutmix 1.0 "
    "--mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch --teacher-model regnety_160 "
    "--distillation-type none --distillation-alpha 0.5 --distillation-tau 1.0 --data-set IMNET "
    "--inat-category name --device cuda --seed 0 --start_epoch 0 --eval-crop-ratio 0.875 "
    "--num_workers 10 --pin-mem --world_size 1 --dist_url env://"
)


def test_a_command_with_deits_defaults_written_out_is_the_same_run(capsys):
    config = parse(DEFAULTS)
    check_targets(config)
    said = capsys.readouterr().out
    for name in ("momentum", "decay-epochs", "decay-rate", "teacher-model", "distillation-alpha"):
        assert f"--{name} has no effect: " in said
    assert config["optimizer"]["eps"] == 1e-8 and config["recipe"]["distillation"] is None
    assert "momentum" not in config["optimizer"]
    assert config["recipe"]["augmentation"]["erase_probability"] == 0.25


def test_a_check_tells_of_flags_without_effect_too(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--config-file configs/deit/quickstart.yaml --momentum 0.9 --check")
    assert left.value.code == 0
    said = "# --momentum has no effect: timm.optim.Lamb has no momentum\n"
    assert said in capsys.readouterr().out


def test_every_mixing_flag_beside_no_mixing_is_said():
    words = "--mixup 0 --cutmix 0 --mixup-prob 0.5 --mixup-mode elem --mixup-switch-prob 0.3"
    found, notes = read_deit_training(words.split())
    why = "has no effect: neither mixup nor CutMix is on"
    assert found == ["recipe.mixing=null"]
    assert notes == [f"--mixup-{name} {why}" for name in ("prob", "mode", "switch-prob")]


def test_a_rank_is_told_apart_in_data_that_is_chosen_elsewhere():
    words = ["data=inaturalist", "--inat-category", "order"]
    assert read_deit_training(words) == (["data.category='order'", words[0]], [])
    files = ["--config-file", "configs/evit/evit_small.yaml"]
    assert not read_deit_training(["--model", "deit_small_patch16_shrink_base", *files])[1]


def test_packed_images_are_read_for_the_data_set_they_were_made_of():
    for words in ("--use-lmdb --data-set IMNET", "--data-set IMNET --use-lmdb --data-path x"):
        data = parse(words)["data"]["train"]
        assert data["_target_"] == "utils.data.lmdb.LmdbImages"


def test_flags_that_go_together():
    """What the words come to, in one config."""
    words = "--opt sgd --momentum 0.8 --sched step --decay-rate 0.5 recipe=deit_2021 --reprob 0.1 "
    config = parse(words + "--data-set CIFAR --distillation-type soft --distillation-tau 3")
    assert config["optimizer"] == {
        "_target_": "torch.optim.SGD",
        "_partial_": True,
        "momentum": 0.8,
        "nesterov": True,
    }
    assert config["recipe"]["schedules"]["decay_rate"] == 0.5
    assert config["recipe"]["augmentation"]["erase_probability"] == 0.1
    assert config["backbone"]["num_classes"] == 100
    distillation = config["recipe"]["distillation"]
    assert (distillation["kind"], distillation["tau"], distillation["weights"]) == ("soft", 3, None)
    teacher = distillation["teacher"]
    assert (teacher["model_name"], teacher["num_classes"]) == ("regnety_160", 100)
    assert teacher["pretrained"] is True


def test_a_teacher_of_a_file_needs_no_weights_of_timms():
    words = "--distillation-type hard --distillation-alpha 0.3 --distillation-tau 3"
    teacher = "--teacher-path t.pth --teacher-model resnet18"
    (word,), notes = read_deit_training(f"{words} {teacher}".split())
    assert notes == ["--distillation-tau has no effect: it is of --distillation-type soft"]
    node = plain(compose_config("deit/imagenet.yaml", [word]))["recipe"]["distillation"]
    assert (node["kind"], node["alpha"], node["weights"]) == ("hard", 0.3, "t.pth")
    assert node["teacher"]["model_name"] == "resnet18" and node["teacher"]["pretrained"] is False


def test_a_network_that_takes_any_image_is_not_told_its_size():
    backbone = parse("--model resnet18")["backbone"]
    assert "img_size" not in backbone and backbone["num_classes"] == 1000
    assert parse("--model vit_tiny_patch16_224 --input-size 192")["backbone"]["img_size"] == 192


@pytest.mark.parametrize("word", ["--symmetries=false", "--pin-mem=true"])
def test_a_switch_takes_no_value(word: str):
    options = {"--symmetries": Option("probes.accuracy.symmetries", "a table", "true")}
    with pytest.raises(UserError, match="takes no value, got"):
        read_words([word], options, ignored={"--pin-mem": "it is"})
    assert read_words(["--symmetries"], options).overrides == ["probes.accuracy.symmetries=true"]


def test_an_empty_value_stays_one_unless_it_is_a_default_of_deit():
    assert read_deit_training(["training.weights=", "--finetune="])[0] == [
        "training.weights=",
        "--finetune=",
    ]
    assert read_deit_training(["--resume", "", "--teacher-path", "", "--resume="]) == ([], [])


def test_resume_names_a_run_folder(tmp_path: Path, capsys):
    words, _ = read_deit_training(["--resume", str(tmp_path)])
    assert words == ["--resume", f"output_dir='{tmp_path}'"]
    assert read_deit_training(["--resume", "--seed", "3"])[0] == ["--resume", "--seed", "3"]
    with pytest.raises(SystemExit):
        parse("--resume checkpoint.pth")
    assert "--finetune FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--eval x.pth", "experiments/eval_deit.py"),
        ("--opt lam", "did you mean 'lamb'"),
        ("--data-set IMAGENET", "known: IMNET"),
        ("--opt-betas 0.9", "--opt-betas needs 2 values"),
        ("--reprob", "--reprob needs a value"),
        ("--distillation-alpha 0.3", "there is no teacher without --distillation-type"),
        ("--distillation-type warm", "none, soft, hard"),
        ("--lr-noise 0.4", "noise is not offered"),
        ("--visualize_mask", "experiments/eval_deit.py"),
        ("--use-amp=true", "--use-amp takes no value, got 'true'"),
        ("--model-ema=false", "--model-ema takes no value, got 'false'"),
        ("--model resnet1888", "there is no model 'resnet1888'"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1
