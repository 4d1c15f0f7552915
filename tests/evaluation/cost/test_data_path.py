"""What a stage of the data path does, it does while it is timed."""

import numpy as np
from PIL import Image

from evaluation.cost import data_path


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
