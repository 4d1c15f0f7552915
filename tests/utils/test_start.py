"""What a run begins with: a folder taken whole, its network alone, or a line with the remedy."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.utils.loop_case import TinyRecipe, make_config, parts_of, train_tiny
from utils.errors import UserError
from utils.run import run_built
from utils.run_files import EXPORTED
from utils.run_objects import Run
from utils.signals import StopSignal
from utils.start import check_resume, load_weights


class Other(TinyRecipe):
    """Another recipe around the same network: it reads a network from a file."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(2, 2)

    def param_groups(self):
        return [*super().param_groups(), {"params": list(self.extra.parameters())}]

    def load_weights(self, path: str) -> None:
        self.student.load_state_dict(load_file(path))


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("utils.metrics.draw_curves", lambda path: None)
    train_tiny(tmp_path / "run", max_steps=2)
    return tmp_path / "run"


def test_a_run_of_the_same_recipe_is_taken_whole(run: Path) -> None:
    recipe = TinyRecipe()
    assert load_weights(recipe, str(run)) == []
    saved = parts_of(run)["recipe"]
    assert all(torch.equal(value, saved[name]) for name, value in recipe.state_dict().items())


def test_of_a_run_of_another_recipe_the_network_is_taken(run: Path) -> None:
    recipe = Other()
    (line,) = load_weights(recipe, str(run))
    assert line.startswith(f"training.weights: {run} is not taken whole (its state is of another")
    assert "2 missing, e.g. extra.bias" in line and line.endswith(str(run / EXPORTED))
    weights = load_file(run / EXPORTED)
    assert torch.equal(recipe.student.blocks[0].weight, weights["blocks.0.weight"])


def test_without_an_exported_network_the_remedy_is_told(run: Path) -> None:
    (run / EXPORTED).unlink()
    with pytest.raises(UserError, match=f"2 missing, e.g. extra.bias; .*{EXPORTED}, which another"):
        load_weights(Other(), str(run))


def test_a_checkpoint_of_another_recipe_names_the_network_beside_it(run: Path) -> None:
    with pytest.raises(UserError, match=f"2 missing.*its network alone is {run / EXPORTED}$"):
        load_weights(Other(), str(run / "checkpoints" / "2"))


def test_a_run_that_has_lost_its_checkpoints_still_has_its_network(run: Path) -> None:
    (run / "checkpoints" / "last").unlink()
    (line,) = load_weights(Other(), str(run))
    assert "it has no checkpoint" in line
    (run / EXPORTED).rename(run / "model.safetensors")
    with pytest.raises(UserError, match="nor a checkpoint of one; give .*/model.safetensors$"):
        load_weights(Other(), str(run))
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither a run folder nor a checkpoint of one$"):
        load_weights(Other(), str(run))


def test_an_older_run_has_its_network_under_another_name(run: Path) -> None:
    formerly = run / "exported" / "teacher.safetensors"
    (run / EXPORTED).rename(formerly)
    recipe = Other()
    (line,) = load_weights(recipe, str(run))
    weight = load_file(formerly)["blocks.0.weight"]
    assert line.endswith(str(formerly)) and torch.equal(recipe.student.blocks[0].weight, weight)


def test_weights_that_are_not_finite_begin_nothing(run: Path, tmp_path: Path) -> None:
    weights = load_file(run / EXPORTED)
    weights["blocks.0.weight"][0] = torch.nan
    save_file(weights, tmp_path / "broken.safetensors")
    said = r"^training.weights: .*broken.safetensors holds weights that are not finite \(student.bl"
    with pytest.raises(UserError, match=said):
        load_weights(Other(), str(tmp_path / "broken.safetensors"))


def test_what_may_not_be_read_is_one_line(run: Path, monkeypatch) -> None:
    def closed(path: Path, *_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", closed)  # nothing is closed to root
        said = f"^training.weights: cannot read {run}: Permission denied$"
        with pytest.raises(UserError, match=said):
            load_weights(TinyRecipe(), str(run))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", closed)
        with pytest.raises(UserError, match=r"cannot read .*checkpoint.json: Permission denied$"):
            load_weights(TinyRecipe(), str(run / "checkpoints" / "2"))


def test_the_line_is_told_with_the_others(run: Path, tmp_path: Path, capsys) -> None:
    config = make_config(tmp_path / "next", weights=str(run), max_steps=1)
    with StopSignal() as stop:
        run_built(Run(config, Other(), torch.optim.AdamW, {}, {}), torch.device("cpu"), stop)
    assert "is not taken whole" in " ".join(capsys.readouterr().out.split())


def test_going_on_with_another_network_says_what_has_changed(run: Path) -> None:
    """The config that began the run stands beside it, and says what made it another network."""

    def go_on(**changes: object) -> str:
        going_on = Run(make_config(run, **changes), Other(), torch.optim.AdamW, {}, {})
        with StopSignal() as stop, pytest.raises(UserError) as caught:
            run_built(going_on, torch.device("cpu"), stop)
        return str(caught.value)

    line = go_on(backbone={"embed_dim": 128}, seed=1)
    assert line.startswith(f"{run} holds a run of another network (backbone")
    assert "embed_dim" in line and "seed" not in line
    assert line.endswith(
        "choose another output_dir, or go on with the run's own config: "
        f"--config-file {run / 'config.yaml'}"
    )
    assert "is of another model: 2 missing, e.g. extra.bias" in go_on()  # the code has changed


def test_what_a_run_would_refuse_its_folder_for_is_found_without_it(run: Path) -> None:
    config = make_config(run, backbone={"embed_dim": 128})
    check_resume(config, TinyRecipe)
    with torch.device("meta"):
        other = Other()
    with pytest.raises(UserError, match=f"^{run} holds a run of another network"):
        check_resume(config, lambda: other)
    anew = config | {"training": config["training"] | {"resume": False}}
    with pytest.raises(UserError, match=f"^{run} holds a run at step 2: choose another output_dir"):
        check_resume(anew, TinyRecipe)


def test_a_damaged_checkpoint_or_none_is_left_to_the_run(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "2" / "checkpoint.json").write_text("{")
    for folder in (run, tmp_path / "none"):
        check_resume(make_config(folder), Other)
