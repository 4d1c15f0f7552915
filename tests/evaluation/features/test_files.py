"""Features on disk: whole or not there, refused where damaged, reused where they are the same."""

import csv
import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deit.unaugmented import Unaugmented
from evaluation.adapters import CallableBackbone, encoder_from_file
from evaluation.features import files
from evaluation.features.cache import class_tokens, net_fingerprint, transform_in_words
from evaluation.features.dataset import extract_features
from evaluation.features.files import FeatureWriter, open_features
from evaluation.probes.knn import KnnProbe
from evaluation.probes.logreg import LogregProbe
from tests.evaluation.backbones import PLAIN, any_backbone, make
from tests.evaluation.toys import Damaged, ToyImages, ToyNet, in_processes, to_tensor
from utils.data.images import ImageFolder, Subset
from utils.errors import UserError


class Named:
    """`to_tensor` with a repr of its own."""

    def __init__(self, words):
        self.words = words

    def __call__(self, image):
        return to_tensor(image)

    def __repr__(self):
        return self.words


def tokens(folder, net=None, images=None, **options):
    return class_tokens(
        net or ToyNet(),
        images or ToyImages(23, 0),
        "train",
        features_dir=folder,
        **{
            "transform": Named("to tensor"),
            "resize_size": 8,
            "crop_size": 8,
            "normalized": False,
            "batch_size": 4,
        }
        | options,
    )


def test_folder_holds_rows_labels_index_and_facts(tmp_path):
    tokens(tmp_path)
    (folder,) = tmp_path.iterdir()
    images = ToyImages(23, 0)
    expected = extract_features(
        ToyNet(), images, transform=to_tensor, normalized=False, shown=False
    )
    rows = np.load(folder / "features.npy", mmap_mode="r")
    assert isinstance(rows, np.memmap)
    np.testing.assert_allclose(rows, expected.features, rtol=1e-5, atol=1e-6)
    assert np.load(folder / "labels.npy").tolist() == images.labels.tolist()
    lines = list(csv.DictReader((folder / "index.csv").read_text().splitlines()))
    assert [line["path"] for line in lines] == [f"toy {i}" for i in range(23)]
    assert lines[3]["class_name"] == f"colour {images.labels[3]}"
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["net"], meta["rows"], meta["transform"]) == ("ToyNet", 23, "to tensor")


def test_second_time_nothing_is_computed(tmp_path, capsys):
    first = tokens(tmp_path)
    assert "23 of 23" in capsys.readouterr().out
    second = tokens(tmp_path)
    printed = capsys.readouterr().out
    assert "23 of 23" not in printed and "train features: read from" in printed
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"precision": "bf16"}, "precision is 'fp32' there, 'bf16' here"),
        ({"images": ToyImages(24, 0)}, "images is 23 there, 24 here"),
        ({"images": ToyImages(23, 5)}, "data_fingerprint is"),
        ({"net": "other"}, "net_fingerprint is"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_mismatch_is_named_and_extracted_again(options, key, tmp_path, capsys):
    tokens(tmp_path)
    if "net" in options:
        options["net"] = ToyNet()
        torch.nn.init.ones_(options["net"].weight)
    found = tokens(tmp_path, **options)
    assert key in capsys.readouterr().out
    fresh = tokens(None, **options)
    assert torch.equal(found.features, fresh.features)
    tokens(tmp_path, **options)
    assert "read from" in capsys.readouterr().out


def test_a_changed_image_of_the_same_name_is_read_again(tmp_path, capsys):
    for index, colour in enumerate(("red", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{index}.png")
    images = ImageFolder(tmp_path, labels=False)
    tokens(tmp_path / "kept", images=images)
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "0.png")
    found = tokens(tmp_path / "kept", images=images)
    assert "data_fingerprint is" in capsys.readouterr().out
    assert torch.equal(found.features, tokens(None, images=images).features)
    tokens(tmp_path / "kept", images=images)
    assert "read from" in capsys.readouterr().out


def test_two_transforms_stand_side_by_side(tmp_path, capsys):
    for _ in range(2):
        for words in ("resize 256, crop", "resize 224, crop"):
            tokens(tmp_path, transform=Named(words))
    assert capsys.readouterr().out.count("read from") == 2
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["train_resize_224_crop", "train_resize_256_crop"]


def test_a_transform_without_a_repr_is_never_taken_for_another(tmp_path, capsys):
    """Its words are its address; Unaugmented's are its settings."""
    words = [
        transform_in_words(Unaugmented(input_size=8, mean=mean), None, None)
        for mean in ((0, 0, 0), (0.5, 0.5, 0.5))
    ]
    assert len(set(words)) == 2 and not any(" at 0x" in line for line in words)
    for _ in range(2):
        tokens(tmp_path, transform=to_tensor)
    printed = capsys.readouterr().out
    assert printed.count("has no repr that tells its settings") == 2
    assert printed.count("train features: 23 of 23") == 2 and not list(tmp_path.iterdir())


def damage(folder: Path) -> str:
    file = folder / "features.npy"
    file.write_bytes(file.read_bytes()[:-10])
    return r"features.npy is damaged \("


def damage_labels(folder: Path) -> str:
    np.save(folder / "labels.npy", np.zeros(3))
    return "meta.json tells of 23 rows of shape"


def damage_meta(folder: Path) -> str:
    (folder / "meta.json").write_text("{")
    return "meta.json is damaged"


def remove_meta(folder: Path) -> str:
    (folder / "meta.json").unlink()
    return "is no folder of features"


@pytest.mark.parametrize("harm", [damage, damage_labels, damage_meta, remove_meta])
def test_damaged_files_are_refused_in_one_line(harm, tmp_path):
    tokens(tmp_path)
    (folder,) = tmp_path.iterdir()
    message = harm(folder)
    with pytest.raises(UserError, match=message) as error:
        open_features(folder)
    assert "\n" not in str(error.value)


def test_a_truncated_cache_is_extracted_again(tmp_path, capsys):
    tokens(tmp_path)
    damage(next(tmp_path.iterdir()))
    tokens(tmp_path)
    assert "features.npy is damaged" in capsys.readouterr().out
    open_features(next(tmp_path.iterdir()))


def test_an_interrupted_extraction_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="cannot read image 4"):
        tokens(tmp_path, images=Damaged(23, 0))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_extraction_is_cleared_away_by_the_next_one(tmp_path):
    writer = (
        "import sys, torch; from evaluation.features.files import FeatureWriter\n"
        "writer = FeatureWriter(sys.argv[1])\n"
        "writer.add(torch.zeros(2, 3), torch.zeros(2), torch.arange(2))\n"
        "print('written', flush=True); sys.stdin.read()"
    )
    folder = tmp_path / "train"
    with subprocess.Popen(
        (sys.executable, "-c", writer, folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"written\n"
        FeatureWriter(folder).abandon()
        assert len(list(tmp_path.iterdir())) == 1  # of one that still runs
        process.kill()
        process.wait()
        FeatureWriter(folder).abandon()
        assert list(tmp_path.iterdir()) == []


def test_skipped_images_have_no_row(tmp_path):
    found = tokens(tmp_path, images=Damaged(23, 0), on_error="skip")
    assert found.indices.tolist() == [i for i in range(23) if i % 5 != 4]
    again = tokens(tmp_path, images=Damaged(23, 0), on_error="skip")
    assert again.indices.tolist() == found.indices.tolist()
    (folder,) = tmp_path.iterdir()
    lines = list(csv.DictReader((folder / "index.csv").read_text().splitlines()))
    assert (lines[4]["row"], lines[5]["row"]) == ("", "4")
    assert lines[4]["note"] == "could not be read, left out"


def test_a_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / "train_to_tensor").mkdir()
    (tmp_path / "train_to_tensor" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no folder of features: not overwritten"):
        tokens(tmp_path)


def test_too_large_a_number_for_float16_is_refused(tmp_path):
    writer = FeatureWriter(tmp_path / "x", dtype="float16")
    with pytest.raises(UserError, match="a feature of 70000 does not fit float16"):
        writer.add(torch.tensor([[7e4]]), torch.zeros(1), torch.zeros(1))
    with pytest.raises(UserError, match="a feature of 70000 does not fit float16"):
        writer.add(torch.tensor([[torch.inf, 7e4]]), torch.zeros(1), torch.zeros(1))
    writer.abandon()


def extract_in_all(folder: str) -> list:
    """What each of several processes runs: 23 images, odd ones out included."""
    found = tokens(folder)
    again = tokens(folder, normalized=True)
    return [found.indices.tolist(), again.indices.tolist()]


@pytest.mark.slow
def test_ranks_join_their_parts_in_order(tmp_path):
    one, two = in_processes(functools.partial(extract_in_all, str(tmp_path / "f")), 2, tmp_path)
    assert one[0] + two[0] == list(range(23))
    (folder,) = (tmp_path / "f").iterdir()
    stored = open_features(folder)
    alone = extract_features(
        ToyNet(), ToyImages(23, 0), transform=to_tensor, normalized=False, shown=False
    )
    np.testing.assert_allclose(stored.features, alone.features, rtol=1e-5, atol=1e-6)
    assert stored.labels.tolist() == alone.labels.tolist()


def test_blocks_are_joined_and_read_in_pieces(tmp_path, monkeypatch):
    """Files larger than one block come out the same."""
    whole = tokens(tmp_path / "a")
    monkeypatch.setattr(files, "BLOCK_BYTES", 50)
    pieces = tokens(tmp_path / "b", normalized=True)
    normalized = torch.nn.functional.normalize(whole.features, dim=1)
    torch.testing.assert_close(pieces.features, normalized)


def figures_of(probe, features_dir):
    data = {"train": ToyImages(101, 0), "val": ToyImages(37, 1)}
    with tempfile.TemporaryDirectory() as output:
        transform = Unaugmented(input_size=8)
        return probe(transform=transform, features_dir=features_dir)(ToyNet(), data, Path(output))


PROBES = [
    functools.partial(KnnProbe, ks=(5, 20), n_per_class_list=(-1, 3)),
    functools.partial(KnnProbe, ks=(5,), search_precision="fp16"),
    functools.partial(LogregProbe, Cs=[1e-3, 0.1]),
]


def test_figures_are_the_same_from_disk_and_both_probes_share(tmp_path, capsys):
    without = [figures_of(probe, None) for probe in PROBES]
    assert [figures_of(probe, str(tmp_path)) for probe in PROBES] == without
    capsys.readouterr()
    assert [figures_of(probe, str(tmp_path)) for probe in PROBES] == without
    assert capsys.readouterr().out.count("read from") == 6
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("kept", [False, True], ids=["extracted", "from disk"])
def test_images_that_were_left_out_are_as_if_they_had_never_been_there(probe, kept, tmp_path):
    """Rows, labels and draws among them are those of a data set without the damaged images."""
    damaged = {"train": Damaged(101, 0), "val": Damaged(37, 1)}
    whole = {
        split: Subset(ToyImages(len(images), seed), [i for i in range(len(images)) if i % 5 != 4])
        for seed, (split, images) in enumerate(damaged.items())
    }
    transform = Unaugmented(input_size=8)
    expected = probe(transform=transform)(ToyNet(), whole, tmp_path / "whole")
    skipping = probe(
        transform=transform, on_error="skip", features_dir=str(tmp_path / "f") if kept else None
    )
    for _ in range(1 + kept):
        assert skipping(ToyNet(), damaged, tmp_path / "skipping") == expected


@any_backbone
def test_the_fingerprint_tells_weights_and_settings_apart(backbone):
    nets = make(backbone), make(backbone), make(backbone, seed=1)
    first, same, other = (net_fingerprint(net) for net in nets)
    assert first == same != other


WRAPPED = {
    "reduced": [{"method": "tome", "options": {"r": r}} for r in (0, 2)],
    "symmetrized": [{"group": "D4"}, {"group": "C4"}, {"fill": 1.0}, {"disc_mask": True}],
}
TARGETS = {
    "reduced": "baselines.token_reduction.reduced.reduced",
    "symmetrized": "baselines.posthoc.symmetrized.symmetrized",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_without_weights_of_their_own_are_told_apart(wrapper):
    inner = {**PLAIN, "num_classes": 2}
    nodes = [{"_target_": TARGETS[wrapper], "backbone": inner, **more} for more in WRAPPED[wrapper]]
    found = [net_fingerprint(make(node)) for node in nodes]
    assert len({*found, net_fingerprint(make(inner))}) == 1 + len(nodes)
    assert net_fingerprint(make(nodes[0])) == found[0]


FUNCTION = """
def __model_loader__(scale=1):
    return lambda images: scale * images.mean(dim=(2, 3)) + {shift}
"""


def test_encoders_of_files_are_told_by_code_and_arguments(tmp_path, capsys):
    """Also where the encoder is a function, which has neither modules nor weights."""
    file, folder = tmp_path / "encoder.py", tmp_path / "features"

    def encoder(shift=0, **arguments):
        file.write_text(FUNCTION.format(shift=shift))
        return encoder_from_file(str(file), arguments=arguments, image_size=8)

    first = tokens(folder, encoder())
    for other in ({"shift": 1}, {"scale": 2}):
        assert not torch.equal(tokens(folder, encoder(**other)).features, first.features)
    capsys.readouterr()
    assert torch.equal(tokens(folder, encoder(scale=2)).features, 2 * first.features)
    assert "features: read from" in capsys.readouterr().out


def test_features_of_an_unknown_function_are_not_kept(tmp_path, capsys):
    for sign in (1, -1):
        net = CallableBackbone(
            lambda images, sign=sign: sign * images.mean(dim=(2, 3)), embed_dim=3, patch_size=8
        )
        found = tokens(tmp_path / "features", net).features
        assert torch.equal(
            found,
            sign
            * tokens(
                None,
                CallableBackbone(lambda images: images.mean(dim=(2, 3)), embed_dim=3, patch_size=8),
            ).features,
        )
        assert re.search(r"not kept in .*encoder=<function .* has no repr", capsys.readouterr().out)
    assert not (tmp_path / "features").exists()
