"""The lists of measurements: what stands in one, and that each command of ours is one."""

from pathlib import Path

import pytest

from evaluation.commands.anatomy import read
from evaluation.cost.models import find_backbone, make_groups
from evaluation.cost.speed_list import DEVICES, choose, read_list, script_of
from slurm.command import capture
from utils.config.build import check_targets, plain
from utils.config.check import networks
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no YAML"),
        ("gpu: {}", "must have lists for cuda and cpu, and nothing else"),
        ("cpu: {}", "has no measurements for cpu"),
        ("cpu: {a: 3}", "a must be tells, command, minutes"),
        ("cpu: {a: {tells: it, comand: x}}", "unknown key 'comand'; did you mean 'command'?"),
        ("cpu: {a: {tells: it, minutes: 1}}", "command is missing"),
        ("cpu: {a: {tells: it, minutes: 0, command: x}}", "minutes must be more than 0, got 0"),
        ("cpu: {a: {tells: it, minutes: 1, command: '\"x'}}", "No closing quotation"),
        (
            "cpu: {a: {tells: it, minutes: 1, command: experiments/complexty.py}}",
            "no script experiments/complexty.py; did you mean 'experiments/complexity.py'?",
        ),
        (
            "cpu: {a: {tells: it, minutes: .nan, command: x}}",
            "minutes must be more than 0",
        ),
        ("cpu: {state: {}}", "a name is letters"),
        ("cpu: {a.b: {}}", "a name is letters"),  # the files of a.b would be taken for those of a
        (
            "cpu: {a: {tells: it, minutes: 1, command: README.md, twin: b}}",
            "a: there is no twin 'b'",
        ),
        (
            "cpu: {a: {tells: it, minutes: 1, command: README.md, twin: [b]}}",
            r"a: there is no twin ['b']",
        ),
        (
            "cpu: {a: {tells: it, minutes: 1, command: README.md, twin: a}}",
            "a: there is no twin 'a'",
        ),
        (
            "cpu: {a: {tells: it, minutes: 1, command: [README.md]}}",
            "a: command must be text, not ['README.md']",
        ),
        ("cpu: {a: {tells: , minutes: 1, command: README.md}}", "a: tells must be text, not None"),
        (
            "cpu: {a: {tells: it, minutes: 1, command: README.md, discard: [..]}}",
            "discard is a list of folders' names",
        ),
    ],
)
def test_wrong_lists_are_one_line(text, said, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_list("cpu", tmp_path / "own.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_choice_keeps_the_order_of_the_list():
    measurements = read_list("cuda")
    names = [entry.name for entry in choose(measurements, "vit_s, vit_h")]
    assert names == ["vit_h", "vit_s"] and choose(measurements, "") == measurements


@pytest.mark.parametrize(
    ("device", "entry"),
    [
        pytest.param(device, entry, id=f"{device}-{entry.name}")
        for device in DEVICES
        for entry in read_list(device)
    ],
)
def test_every_command_of_the_lists_is_one(device, entry, tmp_path, capsys):
    """Scripts take the words, nets are known, and what is trained can be built."""
    script, *words = entry.filled(tmp_path, 2)
    if script.endswith("anatomy.py"):
        for name in filter(None, read(words).models.split(",")):
            find_backbone(name)
        return
    function, parse = capture(script_of(script))
    config = plain(parse(words))
    if function.endswith("complexity.measure"):
        groups = make_groups(config["models"], config["twins"])
        assert all(group.twin for group in groups)
        for name in (name for group in groups for name in group.names):
            find_backbone(name)
        assert config["json_file"] == str(tmp_path / f"{entry.name}.json")
    elif "train" in script:
        check_targets(config)
        net, recipe = networks(config)
        steps = config["training"]["max_steps"] * config["recipe"]["batch_size_per_gpu"]
        assert steps <= 2 * config["data"]["train"]["copies"] and recipe.batch_size_per_gpu == 64
        assert config["output_dir"] == str(tmp_path / entry.name) and len(net.blocks) == 24
