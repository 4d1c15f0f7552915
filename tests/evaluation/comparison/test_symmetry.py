"""The comparison of symmetric nets: what it trains, how it turns digits, what it leaves behind."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from evaluation.commands.compare_symmetry import parse_comparison
from evaluation.comparison import symmetry_pictures
from evaluation.comparison.nets import image_size, load_run, train_then
from evaluation.comparison.symmetry import compare
from evaluation.comparison.symmetry_pictures import draw_comparison
from evaluation.comparison.symmetry_views import (
    Judged,
    black_like,
    judge_views,
    shift,
    turn,
    turn_and_back,
)
from evaluation.data import make_data
from evaluation.symmetry.posthoc import answers
from utils.checkpoints.weights_file import export_weights
from utils.config.build import build
from utils.data.classes import class_metadata
from utils.errors import UserError
from utils.run_files import CONFIG, EXPORTED
from utils.symmetry import SYMMETRIES, transform_image
from vit.models import deit_small_patch16_LS

ONLY_PLAIN = [
    f"models.{name}=null" for name in ("octic_hybrid", "octic_invariant", "mirror", "gevit")
]


def normalised(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_model_gets_one_recipe():
    runs = parse_comparison(["--device", "cpu", "--epochs", "3", "seed=4"])["runs"]
    assert list(runs) == ["octic_hybrid", "octic_invariant", "mirror", "gevit", "plain"]
    recipes = [{**run["recipe"], "drop_path_rate": None} for run in runs.values()]
    assert all(recipe == recipes[0] for recipe in recipes) and recipes[0]["epochs"] == 3
    assert all(run["seed"] == 4 and run["probes"] == {} for run in runs.values())
    assert runs["plain"]["output_dir"].endswith("compare_symmetry/plain")


def test_a_model_of_the_users_joins():
    words = [*ONLY_PLAIN, "models.mine='deit/quickstart.yaml backbone.depth=2'", "--device", "cpu"]
    runs = parse_comparison(words)["runs"]
    assert list(runs) == ["plain", "mine"] and runs["mine"]["backbone"]["depth"] == 2
    assert runs["mine"]["recipe"]["epochs"] == runs["plain"]["recipe"]["epochs"]


def test_the_trainings_follow_the_run_folder(tmp_path, monkeypatch):
    """The points of a sweep, and jobs, get their run folder after the command line was read."""
    trained = []
    monkeypatch.setattr("evaluation.comparison.nets.train", trained.append)
    monkeypatch.setattr("evaluation.comparison.nets._check_recipe", lambda name, run: None)
    words = [*ONLY_PLAIN, "--device", "cpu", "output_dir=elsewhere"]
    config = parse_comparison(words) | {"output_dir": str(tmp_path / "seed=1")}
    figures = train_then(lambda config, device: config["runs"], config, lambda config: None)
    assert [run["output_dir"] for run in trained] == [str(tmp_path / "seed=1" / "plain")]
    assert figures["plain"]["output_dir"] == trained[0]["output_dir"]


def test_check_tells_the_trainings_and_starts_none(tmp_path, capsys):
    small = "--words=backbone.depth=1 backbone.embed_dim=16 backbone.num_heads=2"
    with pytest.raises(SystemExit) as left:
        parse_comparison([*ONLY_PLAIN, small, "--check", f"output_dir='{tmp_path / 'new'}'"])
    assert left.value.code == 0 and not list(tmp_path.iterdir())
    assert "# plain: backbone deit_small_patch16_LS: 0.0" in capsys.readouterr().out


def test_check_builds_the_aggregators(tmp_path, capsys):
    words = [*ONLY_PLAIN, "--check", f"output_dir='{tmp_path}'", "posthoc.aggregators=[meann]"]
    loaded = [f"models.plain={finished(tmp_path / 'done')}"]
    for own in ([], loaded):
        with pytest.raises(SystemExit) as left:
            parse_comparison([*words, *own])
        assert left.value.code == 2 and "did you mean 'mean'" in capsys.readouterr().err


def test_a_model_may_have_the_name_of_another_key():
    words = [*ONLY_PLAIN, "models.trained=deit/quickstart.yaml", "--device", "cpu"]
    assert list(parse_comparison(words)["runs"]) == ["plain", "trained"]


def test_turned_training_is_the_same_recipe_on_turned_digits():
    runs = parse_comparison(["--turned", "--device", "cpu", *ONLY_PLAIN])["runs"]
    assert list(runs) == ["plain", "plain_turned"]
    upright, turned = (runs[name]["recipe"]["augmentation"] for name in runs)
    assert turned["augmentation"] == upright
    assert turned["_target_"].endswith("RandomTurn")


def test_only_the_model_that_is_asked_for_is_wrapped(tmp_path):
    """Another model's name does not make it a copy of that one."""

    def wrapped(*words):
        return parse_comparison(["--device", "cpu", *ONLY_PLAIN, *words])["posthoc"]["of"]

    assert wrapped("--turned") == ["plain", "plain_turned"]
    assert wrapped("models.plain_turned=deit/quickstart.yaml") == ["plain"]
    assert wrapped("posthoc.of=null") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--turned", "models.plain_turned=deit/quickstart.yaml"],
            "models.plain_turned has the name of the turned plain; rename it",
        ),
        (["posthoc.of=plian"], "posthoc.of is 'plian'; did you mean 'plain'?"),
        (["models.plain=deit/quickstart_plan.yaml"], "did you mean"),
        (["models.mirror=runs/nowhere"], "there is no runs/nowhere"),
        (["trained_on=[sideways]"], "trained_on must be one of upright, turned, not 'sideways'"),
        (["trained_on=null"], "trained_on must be a list of upright, turned, not None"),
        (["trained_on=[upright,upright]"], "trained_on needs values, each of them once"),
        (["seed=null"], "seed must be a whole number from 0, not None"),
        (["--words", "trainig.log_every=3"], "unknown key 'trainig.log_every'"),
        (["--wrods", "x"], "unknown flag --wrods"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse_comparison([*ONLY_PLAIN, *words])
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["posthoc.aggregators=[mean,media]"], "aggregator must be one of .*not 'media'"),
        (["posthoc.validation_share=1.0"], "leave nothing"),
        (["posthoc.validation_share=nan"], "validation_share must lie in .*not nan"),
        (["posthoc.data_share=null"], "data_share must be a number, not None"),
        (["posthoc.training=null"], "training must be {_target_: ...}, not None"),
        (["posthoc.wrapper=null"], "wrapper must be {_target_: ...}, not None"),
        (["angle_step=null"], "angle_step must be a number, not None"),
        (["picture_digit=-1"], "picture_digit must be a whole number from 0, not -1"),
        (["batch_size=0"], "batch_size must be a whole number from 1, not 0"),
    ],
)
def test_a_mistake_of_the_judging_costs_no_training(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.comparison.nets.train", lambda run: pytest.fail("trained"))
    config = parse_comparison(["--device", "cpu", *ONLY_PLAIN, f"output_dir={tmp_path}", *words])
    with pytest.raises(UserError, match=said):
        compare(config)


def test_what_is_loaded_must_know_the_classes_and_the_size(tmp_path: Path):
    """A net of other digits, or for other images, would be judged as if it knew nothing."""
    keywords = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    node = {"_target_": "vit.models.deit_small_patch16_LS", "num_classes": 10, **keywords}
    net, path = deit_small_patch16_LS(num_classes=10, **keywords), tmp_path / "net.safetensors"
    data = parse_comparison(["--device", "cpu", *ONLY_PLAIN])["runs"]["plain"]["data"]
    dataset = make_data(data, "val")
    metadata = {"constructor": json.dumps(node)}
    export_weights(path, net.state_dict(), metadata | class_metadata(dataset))
    assert load_run(str(path), dataset, 32).num_classes == 10
    with pytest.raises(UserError, match="for images of 32 pixels; the others have 48"):
        load_run(str(path), dataset, 48)
    others = class_metadata(SimpleNamespace(class_names=[*dataset.class_names[::-1]]))
    export_weights(path, net.state_dict(), metadata | others)
    with pytest.raises(UserError, match="figures would mean nothing"):
        load_run(str(path), dataset, 32)


def finished(folder: Path, *, size: int = 32) -> str:
    """A run folder as a training of an (untrained) small plain net would leave it."""
    words = f"backbone.embed_dim=16 backbone.depth=1 recipe.augmentation.input_size={size}"
    run = parse_comparison(["--device", "cpu", *ONLY_PLAIN, "--words", words])["runs"]["plain"]
    net = build({**run["backbone"], "_partial_": True})()
    export_weights(
        folder / EXPORTED, net.state_dict(), {"constructor": json.dumps(run["backbone"])}
    )
    (folder / CONFIG).write_text(yaml.safe_dump(run))
    return str(folder)


def test_loaded_nets_alone_are_judged_on_the_data_of_the_first_run_folder(tmp_path: Path):
    folder = finished(tmp_path / "done")
    words = ["--device", "cpu", "--no-pictures", *ONLY_PLAIN, f"output_dir={tmp_path / 'new'}"]
    words += ["posthoc.of=null", "angle_step=90.0", "speed_steps=0", f"models.plain={folder}"]
    words += [f"models.again={folder}/{EXPORTED}"]  # without data of its own
    figures = compare(parse_comparison(words))
    assert figures["plain"] == figures["again"] and 0 <= figures["plain"]["upright"] <= 100
    protocol = json.loads((tmp_path / "new/results.json").read_text())["symmetry"]["protocol"]
    assert "epochs" not in protocol  # no recipe of the comparison's was used


def test_run_folders_of_other_sizes_or_of_no_classifier_do_not_compare(tmp_path: Path):
    runs = {str(size): finished(tmp_path / str(size), size=size) for size in (32, 48)}
    with pytest.raises(UserError, match=r"images of \[32, 48\] pixels do not compare"):
        image_size(runs)
    (tmp_path / "48" / CONFIG).write_text("{data: {}, recipe: {_target_: dinov2.recipe.dinov2}}")
    with pytest.raises(UserError, match="config.yaml is of no classifier's training"):
        image_size(runs)


def test_weights_alone_do_not_say_the_data(tmp_path: Path, capsys):
    (tmp_path / "net.safetensors").touch()
    with pytest.raises(SystemExit):
        parse_comparison([*ONLY_PLAIN, f"models.plain={tmp_path}/net.safetensors"])
    assert "neither a run file nor a run folder with its config.yaml" in capsys.readouterr().err


def test_turning_is_exact_for_quarter_turns_and_black_comes_in():
    x = normalised()
    assert torch.allclose(turn(x, 90), transform_image(x, "r"), atol=1e-6)
    corner = turn(x, 45)[:, :, 0, 0]
    torch.testing.assert_close(corner, black_like(x)[None, :, 0, 0].expand(4, 3))
    torch.testing.assert_close(turn_and_back(x, 120), turn_and_back(x, 30))
    moved = shift(x, 3)
    assert torch.equal(moved[..., 3:], x[..., :-3])
    torch.testing.assert_close(moved[..., :3], black_like(x).expand(4, 3, 32, 3))


class Bright(nn.Module):
    """Tells bright from dark whichever way up, or by a part off the middle: (-mean, mean)."""

    def __init__(self, corner: bool) -> None:
        super().__init__()
        self.corner, self.scale = corner, nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x[..., 8:16, 8:16] if self.corner else x
        mean = value.mean(dim=(1, 2, 3)) * self.scale
        return torch.stack([-mean, mean], dim=1)


def test_an_invariant_net_has_one_accuracy_and_no_error():
    x = normalised(16)
    labels = (x.mean(dim=(1, 2, 3)) > 0).long()
    nets = {"all": Bright(False), "corner": Bright(True)}
    judged = judge_views(nets, x, labels, [0.0, 30.0, 90.0], batch_size=5)
    figures = judged["all"].figures
    assert figures["upright"] == figures["mean_of_eight"] == figures["worst_element"] == 100
    assert figures["equivariance_error"] < 1e-5
    assert judged["corner"].figures["equivariance_error"] > 0.1
    assert judged["all"].by_angle.keys() == {0.0, 30.0, 90.0}
    assert judged["all"].there_and_back.keys() == {30.0}


def test_a_net_of_no_law_is_judged_view_by_view():
    """Accuracies are counted anew by hand; the columns are their mean, their worst, and so on."""
    x, net = normalised(200), Bright(True)
    labels = net(x).argmax(dim=1)
    labels[:20] = 1 - labels[:20]  # right in nine of ten, upright
    judged = judge_views({"net": net}, x, labels, [0.0, 30.0, 60.0, 90.0, 120.0], batch_size=7)

    def share(view: torch.Tensor) -> float:
        return pytest.approx(100 * float((net(view).argmax(dim=1) == labels).float().mean()))

    found = judged["net"]
    assert found.by_element == {g: share(transform_image(x, g)) for g in SYMMETRIES}
    assert found.by_angle == {a: share(turn(x, a)) for a in (0.0, 30.0, 60.0, 90.0, 120.0)}
    assert found.there_and_back == {a: share(turn_and_back(x, a)) for a in (30.0, 60.0, 120.0)}
    figures, by_element, by_angle = found.figures, found.by_element, found.by_angle
    assert figures["upright"] == by_element["e"] == pytest.approx(90)
    assert figures["mean_of_eight"] == pytest.approx(sum(by_element.values()) / 8)
    assert figures["worst_element"] == min(by_element.values()) < figures["mean_of_eight"]
    assert figures["any_angle"] == pytest.approx(sum(by_angle[a] for a in (30, 60, 120)) / 3)
    control = sum(found.there_and_back.values()) / 3
    assert figures["any_angle_control"] == pytest.approx(control) != figures["any_angle"]


def test_nets_of_one_backbone_share_its_embeddings():
    """One pass for all of them, and the answers of each one alone."""

    class Wrapped(nn.Module):
        calls = 0

        def __init__(self, gain: float) -> None:
            super().__init__()
            self.gain = gain

        def embeddings(self, x):
            Wrapped.calls += 1
            return x.mean(dim=(2, 3))[:, None]

        def aggregate(self, z):
            return self.gain * z[:, 0]

    nets = {"a": Wrapped(1.0), "b": Wrapped(2.0)}
    found = answers(nets, normalised(), ["a", "b"])
    assert Wrapped.calls == 1 and torch.equal(found["b"], 2 * found["a"])


def test_pictures_are_written(tmp_path: Path):
    torch.manual_seed(0)
    keywords = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    nets = {"plain": deit_small_patch16_LS(num_classes=10, **keywords).eval()}
    judged = judge_views(nets, normalised(), torch.zeros(4).long(), [0.0, 45.0, 90.0])
    names = [str(digit) for digit in range(10)]
    found = draw_comparison(nets, normalised(1)[0], judged, tmp_path, names)
    assert sorted(path.name for path in found.values()) == [
        "accuracy_by_angle.png",
        "latent_maps.png",
        "turning.gif",
    ]
    with Image.open(tmp_path / "turning.gif") as film:
        assert film.n_frames == 36
    judged = judge_views(nets, normalised(), torch.zeros(4).long(), [])
    found = draw_comparison(nets, normalised(1)[0], judged, tmp_path, names)
    assert sorted(path.name for path in found.values()) == ["latent_maps.png", "turning.gif"]
    assert {path.name for path in tmp_path.iterdir()} == {"latent_maps.png", "turning.gif"}


@pytest.mark.parametrize("angles, lines", [((0.0, 90.0), 1), ((0.0, 45.0, 90.0), 2)])
def test_the_legend_names_only_what_is_drawn(angles, lines, tmp_path: Path, monkeypatch):
    """Quarter turns alone have no control."""
    drawn = []
    monkeypatch.setattr(symmetry_pictures, "save", lambda figure, path: drawn.append(figure))
    judged = Judged({}, {}, dict.fromkeys(angles, 90.0), {a: 95.0 for a in angles if a % 90})
    symmetry_pictures.draw_angles({"plain": judged}, tmp_path / "p.png")
    assert len(drawn[0].legends[0].get_texts()) == lines


def test_what_a_training_would_refuse_is_said_before_the_first_one(tmp_path: Path, capsys):
    """The default words have a warm-up of two epochs."""
    words = ["--device", "cpu", "--epochs", "1", *ONLY_PLAIN, f"output_dir={tmp_path}"]
    said = r"^plain: recipe.schedules.warmup_epochs 2 is more than the 1 epochs of the run \(words"
    with pytest.raises(UserError, match=said):
        compare(parse_comparison(words))
    assert "training" not in capsys.readouterr().out


def test_a_run_that_finished_by_another_recipe_is_refused(tmp_path: Path, monkeypatch):
    """It is not trained again, so the table would name epochs that it did not have."""
    monkeypatch.setattr("evaluation.comparison.nets.train", lambda run: None)
    words = ["--device", "cpu", *ONLY_PLAIN, f"output_dir={tmp_path}", "posthoc.of=null"]
    earlier = parse_comparison([*words, "--epochs", "3"])
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / CONFIG).write_text(yaml.safe_dump(earlier["runs"]["plain"]))
    said = r"plain was finished by another recipe \(recipe.epochs: 3 -> 2\); .* models.plain="
    with pytest.raises(UserError, match=said):
        compare(parse_comparison([*words, "--epochs", "2"]))
    judged = train_then(lambda config, device: {"judged": {}}, earlier, lambda config: None)
    assert judged == {"judged": {}}


@pytest.mark.slow
def test_the_command_trains_judges_and_goes_on_where_it_stood(tmp_path: Path, capsys):
    words = ["--device", "cpu", "--epochs", "1", "--no-pictures", *ONLY_PLAIN]
    words += ["--words", "recipe.mixing=null recipe.schedules.warmup_epochs=0 training.max_steps=2"]
    words += [f"output_dir={tmp_path}", "posthoc.aggregators=[mean]", "angle_step=90.0"]
    figures = compare(parse_comparison(words))
    assert "making plain invariant post hoc\n" in capsys.readouterr().out
    assert list(figures) == ["plain", "plain + mean"]
    wrapped = figures["plain + mean"]
    assert wrapped["equivariance_error"] < 1e-4 < figures["plain"]["equivariance_error"]
    assert wrapped["multiply_adds"] == pytest.approx(
        8 * figures["plain"]["multiply_adds"], rel=0.01
    )
    written = json.loads((tmp_path / "results.json").read_text())["symmetry"]["figures"]
    assert written["plain"]["upright"] == figures["plain"]["upright"]
    assert (tmp_path / "results.csv").read_text().startswith("model,upright,")
    again = compare(parse_comparison([*words, "speed_steps=0"]))
    assert again["plain"]["upright"] == figures["plain"]["upright"]
    assert "images_per_second" not in again["plain"]
