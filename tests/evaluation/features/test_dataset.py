"""Features come in the order of the data set; the mode of the net is put back afterwards."""

import pytest
import torch

from evaluation.features.dataset import evaluating, extract_features, gather_labels, own_batches
from tests.evaluation.toys import ToyImages, ToyNet, to_tensor
from utils import distributed
from utils.errors import UserError


def test_rows_are_normalised_and_in_order():
    data, net = ToyImages(23, 0), ToyNet().eval()
    found = extract_features(net, data, transform=to_tensor, batch_size=4, shown=False)
    images = torch.stack([to_tensor(data.read(index)) for index in range(23)])
    expected = torch.nn.functional.normalize(net.features(images)[0].cls, dim=-1)
    torch.testing.assert_close(found.features, expected)
    assert found.indices.tolist() == list(range(23))
    assert found.labels.tolist() == data.labels.tolist()
    assert torch.equal(gather_labels(found), found.labels)


def test_mode_of_every_part_is_kept():
    net = ToyNet().train()
    net.dropout.eval()
    with evaluating(net):
        assert not net.training
    assert net.training and not net.dropout.training


def test_store_can_be_half_precision():
    found = extract_features(
        ToyNet(), ToyImages(5, 0), transform=to_tensor, dtype=torch.float16, shown=False
    )
    assert found.features.dtype == torch.float16


def test_unknown_precision_lists_the_known():
    with (
        pytest.raises(ValueError, match="must be one of fp32, bf16, fp16"),
        evaluating(ToyNet(), "half"),
    ):
        pass


class Overflowing(ToyNet):
    """A net whose features of the third image of a batch are not finite."""

    def features(self, images, layers=(-1,)):
        images = images.clone()
        images[2] = torch.inf
        return super().features(images, layers)


def test_features_that_are_not_finite_are_refused_by_the_name_of_the_image():
    with pytest.raises(UserError, match="need finite features; some of toy 2 are inf or nan"):
        extract_features(Overflowing(), ToyImages(9, 0), transform=to_tensor, shown=False)


@pytest.mark.parametrize(
    ("count", "rank", "own", "called_with"),
    [(9, 0, [0, 2, 4, 6, 8], []), (9, 1, [1, 3, 5, 7], [7]), (1, 1, [], [0])],
)
def test_a_rank_with_fewer_images_makes_the_calls_of_the_others(
    count, rank, own, called_with, monkeypatch
):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    data, calls = ToyImages(count, 0), []
    batches = own_batches(data, to_tensor, 1, call=calls.append, label="images", shown=False)
    assert [int(index) for _, _, indices in batches for index in indices] == own
    assert len(calls) == len(called_with)
    for images, index in zip(calls, called_with, strict=True):
        assert torch.equal(images, to_tensor(data.read(index))[None])


def test_progress_names_rate_and_end(capsys):
    extract_features(ToyNet(), ToyImages(9, 0), transform=to_tensor, label="train features")
    assert "train features: 9 of 9" in capsys.readouterr().out
