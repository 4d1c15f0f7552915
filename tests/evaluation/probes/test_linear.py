"""The linear probe from images to files: any backbone, processes, resuming, choice, test sets."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from deit.unaugmented import Unaugmented
from evaluation.features.cache import net_fingerprint
from evaluation.probes.exams import split_tenth
from evaluation.probes.linear import LinearProbe
from tests.evaluation.backbones import any_backbone, make
from tests.evaluation.toys import ToyImages, ToyNet, in_processes, to_tensor
from utils.data.images import Subset
from utils.errors import UserError
from vit.backbone import Features
from vit.weights import read_pickle

SMALL = {
    "learning_rates": (1e-2, 1e-1),
    "epochs": 3,
    "epoch_length": 8,
    "eval_period": 8,
    "global_batch_size": 16,
    "batch_size": 8,
}


def make_probe(**options) -> LinearProbe:
    toys = {"transform": to_tensor, "train_transform": to_tensor}
    return LinearProbe(**{**toys, **SMALL, **options})


def make_data(train: int = 90, val: int = 37) -> dict:
    return {"train": ToyImages(train, 0), "val": ToyImages(val, 1)}


def heads_in(folder, name="model_final") -> dict:
    return read_pickle(Path(folder) / f"{name}.pth")["model"]


def judge(batch_size: int = 8) -> list:
    """Figures and a sum over the trained heads; also what the processes run."""
    with tempfile.TemporaryDirectory() as folder:
        figures = make_probe(batch_size=batch_size)(ToyNet(), make_data(), folder)
        # Only rank 0 writes.
        written = (Path(folder) / "model_final.pth").exists()
        sums = [value.abs().sum().item() for value in heads_in(folder).values()] if written else []
    return [figures, sums]


@any_backbone
def test_any_backbone(backbone, tmp_path):
    images = {"transform": None, "train_transform": None, "resize_size": 32, "crop_size": 32}
    net = make(backbone).train()
    with torch.no_grad():  # as within a training run
        figures = make_probe(**images, learning_rates=(1e-1,))(net, make_data(), tmp_path)
    assert figures["linear_top1"] > 40  # chance: 17
    assert figures["linear_top5"] >= figures["linear_top1"]
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.slow
def test_batches_and_processes_do_not_matter(tmp_path):
    figures, sums = judge()
    assert judge(batch_size=4)[1] == pytest.approx(sums, rel=1e-5)
    (first, first_sums), (second, none) = in_processes(judge, 2, tmp_path)
    assert first == second == figures
    assert first_sums == pytest.approx(sums, rel=1e-5)
    assert none == []


def test_files_and_printed_lines(tmp_path, capsys):
    figures = make_probe()(ToyNet(), make_data(), tmp_path, step=7)
    text = (tmp_path / "results_eval_linear.json").read_text()
    blocks = [block.splitlines() for block in text.removesuffix("\n\n").split("\n\n")]
    assert [block[0] for block in blocks] == ["iter: 7", "iter: 15", "iter: 24"]
    best = json.loads(blocks[-1][1])["best_classifier"]
    assert best["accuracy"] * 100 == pytest.approx(figures["linear_top1"])
    result = json.loads((tmp_path / "results.json").read_text())["linear"]
    heads, protocol = result["figures"]["heads"], result["protocol"]
    assert len(heads) == 8
    assert max(head["val top-1"] for head in heads.values()) == heads[best["name"]]["val top-1"]
    assert result["figures"]["best_classifier"] == best["name"]
    assert (protocol["iterations"], protocol["global_batch_size"]) == (24, 16)
    assert (protocol["images_seen"], protocol["step"]) == (384, 7)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert (tmp_path / "running_checkpoint_linear_eval.pth").exists()
    assert f"classifiers_dict.{best['name']}.linear.weight" in heads_in(tmp_path)
    printed = capsys.readouterr().out
    assert "8 heads, 24 steps of 16 images, 4.267 passes over 90" in printed
    assert "best of 8 heads on val" in printed
    assert f"Test Results Dict {{'best_classifier': '{best['name']}', 'val_accuracy': " in printed


class Stopping(ToyImages):
    """Images whose reading fails after so many."""

    def __init__(self, *arguments, reads: int = 10**9) -> None:
        super().__init__(*arguments)
        self.left = reads

    def read(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().read(index)


def test_a_stopped_probe_goes_on_to_the_same_bits(tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    figures = make_probe()(ToyNet(), make_data(), whole)
    with pytest.raises(KeyboardInterrupt):
        make_probe()(ToyNet(), make_data() | {"train": Stopping(90, 0, reads=200)}, stopped)
    assert not (stopped / "model_final.pth").exists()
    capsys.readouterr()
    counted = Stopping(90, 0)
    assert make_probe()(ToyNet(), make_data() | {"train": counted}, stopped) == figures
    assert "going on after step 8 of 24" in capsys.readouterr().out
    assert 10**9 - counted.left == 16 * 16
    for name, value in heads_in(whole).items():
        assert torch.equal(heads_in(stopped)[name], value), name
    # Once finished, it is only judged again.
    nothing = Stopping(90, 0, reads=0)
    assert make_probe()(ToyNet(), make_data() | {"train": nothing}, stopped) == figures


def sharded(folder: Path) -> list:
    """The net's fingerprint, and figures of a trained and of a resumed probe of one image."""
    net, data = ToyNet(), make_data(val=1)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    register_fsdp_forward_method(net, "features")
    steps = {"transform": Unaugmented(input_size=8), "train_transform": Unaugmented(input_size=8)}
    return [net_fingerprint(net), *(make_probe(**steps)(net, data, folder) for _ in range(2))]


def test_a_sharded_net_goes_on_and_may_have_a_rank_without_images(tmp_path):
    first, second = in_processes(functools.partial(sharded, tmp_path / "heads"), 2, tmp_path)
    assert first == second == [net_fingerprint(ToyNet()), first[1], first[1]]


def test_files_of_another_net_or_step_are_not_gone_on_with(tmp_path, capsys):
    make_probe()(ToyNet(), make_data(), tmp_path, step=1)
    for change, step in ((0.0, 2), (0.1, 2)):
        net = ToyNet()
        with torch.no_grad():
            net.weight += change
        make_probe()(net, make_data(), tmp_path, step=step)
        assert "is of another net: the probe starts anew" in capsys.readouterr().out


class Negative(ToyNet):
    """The same weights, and other features."""

    def features(self, images, layers=(-1,)):
        return [Features(-cls, patches) for cls, patches in super().features(images, layers)]


def test_heads_of_a_net_with_the_same_weights_are_not_taken_for_its_own(tmp_path, capsys):
    short = {"epochs": 1, "epoch_length": 2}
    make_probe(**short)(ToyNet(), make_data(), tmp_path / "both")
    capsys.readouterr()
    found = make_probe(**short)(Negative(), make_data(), tmp_path / "both")
    assert "is of another net: the probe starts anew" in capsys.readouterr().out
    assert found == make_probe(**short)(Negative(), make_data(), tmp_path / "alone")


def test_files_of_other_settings_are_refused(tmp_path):
    make_probe()(ToyNet(), make_data(), tmp_path)
    with pytest.raises(
        UserError, match=r"other settings \(learning_rates: .*resume=false"
    ) as error:
        make_probe(learning_rates=(0.5,))(ToyNet(), make_data(), tmp_path)
    assert "\n" not in str(error.value)
    make_probe(learning_rates=(0.5,), resume=False)(ToyNet(), make_data(), tmp_path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    make_probe()(ToyNet(), make_data(), tmp_path)
    (tmp_path / "model_final.pth").write_bytes((tmp_path / "model_final.pth").read_bytes()[:-99])
    with pytest.raises(UserError, match="truncated or not a torch file"):
        make_probe()(ToyNet(), make_data(), tmp_path)
    torch.save({"model": {}, "iteration": 3}, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match="not written by this probe; use another output_dir"):
        make_probe()(ToyNet(), make_data(), tmp_path)


def test_given_heads_are_judged_without_training(tmp_path):
    figures = make_probe()(ToyNet(), make_data(), tmp_path / "a")
    file = str(tmp_path / "a/model_final.pth")
    data = make_data() | {"train": Stopping(90, 0, reads=0)}
    assert make_probe(classifier=file)(ToyNet(), data, tmp_path / "b") == figures
    with pytest.raises(UserError, match="model_final.pth: the file holds another grid"):
        make_probe(classifier=file, learning_rates=(0.5,))(ToyNet(), data, tmp_path / "c")
    with pytest.raises(UserError, match="nowhere.pth: no such file of heads"):
        make_probe(classifier="nowhere.pth")(ToyNet(), data, tmp_path / "c")


def test_without_a_right_answer_the_published_lines_name_no_head(tmp_path):
    """Heads of zeros answer class 0, which no image of val is."""
    make_probe()(ToyNet(), make_data(), tmp_path / "a")
    trained, file = read_pickle(tmp_path / "a/model_final.pth"), tmp_path / "zeros.pth"
    zeros = {name: torch.zeros_like(value) for name, value in trained["model"].items()}
    torch.save(trained | {"model": zeros}, file)
    data = make_data()
    data["val"] = Subset(data["val"], data["val"].labels.nonzero()[0])
    assert make_probe(classifier=str(file))(ToyNet(), data, tmp_path / "b")["linear_top1"] == 0
    lines = (tmp_path / "b/results_eval_linear.json").read_text().splitlines()
    assert lines[:2] == ["iter: 24", '{"best_classifier": {"name": "", "accuracy": 0}}']


def test_given_unfinished_heads_are_trained_on(tmp_path, capsys):
    make_probe()(ToyNet(), make_data(), tmp_path / "a")
    file = str(tmp_path / "a/running_checkpoint_linear_eval.pth")
    make_probe(classifier=file)(ToyNet(), make_data(), tmp_path / "b")
    assert "trained for 16 steps" in capsys.readouterr().out
    assert (tmp_path / "b/model_final.pth").exists()


def test_the_tenth_is_one_of_each_ten_of_a_class():
    """A class of nine gives none; no image is both learnt from and judged on."""
    images = ToyImages(44, 0)
    images.labels = np.array([0] * 10 + [1] * 9 + [2] * 25)
    held_out, rest = split_tenth(images)
    assert np.bincount(held_out.labels).tolist() == [1, 0, 2]
    assert sorted([*held_out.indices, *rest.indices]) == list(range(44))


def test_selection_on_a_tenth_of_train(tmp_path):
    data = make_data(train=150)
    figures = make_probe(select_on="train")(ToyNet(), data, tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())["linear"]
    heads = result["figures"]["heads"]
    best = heads[result["figures"]["best_classifier"]]
    held_out = [head["held-out tenth of train top-1"] for head in heads.values()]
    assert best["held-out tenth of train top-1"] == max(held_out)
    assert figures["linear_top1"] == best["val top-1"]
    assert result["protocol"]["vote"] == "the best head on train (a tenth held out)"
    with pytest.raises(UserError, match="no class has the ten images"):
        make_probe(select_on="train")(ToyNet(), make_data(train=12), tmp_path / "few")


def test_further_test_sets_judge_the_chosen_head(tmp_path):
    data, other = make_data(), ToyImages(30, 5)
    other = Subset(other, np.flatnonzero(other.labels != 3))
    two = Subset(other, np.flatnonzero(other.labels < 2))
    np.save(tmp_path / "two.npy", np.array([0, 1]))
    probe = make_probe(
        test_datasets={"other": other, "two": two, "same": data["val"]},
        test_metric_types=["per_class_accuracy", "mean_accuracy", "mean_accuracy"],
        test_class_mappings=[None, str(tmp_path / "two.npy"), None],
    )
    figures = probe(ToyNet(), data, tmp_path)
    assert figures["same_top1"] == figures["linear_top1"]
    result = json.loads((tmp_path / "results.json").read_text())["linear"]["figures"]
    assert len(result["other_per_class"]) == 6
    found = [result["other_per_class"][label] for label in set(other.labels)]
    assert len(found) == 5  # one class has no image, which is no mistake
    assert figures["other_top1"] == pytest.approx(sum(found) / 5)
    assert figures["two_top5"] == 100
    # DINOv2 appends the lines of each set to one file, after val's.
    blocks = (tmp_path / "results_eval_linear.json").read_text().strip().split("\n\n")[-4:]
    best = [json.loads(block.removeprefix("iter: 24\n"))["best_classifier"] for block in blocks]
    assert {found["name"] for found in best} == {result["best_classifier"]}
    tops = [figures[f"{name}_top1"] for name in ("linear", "other", "two", "same")]
    assert [100 * found["accuracy"] for found in best] == pytest.approx(tops)
    # Of two columns the right one is the better more often than of six.
    plain = make_probe(test_datasets=[two])(ToyNet(), data, tmp_path / "plain")
    assert plain["test1_top1"] <= figures["two_top1"]


def test_a_mapping_says_which_column_each_class_of_a_test_set_is(tmp_path):
    """Class i of the set is column columns[i] of the heads: other numbers, the same answers."""
    data, columns = make_data(), np.array([4, 2, 5, 0, 1, 3])
    renumbered = ToyImages(37, 1)
    renumbered.labels = columns.argsort()[data["val"].labels]
    np.save(tmp_path / "columns.npy", columns)
    files = [str(tmp_path / "columns.npy")]
    probe = make_probe(test_datasets=[renumbered], test_class_mappings=files)
    figures = probe(ToyNet(), data, tmp_path)
    assert figures["test1_top1"] == figures["linear_top1"] > 40
    assert figures["test1_top5"] == figures["linear_top5"]


def test_several_right_answers(tmp_path):
    class Named(ToyImages):
        def path(self, index):
            return f"ILSVRC2012_val_{index + 1:08d}.JPEG"

    (tmp_path / "real.json").write_text(json.dumps([list(range(6))] * 36 + [[]]))
    options = {"real_labels": str(tmp_path / "real.json")}
    probe = make_probe(val_metric_type="imagenet_real_accuracy", **options)
    data = {"train": ToyImages(90, 0), "val": Named(37, 1)}
    assert probe(ToyNet(), data, tmp_path)["linear_top1"] == 100


def test_an_epoch_may_be_one_pass(tmp_path, capsys):
    make_probe(epoch_length=None, epochs=1)(ToyNet(), make_data(), tmp_path)
    assert "6 steps of 16 images" in capsys.readouterr().out
    protocol = json.loads((tmp_path / "results.json").read_text())["linear"]["protocol"]
    assert (protocol["iterations"], protocol["images_seen"]) == (6, 96)
    published = LinearProbe().training
    assert published.on(1_281_167).num_steps == published.on(10**8).num_steps == 12_500


def test_wrong_data_is_one_line(tmp_path):
    probe, data = make_probe(), make_data()
    bare = Subset(ToyImages(9, 0), range(9))
    bare.labels = None
    with pytest.raises(UserError, match="images without labels"):
        probe(ToyNet(), data | {"train": bare}, tmp_path)
    more = ToyImages(90, 1, num_classes=7)
    more.class_names = []
    with pytest.raises(UserError, match="val has images of class 6, but .* only classes 0 to 5"):
        probe(ToyNet(), data | {"val": more}, tmp_path)
    renamed = ToyImages(9, 1)
    renamed.class_names[0] = "x"
    with pytest.raises(UserError, match="val has other classes than data.train: class 0"):
        probe(ToyNet(), data | {"val": renamed}, tmp_path)
    np.save(tmp_path / "far.npy", np.array([0, 99]))
    for file, message in (("far.npy", "columns 0 to 99"), ("no.npy", "No such file")):
        with pytest.raises(UserError, match=message):
            make_probe(val_class_mapping=str(tmp_path / file))(ToyNet(), data, tmp_path)


def test_a_net_without_patches(tmp_path):
    class Bare(ToyNet):
        def features(self, images, layers=(-1,)):
            return [Features(block.cls, None) for block in super().features(images, layers)]

    with pytest.raises(UserError, match=r"avgpools=\[false\]"):
        make_probe()(Bare(), make_data(), tmp_path)
    figures = make_probe(avgpools=[False])(Bare(), make_data(), tmp_path)
    assert figures["linear_top1"] > 40


def test_a_batch_that_does_not_divide_the_step_is_made_smaller(tmp_path):
    odd, even = (
        make_probe(batch_size=n)(ToyNet(), make_data(), tmp_path / str(n)) for n in (12, 8)
    )
    assert odd == even


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": ()}, "learning_rates needs values, each of them once"),
        ({"learning_rates": (0.1, 0.1)}, "each of them once"),
        ({"learning_rates": (0.1, -1)}, "learning_rates must be finite and above 0"),
        ({"n_last_blocks": (0,)}, "n_last_blocks must be finite and at least 1, not 0"),
        ({"select_on": "test"}, "select_on must be one of val, train"),
        ({"val_metric_type": "per_class_accuracy"}, "known: mean_accuracy, mean_per_class"),
        ({"val_metric_type": "imagenet_real_accuracy"}, "needs real_labels=FILE"),
        ({"sampler": "random"}, "sampler must be one of shuffled"),
        ({"precision": "half"}, "precision must be one of fp32, bf16, fp16"),
        ({"epochs": 0}, "epochs must be a whole number from 1, not 0"),
        ({"epoch_length": 0}, "epoch_length must be a whole number from 1, not 0"),
        ({"test_datasets": ["ImageNet"]}, "test1 is no data set but 'ImageNet'"),
        ({"test_datasets": {"linear": ToyImages(1, 0)}}, "linear is taken; give the set another"),
        ({"test_class_mappings": ["a.npy"]}, "1 test_class_mappings for 0 test_datasets"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_probe(**options)
    assert "\n" not in str(error.value)


def test_features_that_are_not_finite_are_refused(tmp_path):
    net = ToyNet()
    with torch.no_grad():
        net.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="finite features; some of batch 1 are inf or nan"):
        make_probe()(net, make_data(), tmp_path)
    assert not (tmp_path / "model_final.pth").exists()


def test_published_order_of_images(tmp_path):
    probe = functools.partial(make_probe, sampler="sharded_infinite")
    assert probe()(ToyNet(), make_data(), tmp_path)["linear_top1"] > 40
    assert probe().protocol["batch_size"] == 8
