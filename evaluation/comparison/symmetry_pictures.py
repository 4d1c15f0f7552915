"""Pictures of the comparison: accuracy over the angle, latent maps under rotation, an animation.

Letters: H side in pixels, h w grid of patches, D channels, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from evaluation.comparison.symmetry_views import Judged, shift, turn
from evaluation.features.dataset import device_of
from evaluation.features.reading import features_of
from evaluation.pictures.figures import grid, save, visible
from evaluation.pictures.pca import pca_colours
from utils.folders import make_folder
from utils.symmetry import transform_image

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "90°": lambda x: transform_image(x, "r"),
    "45°": lambda x: turn(x, 45),
    "20°": lambda x: turn(x, 20),
    "mirrored": lambda x: transform_image(x, "m"),
    "shifted": lambda x: shift(x, 3 * x.shape[-1] // 32),
}
FRAMES = 36
FRAME_MS = 120
MOST_BARS = 6  # nets beside each other in the animation


def draw_comparison(
    nets: Mapping[str, Any],
    image: Tensor,
    judged: Mapping[str, Judged],
    folder: Path,
    class_names: Sequence[str],
) -> dict[str, Path]:
    """Draw all pictures, by turning `image` [3 H H]; returns what each shows -> its file.

    The accuracy over the angle is left out where no angles were measured.
    """
    found, by_angle = dict[str, Path](), folder / "accuracy_by_angle.png"
    if any(part.by_angle for part in judged.values()):
        found["accuracy over the angle"] = draw_angles(judged, by_angle)
    else:  # That of an earlier call would stand beside results it does not belong to.
        by_angle.unlink(missing_ok=True)
    shown = _one_wrapped(nets)
    maps = draw_latent_maps(shown, image[None], folder / "latent_maps.png")
    if maps:
        found["latent maps under rotation"] = maps
    found["an animation"] = animate(shown, image[None], folder / "turning.gif", class_names)
    return found


def draw_angles(judged: Mapping[str, Judged], path: Path) -> Path:
    """Accuracy of each net over the angle, and of images turned there and back."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for number, (name, part) in enumerate(judged.items()):
        around = [*part.by_angle, 360.0]
        style = "-" if number < 10 else "--"
        values = [*part.by_angle.values(), part.by_angle[0.0]]
        axis.plot(around, values, f"o{style}", markersize=3, color=f"C{number % 10}", label=name)
    control: dict[float, list[float]] = {}
    for part in judged.values():
        for angle, value in part.there_and_back.items():
            control.setdefault(angle, []).append(value)
    means = {angle: sum(values) / len(values) for angle, values in control.items()}
    if means:  # quarter turns alone have no control
        axis.plot([*means], [*means.values()], "k:", label="there and back, mean of all")
    for quarter in range(0, 361, 90):
        axis.axvline(quarter, color="0.85", linewidth=0.8, zorder=0)
    axis.set(xlim=(-5, 365), xticks=range(0, 361, 45), ylim=(0, 102))
    axis.set(xlabel="angle (degrees counter-clockwise)", ylabel="accuracy %")
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    return save(figure, path)


@torch.inference_mode()
def draw_latent_maps(nets: Mapping[str, Any], image: Tensor, path: Path) -> Path | None:
    """One row per net, one column per view of `image` [1 3 H H]: its patches as colours.

    One PCA serves all views of a net, so that equal features have equal colours. None where no net
    gives a map.
    """
    views = {title: view(image) for title, view in VIEWS.items()}
    rows = {name: found for name, net in nets.items() if (found := _maps(net, views)) is not None}
    if not rows:
        return None
    figure, axes = grid(1 + len(rows), len(views), cell=1.3)
    for column, (title, images) in enumerate(views.items()):
        axes[0][column].set_title(title, fontsize=9)
        axes[0][column].imshow(visible(images)[0].numpy())
    for row, (name, maps) in enumerate(rows.items(), start=1):
        axes[row][0].set_ylabel(name, fontsize=7)
        for column, colours in enumerate(maps):
            axes[row][column].imshow(colours.numpy(), interpolation="nearest")
    return save(figure, path)


def _maps(net: Any, views: Mapping[str, Tensor]) -> Tensor | None:
    """Colours [V h w 3] of a net's patches under every view; None for a net without a map."""
    if not hasattr(net, "features"):
        return None
    images = torch.cat(list(views.values())).to(device_of(net))
    try:
        # At twice the training size there are four times as many patches to show.
        double = torch.nn.functional.interpolate(images, scale_factor=2, mode="bicubic")
        patches = features_of(net, double)[0].patches
    except (ValueError, RuntimeError):  # a net of one size
        patches = features_of(net, images)[0].patches
    if patches is None or patches.shape[-1] < 3 or patches.shape[1] * patches.shape[2] < 3:
        return None
    return pca_colours(patches.float().cpu())


@torch.inference_mode()
def animate(nets: Mapping[str, Any], image: Tensor, path: Path, class_names: Sequence[str]) -> Path:
    """A turning image [1 3 H H] beside each net's probabilities, as a gif."""
    angles = [360 * frame / FRAMES for frame in range(FRAMES)]
    turned = torch.cat([turn(image, angle) for angle in angles])
    shown = dict(list(nets.items())[:MOST_BARS])
    bars = {name: net(turned.to(device_of(net))).softmax(-1).cpu() for name, net in shown.items()}
    film = _Film(visible(turned).numpy(), {n: p.numpy() for n, p in bars.items()}, class_names)
    frames = [film.frame(index, angle) for index, angle in enumerate(angles)]
    make_folder(path.parent)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return path


class _Film:
    """One figure for all frames, whose picture and bars are updated, as its layout is slow."""

    def __init__(
        self, pictures: np.ndarray, bars: Mapping[str, np.ndarray], class_names: Sequence[str]
    ) -> None:
        self.pictures, self.values = pictures, list(bars.values())
        self.figure = Figure(figsize=(2 + 1.5 * len(bars), 2.4), dpi=80, layout="constrained")
        self.canvas = FigureCanvasAgg(self.figure)
        axes = self.figure.subplots(1, 1 + len(bars), squeeze=False)[0]
        self.axis, self.shown = axes[0], axes[0].imshow(pictures[0])
        axes[0].set(xticks=[], yticks=[], title="000°")
        self.bars = []
        for axis, (name, values) in zip(axes[1:], bars.items(), strict=True):
            self.bars.append(axis.barh(range(values.shape[1]), values[0]))
            axis.set(xlim=(0, 1), xticks=[], yticks=range(values.shape[1]))
            labels = class_names or range(values.shape[1])
            axis.set_yticklabels([str(word)[:5] for word in labels], fontsize=6)
            axis.invert_yaxis()
            axis.set_title(name.replace(" + ", "\n+ "), fontsize=8)
        self.canvas.draw()
        self.figure.set_layout_engine("none")

    def frame(self, index: int, angle: float) -> Image.Image:
        """The picture at one angle, with every net's probabilities; the highest stands out."""
        self.shown.set_data(self.pictures[index])
        self.axis.set_title(f"{angle:.0f}°")
        for bars, values in zip(self.bars, self.values, strict=True):
            best = int(values[index].argmax())
            for place, bar in enumerate(bars):
                bar.set_width(float(values[index, place]))
                bar.set_color("C1" if place == best else "C0")
        self.canvas.draw()
        return Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").quantize(64)


def _one_wrapped(nets: Mapping[str, Any]) -> dict[str, Any]:
    """The nets, with only the first of the wrapped ones, as these look alike."""
    wrapped = [name for name in nets if " + " in name]
    return {name: net for name, net in nets.items() if name not in wrapped[1:]}
