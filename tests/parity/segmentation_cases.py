"""Runners of the cases about segmentation probes on patches."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from evaluation.segmentation.fit_rows import FitRows
from evaluation.segmentation.iou import Confusion
from evaluation.segmentation.patch_knn import PatchKnn
from evaluation.segmentation.patch_logreg import PatchLogreg
from evaluation.segmentation.patches import extract_patches, majority_labels, split_images
from evaluation.segmentation.probe import SegmentationProbe
from evaluation.segmentation.standardize import Standardizer, fit_standardizer
from evaluation.segmentation.store import PatchStore, Shape
from tests.parity.harness import NotBuilt, Runner, check, load
from utils.data.segmentation import MaskedImages, ade20k, voc2012
from vit.backbone import Features

CPU = torch.device("cpu")
SPLITS = {
    "ADE20K": {"train": "training", "val": "training", "test": "validation"},
    "VOC2012": {"train": "train", "val": "train", "test": "val"},
}
# Published keywords of the classifiers -> ours; None: of their device, or without a part in ours.
KEYWORDS: dict[str, dict[str, str | None]] = {
    "knn": {
        "distance": "distances",
        "train_set_subsampling": "subsampling",
        "train_set_chunk_size": "chunk_size",
        "inference_bs": "query_batch",
        "dtype": "search_precision",
        "device": None,
    },
    "logreg": {
        "train_set_subsampling": "subsampling",
        "lbfgs_hessian_rank": "history",
        "linesearch_max_iter": None,
        "inference_bs": None,
    },
}


class PatchConvolution(nn.Module):
    """An encoder of one convolution."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.embed_dim, self.patch_size = weight.shape[0], weight.shape[-1]

    def features(self, images: Tensor, layers: tuple[int, ...] = (-1,)) -> list[Features]:
        found = nn.functional.conv2d(images, self.weight, self.bias, stride=self.patch_size)
        patches = found.permute(0, 2, 3, 1)
        return [Features(patches.mean((1, 2)), patches) for _ in layers]


def make_store(features: Tensor, labels: Tensor, folder: Path | None = None) -> PatchStore:
    """A store of one patch per image."""
    shape = Shape(len(features), 1, labels.shape[1], features.shape[1])
    store = PatchStore(shape, dtype=torch.float32, folder=folder)
    store.write(0, features, labels, majority_labels(labels))
    return store


def seg_extract(case: dict[str, Any], folder: Path) -> None:
    """Features and labels by patch, the pixels of one patch row by row."""
    stored = load(case, folder)
    net = PatchConvolution(stored["state.weight"], stored["state.bias"])
    images, masks = stored["in.images"], stored["in.labels"]
    (height, width), patch = images.shape[-2:], case["args"]["patch_size"]
    patches = (height // patch) * (width // patch)
    shape = Shape(len(images), patches, patch**2, net.embed_dim)
    store = PatchStore(shape, dtype=torch.float32, folder=None)
    extract_patches(
        net,
        _Tensors(images, masks),
        range(len(images)),
        store,
        resolution=width,
        batch_size=case["args"]["batch_size"],
        transform=_unchanged,
    )
    features = store.rows.read(0, store.num_rows).view(stored["out.features"].shape)
    check("features", features, stored["out.features"], _tolerance(case), "close")
    labels = store.labels.view(stored["out.labels"].shape)
    check("labels", labels, stored["out.labels"], 0, "exact")


def seg_knn(case: dict[str, Any], folder: Path) -> None:
    """Predictions of each pixel and scores, from memory at once and from a file in small chunks."""
    stored, args = load(case, folder), case["args"]
    precision = "bf16" if args.get("dtype") == "bfloat16" else "fp32"
    for chunk_size, query_batch, in_file in (
        (args["chunk"] or len(stored["in.train_features"]), args["inference_bs"], False),
        (37, 11, True),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            where = Path(scratch) if in_file else None
            train = make_store(stored["in.train_features"], stored["in.train_labels"], where)
            test = make_store(stored["in.test_features"], stored["in.test_labels"], where)
            classifier = PatchKnn(
                num_neighbors=args["ks"],
                distances=args["distances"],
                search_precision=precision,
                chunk_size=chunk_size,
                query_batch=query_batch,
                subsampling=args["subsampling"],
            )
            rows = _rows([train], args, chunk_size)
            for key, scores in classifier.score(rows, test, device=CPU).items():
                k, distance = classifier.points[key]
                point = f"{distance}/{k}"
                predictions = classifier.fit_and_predict(rows, test, key, device=CPU)
                predicted = torch.cat([labels for _, labels in predictions])
                check(point, predicted, stored[f"out.preds/{point}"], 0, "exact")
                _check_scores(case, point, scores)


def seg_logreg(case: dict[str, Any], folder: Path) -> None:
    """Coefficients, predictions and scores for each C, solved to convergence as those stored.

    The optimum does not depend on the memory of L-BFGS; with the published 5 it takes thousands of
    steps where C is large and the classes hardly overlap.
    """
    stored, args, expected = load(case, folder), case["args"], case["expected"]
    train = make_store(stored["in.train_features"], stored["in.train_labels"])
    test = make_store(stored["in.test_features"], stored["in.test_labels"])
    classifier = PatchLogreg(
        C=args["C"], subsampling=args["subsampling"], dtype="float64", history=50
    )
    rows = _rows([train], args, 64)
    assert rows.classes.tolist() == expected["classes"]
    assert rows.count == expected["kept_patches"]
    scores = classifier.score(rows, test, device=CPU)
    for number, key in enumerate(classifier.points):
        predictions = classifier.fit_and_predict(rows, test, key, device=CPU)
        predicted = torch.cat([labels for _, labels in predictions])
        assert bool((predicted == predicted[:, :1]).all())
        check(key, predicted[:, 0], stored[f"out.patch_preds/{number}"], 0, "exact")
        for ours, theirs in (("coef_", "coef"), ("intercept_", "intercept")):
            value = classifier.fitted[ours]
            if len(stored[f"out.{theirs}/{number}"]) < len(value) == 2:
                continue  # scikit-learn's one row for two classes, of which the mean leaves nothing
            tolerance = case["tolerance"][f"out.{theirs}"]
            check(
                f"{key} {ours}",
                value - value.mean(0),
                stored[f"out.{theirs}/{number}"],
                tolerance,
                "close",
            )
        _check_scores(case, str(number), scores[key])


def seg_metrics(case: dict[str, Any], folder: Path) -> None:
    """mIoU and accuracy under each list of ignored labels."""
    stored = load(case, folder)
    for ignored in case["args"]["ignore_sets"]:
        confusion = Confusion()
        for target, prediction in zip(
            stored["in.target"].split(7), stored["in.preds"].split(7), strict=True
        ):
            confusion.add(target, prediction)
        _check_scores(case, json.dumps(ignored), confusion.scores(ignored))


def standardize(case: dict[str, Any], folder: Path) -> None:
    """Every method, fitted chunk by chunk, on other rows."""
    stored = load(case, folder)
    train, other = stored["in.train"], stored["in.other"]
    for key in (name for name in stored if name.startswith("out.")):
        method = key.removeprefix("out.").removeprefix("abs.")
        found = fit_standardizer(method, lambda: train.split(33), dim=train.shape[1])(other)
        found = found.abs() if "abs." in key else found
        check(method, found, stored[key], case["tolerance"], "close")


def seg_e2e(case: dict[str, Any], folder: Path) -> None:
    """From a tree of files to the published result file, predictions and dumped features."""
    stored, args, expected = load(case, folder), case["args"], case["expected"]
    if "in.val_images" not in stored:
        train, val = split_images(len(stored["in.train_images"]), seed=args["seed"])
        assert val + train == expected["permutation"]
    net = PatchConvolution(stored["state.weight"], stored["state.bias"])
    with tempfile.TemporaryDirectory() as temporary:
        root, output = Path(temporary, "root"), Path(temporary, "output")
        write = {"ADE20K": _write_ade20k, "VOC2012": _write_voc2012}[args["dataset"]]
        data = {
            part: write(root / part, part, stored[f"in.{part}_images"], stored[f"in.{part}_labels"])
            for part in ("train", "test", "val")
            if f"in.{part}_images" in stored
        }
        probe = SegmentationProbe(
            **data,
            classifiers=args["classifiers"],
            **_classifiers(args.get("classifiers_kwargs") or {}),
            ignore_labels=args["ignore_labels"],
            standardization=args["standardization"] or "none",
            resolution=args["resolution"],
            batch_size=args["batch_size"],
            seed=args["seed"],
            dump_features=True,
            dump_predictions=True,
            dump_classifier=True,
        )
        probe(net, {}, output)
        written = {path.name for path in output.glob("*.pth")}
        assert written == set(expected["files_written"])
        results = json.loads((output / "results_eval_segmentation.json").read_text())["results"]
        assert list(map(_our_key, results)) == list(map(_our_key, expected["results"]))
        for (key, value), ours in zip(expected["results"].items(), results.values(), strict=True):
            tolerance = case["tolerance"]["results knn" if "knn" in key else "results logreg"]
            check(key, ours, value, tolerance, "absolute")
        features = torch.load(output / "features.pth")
        _check_dumps(case, stored, features)
        for name in args["classifiers"]:
            ours = torch.load(output / f"preds_{name}.pth")
            equal = (ours == stored[f"out.preds_{name}"]).float().mean()
            assert ours.shape == stored[f"out.preds_{name}"].shape and equal >= 0.995, name


def _check_dumps(case: dict[str, Any], stored: dict[str, Tensor], features: Any) -> None:
    rows, labels = features["features"], features["labels"]
    theirs = stored["out.train_features_std"]
    tolerance = case["tolerance"]["out.train_features_std"]
    check("features", rows["train"][: len(theirs)], theirs, tolerance, "close")
    for name, split in (("train_first_rows_labels", "train"), ("val_labels", "val")):
        theirs = stored[f"out.{name}"]
        check(name, labels[split][: len(theirs)], theirs, 0, "exact")


def _classifiers(given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our classifiers of published keywords; NotBuilt for a grid over more than C."""
    found: dict[str, Any] = {}
    for name, keywords in given.items():
        if len(keywords.get("linesearch_max_iter", ())) > 1:
            raise NotBuilt("a grid over a setting of cuML's")
        ours = {KEYWORDS[name].get(key, key): value for key, value in keywords.items()}
        ours = {key: value for key, value in ours.items() if key and value is not None}
        if "search_precision" in ours:
            bf16 = ours["search_precision"] == "bfloat16"
            ours["search_precision"] = "bf16" if bf16 else "fp32"
        for key in ("max_iter", "tol", "history"):
            if key in ours:
                if len(ours[key]) > 1:
                    raise NotBuilt(f"a grid over {key}")
                (ours[key],) = ours[key]
        found[name] = {"knn": PatchKnn, "logreg": PatchLogreg}[name](**ours)
    return found


def _our_key(key: str) -> str:
    """A published key without cuML's bound on line searches, with C as a decimal number."""
    key = re.sub(r"_linesearch_max_iter=\d+", "", key)
    return re.sub(r"(?<=_C=)[^_]+", lambda found: str(float(found[0])), key)


def _write_ade20k(root: Path, part: str, images: Tensor, masks: Tensor) -> MaskedImages:
    """ADE20K's tree, with lossless content where the ending promises JPEG."""
    base, split = root / "ADEChallengeData2016", SPLITS["ADE20K"][part]
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        for kind, array, suffix in (("images", image, ".jpg"), ("annotations", mask, ".png")):
            path = base / kind / split / f"ADE_{number:05d}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.numpy()).save(path, "PNG")
    return ade20k(root, split=split)


def _write_voc2012(root: Path, part: str, images: Tensor, masks: Tensor) -> MaskedImages:
    """VOC's tree, masks with a palette, with lossless content where the ending promises JPEG."""
    base, split = root / "VOCdevkit/VOC2012", SPLITS["VOC2012"][part]
    names = [f"2007_{number:06d}_{split}" for number in range(len(images))]
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
    for name, image, mask in zip(names, images, masks, strict=True):
        Image.fromarray(image.numpy()).save(base / f"JPEGImages/{name}.jpg", "PNG")
        indices = Image.fromarray(mask.numpy(), "P")
        indices.putpalette([37 * value % 256 for value in range(768)])
        indices.save(base / f"SegmentationClass/{name}.png")
    return voc2012(root, split=split)


class _Tensors:
    """Stored tensors in the shape of a data set."""

    name, class_names, ignore_labels = "stored", [str(n) for n in range(256)], ()

    def __init__(self, images: Tensor, masks: Tensor) -> None:
        self.images, self.masks = images, masks

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def read_mask(self, index: int) -> Tensor:
        return self.masks[index]

    def path(self, index: int) -> str:
        return f"image {index}"


def _unchanged(pair: Any) -> Any:
    return pair


def _rows(stores: list[PatchStore], args: dict[str, Any], chunk_size: int) -> FitRows:
    return FitRows(
        stores,
        ignore_labels=args["ignore_labels"],
        standardizer=Standardizer(),
        subsampling=args["subsampling"],
        chunk_size=chunk_size,
    )


def _check_scores(case: dict[str, Any], key: str, scores: Any) -> None:
    expected, tolerance = case["expected"]["scores"][key], case["tolerance"]["scores"]
    check(f"{key} mIoU", scores.miou, expected["mIoU"], tolerance, "absolute")
    check(f"{key} acc", scores.acc, expected["acc"], tolerance, "absolute")


def _tolerance(case: dict[str, Any]) -> dict[str, float]:
    return {key: case["tolerance"][key] for key in ("atol", "rtol")}


RUNNERS: dict[tuple[str, str], Runner] = {
    ("evaluation", "seg_extract"): seg_extract,
    ("evaluation", "seg_knn"): seg_knn,
    ("evaluation", "seg_logreg"): seg_logreg,
    ("evaluation", "seg_metrics"): seg_metrics,
    ("evaluation", "standardize"): standardize,
    ("evaluation", "seg_e2e"): seg_e2e,
}
