"""Every picture of `draw.py`, of every kind of net, and its complaints."""

import pytest
import torch
from PIL import Image

from evaluation.commands.draw import parse_drawing
from evaluation.draw import draw
from evaluation.image_size import image_size_of
from evaluation.nets import make_net
from evaluation.sample import sample_images, spread
from tests.evaluation.backbones import BACKBONES, any_backbone
from tests.evaluation.toys import ToyImages, in_processes
from utils.data.segmentation import scenes
from utils.data.segmentation_transforms import squash_to_tensor
from utils.errors import UserError


@pytest.fixture(autouse=True)
def embedded(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("OCTIC_DATA", str(tmp_path_factory.getbasetemp() / "data"))


def config(*words, backbone=BACKBONES["timm"]):
    return {**parse_drawing([*map(str, words), "device=cpu"]), "backbone": backbone}


@any_backbone
def test_pca_and_attention_of_any_net(backbone, tmp_path):
    for name in ("pca", "attention"):
        paths = draw(config(name, tmp_path, "num_images=1", backbone=backbone))
        assert paths[0] == tmp_path / f"{name}.png" and all(path.is_file() for path in paths)


def test_pca_in_capis_style(tmp_path):
    paths = draw(config("pca", tmp_path, "style=capi", "num_images=2"))
    assert [path.name for path in paths[::2]] == ["0000000_pca_sep.png", "0000001_pca_sep.png"]
    assert len(list((tmp_path / "artifacts").glob("0000001_*"))) == 38


def test_neighbours(tmp_path):
    words = ("num_train=40", "num_queries=2", "k=3")
    assert draw(config("neighbours", tmp_path, *words)) == [tmp_path / "neighbours.png"]


@pytest.mark.slow
@any_backbone
def test_segmentation_by_knn_and_from_a_file(backbone, tmp_path):
    words = ("num_train=6", "num_images=2", "num_neighbors=3", "image_size=64")
    paths = draw(config("segmentation", tmp_path, *words, backbone=backbone))
    assert paths == [tmp_path / "segmentation.png"] and paths[0].is_file()


def test_dumped_predictions_are_put_together_patch_by_patch(tmp_path, monkeypatch):
    """Patches in rows of the grid, pixels in rows of the patch: the true masks come out whole."""
    test = scenes(split="val")
    masks = torch.stack([torch.from_numpy(test.read_mask(index)) for index in range(len(test))])
    rows = masks.unflatten(1, (8, 16)).unflatten(3, (8, 16)).transpose(2, 3).flatten(3)
    torch.save(rows.flatten(0, 2), tmp_path / "preds.pth")
    drawn = {}

    def keep(images, masks, predictions, path, **rest):
        drawn.update(masks=masks, predictions=predictions)
        return path

    monkeypatch.setattr("evaluation.draw.draw_segmentation", keep)
    draw(config("segmentation", tmp_path, f"predictions={tmp_path}/preds.pth", "num_images=3"))
    assert len(drawn["masks"]) == 3
    for mask, found in zip(drawn["masks"], drawn["predictions"], strict=True):
        assert (mask == found).all()


def test_predictions_of_other_images_are_refused(tmp_path):
    torch.save(torch.zeros(81, 16, dtype=torch.uint8), tmp_path / "preds.pth")
    words = ("segmentation", tmp_path, f"predictions={tmp_path}/preds.pth")
    with pytest.raises(UserError, match="no predictions of the patches of 80 images"):
        draw(config(*words))
    (tmp_path / "preds.pth").write_text("nothing")
    with pytest.raises(UserError, match="not a file of predictions"):
        draw(config(*words))
    with pytest.raises(UserError, match="no such file of predictions"):
        draw(config("segmentation", tmp_path, f"predictions={tmp_path}/other.pth"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pca", "style=theirs"), "style must be one of ours, capi, not 'theirs'"),
        (("pca", "element=rm"), "element must be one of e, "),
        (("pca", "num_images=0"), "0 images of 32 pixels"),
        (("pca", "style=capi", "num_images=0"), "num_images is 0"),
        (("pca", "image_size=0"), "image_size must be a whole number from 1, not 0"),
        (("attention", "query=all"), "query must be one of "),
        (("attention", "block=9"), "block 9 asked of a net with attention in 4 blocks"),
        (("neighbours", "k=0"), "k must be a whole number from 1, not 0"),
        (("segmentation", "num_images=0"), "num_images must be a whole number from 1, not 0"),
        (("attention", "rolout=true"), "takes no 'rolout'; did you mean 'rollout'?"),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path):
    with pytest.raises(UserError) as raised:
        draw(config(words[0], tmp_path, *words[1:]))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "error: which? (pictures: attention, neighbours, pca, segmentation, token_mask)"),
        (["attentoin"], "error: no picture 'attentoin'; did you mean 'attention'?"),
        (["pca", "a", "b"], "error: too many words, 'pca' and 'a' and 'b'"),
        (["pca", "--weights"], "error: --weights needs a value"),
        (
            ["pca", "--model", "swagg"],
            "neither of ours nor of timm; did you mean one of swag_vit_b",
        ),
        (["pca", "--model", "vit_smal_patch16_224"], "did you mean 'vit_small_patch16_224'?"),
        (["pca", "backbone=swagg"], "there is no backbone=swagg (--model swagg); did you mean one"),
    ],
)
def test_a_bad_command_line_is_one_line_and_code_2(argv, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse_drawing(argv)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("\n") == 1


def test_words_of_the_command_line():
    found = parse_drawing(["neighbours", "out put", "--model", "vit_tiny_patch16_224", "k=3"])
    assert found["output_dir"] == "out put" and found["picture"]["k"] == 3
    assert found["backbone"]["model_name"] == "vit_tiny_patch16_224"
    assert found["data"]["val"]["_target_"].endswith("digits")
    found = parse_drawing(["segmentation", "out", "train.root=here", "seed=3"])
    assert found["picture"]["train"]["root"] == "here" and found["seed"] == 3


def test_a_few_of_many_are_spread_evenly():
    assert spread(9, 3) == [0, 4, 8] and spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 5) == spread(3, 3) == [0, 1, 2] and spread(9, 1) == [0] and spread(9, 0) == []


def test_more_crops_than_images_and_sizes_of_nets():
    images = ToyImages(2, 0)
    found = sample_images(images, size=8, count=5)
    assert found.shape == (5, 3, 8, 8)
    assert len({crop.numpy().tobytes() for crop in found}) == 5
    assert squash_to_tensor(images.read(0), 8).shape == (3, 8, 8)
    for backbone in BACKBONES.values():
        assert image_size_of(make_net(backbone, None)) == 32


def one_of_two() -> list[str]:
    return [str(path) for path in draw(parse_drawing(WORDS) | {"backbone": BACKBONES["octic"]})]


WORDS = ["pca", "drawn", "num_images=1", "device=cpu"]


@pytest.mark.slow
def test_two_processes_draw_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert in_processes(one_of_two, 2, tmp_path) == [["drawn/pca.png"], []]
    with Image.open("drawn/pca.png") as picture:
        assert min(picture.size) > 100
