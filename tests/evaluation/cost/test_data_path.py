"""What a stage of the data path does, it does while it is timed; rates are of whole rounds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.cost import data_path
from evaluation.cost.peaks import device_name
from utils.errors import UserError


def test_ours_decodes_other_formats_than_jpeg_within_its_stage(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "a.png")
    files = data_path._files(str(tmp_path), 1)
    opened = []
    kept = Image.open
    monkeypatch.setattr(Image, "open", lambda *words, **keys: opened.append(1) or kept(*words))
    for stage in data_path._decoders(files):
        opened.clear()
        stage.run()
        assert opened, stage.name


def test_rates_are_medians_and_ratios_are_taken_round_by_round(tmp_path, monkeypatch, capsys):
    """The warm-up does not count; a slow spell of the machine falls on both stages of a round."""
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "a.png")
    now = [0.0]

    def stage(name, *seconds):
        left = iter(seconds)

        def work():
            now[0] += next(left)

        return data_path.Stage(data_path.DECODING, name, data_path.WORKER, 10, work)

    stages = [stage("Pillow", 99.0, 1.0, 2.0, 4.0), stage("ours", 99.0, 4.0, 0.25, 0.5)]
    monkeypatch.setattr(data_path, "_decoders", lambda files: stages)
    monkeypatch.setattr(data_path.time, "perf_counter", lambda: now[0])
    config = {
        **{"images": 1, "batch_size": 1, "rounds": 3, "reading": 0, "device": "cpu", "seed": 0},
        **{"root": str(tmp_path), "pipelines": {}, "json_file": str(tmp_path / "rates.json")},
    }
    rates = data_path.measure(config)
    assert rates == {"decoding/Pillow/worker": 5.0, "decoding/ours/worker": 20.0}
    kept = json.loads((tmp_path / "rates.json").read_text())
    assert kept["figures"] == rates
    assert kept["protocol"]["machine"] == f"{device_name(torch.device('cpu'))}, one thread"
    out = capsys.readouterr().out
    assert "8.00 (0.25-8.00)" in out and out.count(" 200.00 ") == 1 and out.count(" 50.00 ") == 1


@pytest.mark.parametrize("key", ["root", "scratch", "json_file"])
def test_what_is_no_path_is_refused_before_anything_is_measured(key):
    config = {"images": 1, "batch_size": 1, "rounds": 1, "reading": 0, key: 5}
    with pytest.raises(UserError, match=f"{key} must be text, a path, not 5: quote it"):
        data_path.measure(config)
