"""The trainings of a comparison lie in its run folder, whichever that is in the end."""

from utils.config.trainings import in_folders, trainings


def test_every_training_has_a_folder_of_its_own_and_what_is_loaded_has_none() -> None:
    config = {"output_dir": "runs/x", "runs": {"one": {"seed": 1}, "two": "weights.safetensors"}}
    settled = in_folders(config)
    assert settled["runs"]["one"] == {"seed": 1, "output_dir": "runs/x/one"}
    assert settled["runs"]["two"] == "weights.safetensors"
    moved = {**settled, "output_dir": "runs/x/seed=1"}
    assert trainings(moved) == {"one": {"seed": 1, "output_dir": "runs/x/seed=1/one"}}
    assert config["runs"]["one"] == {"seed": 1} and trainings({"output_dir": "runs/x"}) == {}
