"""Speed as a probe: figures, and in a training a file with what they depend on."""

import json

from torch import nn

from evaluation.probes.throughput import ThroughputProbe


def test_the_figures_lie_beside_their_protocol(tmp_path, capsys):
    """Of a training alone: an evaluation writes them with the name of the net."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    probe = ThroughputProbe(batch_size=2, steps=1, repeats=2, input_size=8)
    found = probe(net, {}, tmp_path / "speed", step=7)
    assert "timing 2 x 1 batches" in capsys.readouterr().out
    written = json.loads((tmp_path / "speed/results.json").read_text())["throughput"]
    assert written["figures"] == found and written["protocol"]["step"] == 7
    probe(net, {}, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()
