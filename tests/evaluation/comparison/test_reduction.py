"""The comparison of token reductions: what it trains, reduces and counts, what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch

from evaluation.commands.compare_reduction import parse_comparison
from evaluation.comparison import reduction_pictures
from evaluation.comparison.reduction import (
    NONE,
    check_settings,
    check_strengths,
    compare,
    make_entries,
)
from evaluation.comparison.reduction_dense import fit_dense_head, masks_of, mean_iou
from evaluation.comparison.reduction_pictures import draw_reductions
from evaluation.pictures.figures import save
from octic.models import hybrid_deit_small_patch16
from utils.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from utils.errors import UserError
from vit.models import deit_small_patch16_LS

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
WRAPPER = {"_target_": "baselines.token_reduction.reduced.reduced"}
DENSE = {"threshold": 0.5, "C": 1.0, "max_iter": 50}


def nets() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "plain": deit_small_patch16_LS(num_classes=3, **SMALL).eval(),
        "octic": hybrid_deit_small_patch16(num_classes=3, **SMALL).eval(),
    }


def squares(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright squares in three places, by class, normalised."""
    labels = torch.arange(count) % 3
    images = torch.zeros(count, 3, 32, 32)
    for image, label in zip(images, labels, strict=True):
        image[:, 4 : 4 + 8, 8 * label : 8 * label + 8] = 1.0
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std, labels


def test_the_published_methods_fit_both_nets():
    """Every method of the config at every strength, around the trained shape of either net."""
    config = parse_comparison(["device=cpu"])
    assert list(config["runs"]) == ["plain", "octic"]
    torch.manual_seed(0)
    shape = SMALL | {"depth": 6, "img_size": 48, "patch_size": 8}
    both = {
        "plain": deit_small_patch16_LS(num_classes=10, **shape),
        "octic": hybrid_deit_small_patch16(num_classes=10, **shape),
    }
    entries, refused = make_entries(both, config)
    assert not refused
    count = sum(len(entry["values"]) for entry in config["methods"].values())
    assert len(entries) == 2 * (1 + count)
    assert {entry.method for entry in entries} == {NONE, *config["methods"]}
    assert len({entry.name for entry in entries}) == len(entries)
    recipes = [{**run["recipe"], "drop_path_rate": None} for run in config["runs"].values()]
    assert recipes[0] == recipes[1] and config["runs"]["octic"]["backbone"]["img_size"] == 48


def test_what_one_net_refuses_is_said_and_what_all_refuse_is_a_mistake():
    early = {"method": "evit", "options": {"locations": [0]}, "over": "keep_rate", "values": [0.5]}
    entries, refused = make_entries(nets(), {"methods": {"early": early}, "wrapper": WRAPPER})
    assert [entry.name for entry in entries] == ["plain", "plain + early keep_rate=0.5", "octic"]
    assert len(refused) == 1 and "octic" in refused[0] and "stay as they are" in refused[0]
    beyond = early | {"options": {"locations": [9]}}
    with pytest.raises(UserError, match=r"methods\.beyond fits none of the models"):
        make_entries(nets(), {"methods": {"beyond": beyond}, "wrapper": WRAPPER})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["methods.tome.values=[]"], "methods.tome says no values"),
        (["--methods", "tomme"], "no method 'tomme'; did you mean 'tome'?"),
        (["models.plain=runs/nowhere"], "there is no runs/nowhere"),
        (["models.octic=deit/quickstrat.yaml"], "did you mean"),
        (["--no-sped"], "unknown flag --no-sped"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse_comparison(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_models_and_methods_of_the_users_join():
    method = "{method: tome, over: r, values: [1, 2]}"
    words = ["models.mine=deit/quickstart_plain.yaml", f"methods.mine={method}", "device=cpu"]
    config = parse_comparison(words)
    assert "mine" in config["runs"] and config["methods"]["mine"]["values"] == [1, 2]


def test_a_method_that_fits_no_net_costs_no_training(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("evaluation.comparison.nets.train", lambda run: pytest.fail("trained"))
    words = ["device=cpu", f"output_dir={tmp_path}", "--methods", "tome", "methods.tome.over=rr"]
    with pytest.raises(UserError, match=r"methods\.tome fits none of the models.*takes no rr"):
        compare(parse_comparison(words))


def test_a_strength_that_the_images_forbid_costs_no_training():
    """More clusters than patches, as after a change of the image size alone."""
    given = {"method": "hourglass", "options": {"location": 2}, "over": "num_clusters"}
    config = {"wrapper": WRAPPER, "methods": {"hourglass": given | {"values": [16, 100]}}}
    entries, _ = make_entries({"plain": nets()["plain"]}, config)
    check_strengths(entries[:-1], 32)
    said = "^plain [+] hourglass .*100, images of 32 pixels: 10 x 10 clusters of 8 x 8 patches"
    with pytest.raises(UserError, match=said):
        check_strengths(entries, 32)


def test_masks_are_the_class_where_the_image_is_bright():
    images, labels = squares()
    masks = masks_of(images, labels, 0.5)
    assert masks.dtype == torch.uint8 and masks.shape == (12, 32, 32)
    assert (masks[1] == 2).sum() == 64 and masks[1, 5, 9] == 2 and masks[1, 0, 0] == 0


def test_a_head_of_the_whole_net_judges_reduced_ones():
    """Perfect on patches that tell the squares; worse on those that four clusters hand back."""
    net, (images, labels) = nets()["plain"], squares()
    head = fit_dense_head(net, images, labels, DENSE | {"C": 1e4}, 5)
    whole = mean_iou(net, head, images, labels, 0.5, 5)
    assert 95 < whole <= 100
    config = {
        "methods": {
            "few": {
                "method": "hourglass",
                "options": {"location": 0},
                "over": "num_clusters",
                "values": [1],
            }
        },
        "wrapper": WRAPPER,
    }
    entries, _ = make_entries({"plain": net}, config)
    assert mean_iou(entries[1].net, head, images, labels, 0.5, 5) < whole


def test_the_picture(tmp_path: Path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        reduction_pictures, "save", lambda figure, path: drawn.append(figure) or save(figure, path)
    )
    rows = {}
    for model in ("plain", "octic"):
        for strength, share in (("", 1.0), ("r=4", 0.6), ("r=8", 0.4)):
            rows[f"{model}{strength}"] = {
                "model": model,
                "method": "tome" if strength else NONE,
                "strength": strength,
                "accuracy": 90 * share,
                "multiply_adds": int(1e7 * share),
            }
    path = draw_reductions(rows, tmp_path / "p.png")
    assert path.stat().st_size > 5000
    for axis in drawn[0].axes:
        for text in axis.texts:  # the names of the nets lie within the frame
            box = text.get_window_extent()
            assert axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)


@pytest.mark.slow
def test_the_command_trains_reduces_judges_and_goes_on_where_it_stood(tmp_path: Path, capsys):
    words = ["device=cpu", f"output_dir={tmp_path}", "--epochs", "1", "--words"]
    words += [
        "backbone.depth=2 backbone.embed_dim=64 recipe.mixing=null "
        "recipe.schedules.warmup_epochs=0 training.max_steps=2"
    ]
    words += ["--methods", "tome", "methods.tome.values=[4]", "segmentation.train_images=30"]
    words += ["speed_steps=3", "speed_batch=4"]
    figures = compare(parse_comparison(words))
    assert list(figures) == ["plain", "plain + tome r=4", "octic", "octic + tome r=4"]
    for model in ("plain", "octic"):
        own, less = figures[model], figures[f"{model} + tome r=4"]
        assert less["multiply_adds"] < own["multiply_adds"] and own["share"] == 100
        assert 0 <= less["miou"] <= 100 and less["images_per_second"] > 0
    written = json.loads((tmp_path / "results.json").read_text())["reduction"]["figures"]
    assert written["plain"]["accuracy"] == figures["plain"]["accuracy"]
    assert (tmp_path / "results.csv").read_text().startswith("model,method,strength,accuracy,")
    assert (tmp_path / "reductions.png").is_file()
    again = compare(parse_comparison([*words[:-2], "--no-speed", "--no-pictures"]))
    assert again["octic"]["accuracy"] == figures["octic"]["accuracy"]
    assert "images_per_second" not in again["octic"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"speed_batch": 0}, "speed_batch must be a whole number from 1, not 0"),
        ({"segmentation": DENSE | {"train_images": -1}}, "segmentation.train_images must be"),
        ({"segmentation": DENSE | {"train_images": 9, "max_iter": -1}}, "segmentation.max_iter"),
        ({"segmentation": DENSE | {"train_images": 9, "C": 0}}, "segmentation.C must be finite"),
        ({"segmentation": DENSE | {"train_images": 9, "threshold": 1}}, r"threshold .*not 1"),
    ],
)
def test_figures_of_nothing_are_refused_before_a_training(words, said):
    config = {"speed_batch": 4, "segmentation": DENSE | {"train_images": 9}}
    with pytest.raises(UserError, match=said):
        check_settings({**config, **words})


def test_methods_to_judge_are_text(capsys):
    with pytest.raises(SystemExit):
        parse_comparison(["only=[tome,evit]"])
    assert "only must be names of methods with commas between" in capsys.readouterr().err


def test_a_model_and_a_method_that_are_taken_away_stay_away():
    config = parse_comparison(["~models.octic", "~methods.act"])
    assert list(config["runs"]) == ["plain"] and "act" not in config["methods"]
