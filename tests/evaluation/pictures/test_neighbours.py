"""Pictures of nearest neighbours are written, and frames need labels."""

import pytest
from PIL import Image

from evaluation.pictures import neighbours
from evaluation.pictures.figures import save
from evaluation.pictures.neighbours import draw_neighbours
from tests.evaluation.toys import ToyImages, ToyNet, to_tensor


@pytest.mark.parametrize("labelled", [True, False])
def test_neighbours_are_drawn(labelled, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        neighbours, "save", lambda figure, path: drawn.append(figure) or save(figure, path)
    )
    path = draw_neighbours(
        ToyNet(),
        ToyImages(30, 0, labelled=labelled),
        ToyImages(9, 1, labelled=labelled),
        tmp_path / "neighbours.png",
        transform=to_tensor,
        num_queries=3,
        k=4,
    )
    with Image.open(path) as picture:
        assert min(picture.size) > 100
        red_or_green = sum(
            count
            for count, (r, g, b, *_) in picture.getcolors(maxcolors=2**24)
            if (r, g, b) in ((44, 160, 44), (214, 39, 40))
        )
    assert (red_or_green > 100) == labelled
    explained = drawn[0].get_supxlabel()
    assert "cosine similarity" in explained and ("green frame" in explained) == labelled
