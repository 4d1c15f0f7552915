"""A published table: which rows are shown, what is counted, and how speeds are held against it."""

import json

import pytest
import torch

from evaluation.commands.complexity import parse_complexity
from evaluation.cost import published_table
from evaluation.cost.complexity import measure
from evaluation.cost.timing import Turn
from utils.errors import UserError

WORDS = ["--table", "token_reduction", "--device", "cpu", "--counts", "none"]


def rows_of(*words):
    return measure(parse_complexity([*WORDS, *words]))["rows"]


def test_every_row_is_printed_beside_the_stated_figure(tmp_path, capsys):
    rows = rows_of("--json", str(tmp_path / "t.json"))
    assert len(rows) == 46
    for row in rows:
        ours = row["multiply_adds"] or row["multiply_adds_at_that_count"]
        assert ours / 1e9 == pytest.approx(row["stated"]["gflops"], rel=1e-3)
        assert (row["multiply_adds"] is None) == (row["count_that_gives_the_stated"] is not None)
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == json.loads(json.dumps(rows))
    out = capsys.readouterr().out
    assert "32 rows of fixed cost: at most 0.022 % from the stated figure" in out
    assert "333.52*" in out and "417 (354-479)" in out


def test_rows_by_words():
    assert {row["method"] for row in rows_of("--rows", "ats,ToMe")} == {"ats", "tome"}
    both = rows_of("--rows", "smyrf,H/14")
    assert len(both) == 3 and {row["model"] for row in both} == {"swag_vit_h14_in1k"}
    with pytest.raises(UserError, match=r"no row is of 'tomme'; did you mean 'tome'\?"):
        rows_of("--rows", "tomme")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--table", "token_reductoin"], "no published table 'token_reductoin'; did you mean"),
        (["--table"], "--table needs a value"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse_complexity(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_counts_must_be_a_known_word():
    with pytest.raises(UserError, match="counts are auto, all, none, not 'some'"):
        measure(parse_complexity([*WORDS[:-1], "some"]))


def test_a_file_of_weights_that_is_not_there():
    words = [*WORDS[:-1], "all", "--rows", "act,L/16"]
    words += ["table.weights.swag_vit_l16_in1k=gone.torch"]
    with pytest.raises(UserError, match=r"gone\.torch: no such weights file"):
        measure(parse_complexity(words))


class Stub:
    """A table of two rows around a net of one layer."""

    title, protocol, base = "stub", "none", "base"

    class Row:
        def __init__(self, method, stated, free=None, throughput=None):
            self.method, self.model, self.options, self.free = method, "net", {}, free
            values = {"gflops": 1e-9, "fps": stated, "accuracy": 1.0}
            values["throughput"] = throughput or stated
            self.stated = type("Stated", (), {**values, "_asdict": lambda stated: values})()

    rows = (Row("base", 10.0), Row("fast", 20.0), Row("slow", 5.0))

    def words(self, row):
        return row.method, row.model, ""

    def image_size(self, row):
        return 8

    def cost(self, row, counts=None):
        return type("Cost", (), {"total": 1, "products": 1})()

    def net(self, model):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))

    def reduce(self, row, net):
        return net


def test_speeds_are_held_against_the_stated_ratio():
    """Reached where our speed-up over the base is at least the published one."""
    lines = [
        published_table.Line(row, None, None, None, {1: speed, 4: speed})
        for row, speed in zip(Stub.rows, (100.0, 180.0, 60.0), strict=True)
    ]
    base = published_table._base_of(Stub(), lines, lines[1])
    assert base is lines[0]
    cells = [list(published_table._speed_cells(line, base, 1, throughput=False)) for line in lines]
    assert cells[0] == ["100.0", "1.00", "1.00", "yes"]
    assert cells[1] == ["180.0", "1.80", "2.00", "no"]
    assert cells[2] == ["60.0", "0.60", "0.50", "yes"]


SETTINGS = published_table.Settings(
    *(torch.device("cpu"), 3, 224, 2, 2, 0, torch.bfloat16, False, False, ("inference",), 0, ()),
)


def test_the_first_batch_is_held_against_fps_and_the_others_against_throughput(capsys):
    rows = (Stub.Row("base", 10.0), Stub.Row("fast", 20.0, throughput=15.0))
    lines = [
        published_table.Line(row, None, None, None, {1: speed, 4: speed})
        for row, speed in zip(rows, (100.0, 180.0), strict=True)
    ]
    published_table._print_speeds(Stub(), lines, SETTINGS)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "180.0" in line)
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[4:12] == ["180.0", "1.80", "2.00", "no", "180.0", "1.80", "1.50", "yes"]


def test_a_rate_counts_the_images_of_its_batch(monkeypatch):
    formats = set()

    def turns(contestants, kind, **_):
        formats.update(contestant.dtype for contestant in contestants.values())
        return {name: [Turn([0.5], None)] for name in contestants}, []

    monkeypatch.setattr(published_table, "measure_in_turn", turns)
    net, config = Stub().net("net"), parse_complexity([*WORDS, "--batch-size", "3"])
    found = published_table._speeds(Stub(), list(Stub.rows), net, config, SETTINGS)
    assert found == dict.fromkeys(range(3), {1: 2.0, 3: 6.0})
    assert formats == {torch.bfloat16}


def test_speeds_of_every_row_and_batch():
    config = parse_complexity([*WORDS, "--steps", "2", "--warmup", "0", "--batch-size", "3"])
    found = published_table._speeds(Stub(), list(Stub.rows), Stub().net("net"), config, SETTINGS)
    assert found.keys() == {0, 1, 2} and all(row.keys() == {1, 3} for row in found.values())
    assert all(speed > 0 for row in found.values() for speed in row.values())
