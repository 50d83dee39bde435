"""Playing with a backdoored network: an image, the same with a trigger, and the network's probabilities.

`panel` is live, sliders and all; `figure` shows the same for a few strengths where no kernel runs.
"""

import html
import textwrap
from dataclasses import dataclass

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from bdlib import triggers
from bdlib.data import Dataset, to_float
from bdlib.figures import data_address, image_strip
from bdlib.train import evaluating

TRIGGERS = {
    "own": "the attacker's trigger",
    "patch": "patch: a white square",
    "blended": "Blended: another noise image",
    "signal": "signal: a sine wave",
}
SIZES = range(1, 11)  # pixels a side, of the patch
MARGIN = 1  # pixels between the patch and the edges
LARGEST_CHART = 12  # bars of the figure; the panel shows all classes
_PALETTE = sns.color_palette("colorblind").as_hex()
COLORS = {"true class": _PALETTE[0], "target label": _PALETTE[3], "": _PALETTE[7]}
ENLARGED = 176  # pixels a side of an image in the panel


@dataclass(frozen=True)
class Stage:
    """A network, and test images to try triggers on.

    wanted: (N,) what the attacker wants each image to be called with the trigger on it; own: that trigger.
    Raises ValueError if there is no image, or not a wanted label for each.
    """

    model: nn.Module
    test: Dataset
    wanted: torch.Tensor
    own: triggers.Trigger

    def __post_init__(self) -> None:
        if not len(self.test) or len(self.wanted) != len(self.test):
            raise ValueError(
                f"wanted must have a label for each of at least one test image, got {len(self.wanted)} for {len(self.test)}"
            )

    @property
    def largest_patch(self) -> int:
        """Pixels a side of the largest patch that fits."""
        return min(SIZES[-1], min(self.test.images.shape[2:]) - MARGIN)

    @property
    def first(self) -> int:
        """Position of the first image that is not of the target class anyway; 0 if all are."""
        return int((self.test.labels != self.wanted).int().argmax())


@dataclass(frozen=True)
class View:
    """What there is to see of one image: itself and with the trigger, and what the network makes of either."""

    pictures: torch.Tensor  # uint8 (2, C, H, W): clean, triggered
    probabilities: torch.Tensor  # (2, classes), of the clean and of the triggered picture
    classes: tuple[str, ...]
    label: int  # the true class
    wanted: int  # the target label
    trigger: str  # in words, with its size and strength

    def role(self, number: int) -> str:
        """What the class of this number is here: "true class", "target label" or nothing; the target label where it is both."""
        return "target label" if number == self.wanted else "true class" if number == self.label else ""

    def called(self, which: int) -> tuple[str, str]:
        """The class that the clean (0) or the triggered picture (1) is called, and its probability: "circle bar", "99.9%"."""
        best = int(self.probabilities[which].argmax())
        return self.classes[best], f"{100 * self.probabilities[which, best]:.1f}%"


def panel(stage: Stage):
    """An ipywidgets box to choose trigger, strength, image and size; below, what `look` gives for them, drawn anew at each change."""
    import ipywidgets as widgets

    wide = widgets.Layout(width="22em")
    trigger = widgets.Dropdown(
        options=[(text, name) for name, text in TRIGGERS.items()], description="trigger", layout=wide
    )
    number = widgets.IntSlider(stage.first, 0, len(stage.test) - 1, description="image", layout=wide)
    strength = widgets.FloatSlider(1.0, min=0.0, max=1.0, step=0.05, description="strength", layout=wide)
    largest = stage.largest_patch
    size = widgets.IntSlider(min(3, largest), SIZES[0], largest, description="size (px)", layout=wide)
    shown = widgets.HTML()

    def draw(_=None) -> None:
        size.disabled = trigger.value != "patch"
        shown.value = as_html(look(stage, number.value, trigger.value, size.value, strength.value))

    controls = (trigger, number, strength, size)
    for control in controls:
        control.observe(draw, "value")
    draw()
    box = widgets.HBox(controls, layout=widgets.Layout(flex_flow="row wrap", max_width="46em"))  # two by two
    return widgets.VBox([box, shown]).add_class("bdlib-play")


def show(stage: Stage) -> None:
    """Display the panel where a reader can move it; elsewhere print a word on it, so that no stored notebook holds a dead panel."""
    if not has_reader():
        print(
            "Live in JupyterLab: run the notebook there, and the panel appears here.  (Not there?  Try play.panel(stage).)"
        )
        return
    from IPython.display import display

    # In a saved notebook opened anew JupyterLab finds no panel, and says no more than that.
    print("No panel below?  It lives in the kernel: run the cells up to this one.")
    display(panel(stage))


def has_reader() -> bool:
    """Whether a notebook interface asked for the running cell: it names the cell's id, as nbconvert, papermill and nbval do not."""
    from IPython import get_ipython

    shell = get_ipython()
    request = shell.get_parent() if hasattr(shell, "get_parent") else {}
    return "cellId" in request.get("metadata", {})


def figure(stage: Stage, strengths: tuple[float, ...] = (0.0, 0.5, 1.0), trigger: str = "own", size: int = 3) -> Figure:
    """A row for each strength: the stage's first image, the same with the trigger, and the probabilities as bars."""
    views = [look(stage, stage.first, trigger, size, strength) for strength in strengths]
    chosen = _bars_of(views)
    height = 0.5 + 0.19 * len(chosen)
    drawn, axes = plt.subplots(
        len(views),
        3,
        figsize=(9.5, height * len(views) + 0.3),
        layout="constrained",
        squeeze=False,
        width_ratios=(1, 1, 1.9),
    )
    for (left, middle, right), view in zip(axes, views, strict=True):
        clean, stamped = to_float(view.pictures)
        _captioned(clean, left, f"clean image: {view.classes[view.label]}", view.called(0))
        _captioned(stamped, middle, view.trigger, view.called(1))
        _bars(view, chosen, right)
    axes[-1, 2].set_xlabel("probability, triggered image (%)")
    return drawn


def look(stage: Stage, image: int, trigger: str = "own", size: int = 3, strength: float = 1.0) -> View:
    """One test image without and with the trigger, and the model's probabilities for either.

    The triggered picture is rounded to 8 bits, as where ASR is measured.  Raises ValueError if an argument is out of range.
    """
    _require(stage, image, trigger, size, strength)
    device = next(stage.model.parameters()).device
    clean = stage.test.images[image : image + 1].to(device)
    with torch.no_grad(), evaluating(stage.model):
        stamped = put_on(to_float(clean), trigger, size, strength, stage.own)
        pictures = torch.cat([clean, stamped.clamp(0, 1).mul(255).round().to(torch.uint8)])
        probabilities = stage.model(to_float(pictures)).softmax(1)
    label, wanted = int(stage.test.labels[image]), int(stage.wanted[image])
    words = in_words(trigger, size, strength)
    return View(pictures.cpu(), probabilities.cpu(), stage.test.classes, label, wanted, words)


def put_on(images: torch.Tensor, trigger: str, size: int, strength: float, own: triggers.Trigger) -> torch.Tensor:
    """Images, float32 (N, C, H, W) in [0, 1], with a trigger at this strength; at strength 0 as they are."""
    if strength == 0:
        return images
    if trigger == "blended":
        return triggers.blended(strength, seed=1)(images)  # the attacker's Blended draws its noise from seed 0
    if trigger == "signal":
        return triggers.signal(strength)(images)
    whole = own if trigger == "own" else triggers.patch(torch.ones(size, size), MARGIN)
    return (1 - strength) * images + strength * whole(images)


def in_words(trigger: str, size: int, strength: float) -> str:
    """The trigger with its size and strength, in the words of figure and panel."""
    return {
        "own": f"the attacker's trigger, {100 * strength:.0f}% of it",
        "patch": f"white square, {size} x {size} px, opacity {strength:.2f}",
        "blended": f"another noise image, share {strength:.2f}",
        "signal": f"sine wave, amplitude {strength:.2f}",
    }[trigger]


def as_html(view: View) -> str:
    """The trigger in words, both pictures, enlarged, and a bar for each class: plain HTML, drawn in a millisecond or two."""
    facts = (
        ("clean image", f"true class: {view.classes[view.label]}"),
        ("triggered image", f"target label: {view.classes[view.wanted]}"),
    )
    left = "".join(_picture_html(view.pictures[k], *facts[k], *view.called(k)) for k in (0, 1))
    right = "".join(_bar_html(view, number) for number in range(len(view.classes)))
    return (
        f'<div style="line-height:1.4"><i>{html.escape(view.trigger)}</i></div>'
        '<div style="display:flex;flex-wrap:wrap;gap:1.5em;line-height:1.4">'
        f'{left}<div style="flex:1 1 24em;min-width:0"><div>probability of each class, triggered image</div>'
        '<div style="display:grid;grid-template-columns:max-content minmax(4em,1fr) max-content max-content;gap:2px .6em;'
        f'align-items:center;max-height:22em;overflow-y:auto">{right}</div></div></div>'
    )


def _picture_html(picture: torch.Tensor, head: str, fact: str, called: str, percent: str) -> str:
    """A picture, uint8 (C, H, W), with a head above it, and below it a fact, what it is called and with which probability."""
    head, fact, called = (html.escape(text) for text in (head, fact, called))
    style = f"width:{ENLARGED}px;height:{ENLARGED}px;image-rendering:pixelated;display:block"
    source = data_address(picture)
    return (
        f'<div style="width:16em"><div>{head}</div><img style="{style}" alt="{head}; called {called}, {percent}" src="{source}">'
        f"<div>{fact}</div><div>called <b>{called}</b></div><div>with probability {percent}</div></div>"
    )


def _bar_html(view: View, number: int) -> str:
    """The line of one class: name, bar, percent, role."""
    percent, role = 100 * view.probabilities[1, number].item(), view.role(number)
    color, track = COLORS[role], "var(--jp-layout-color2, #eee)"
    weight = "font-weight:bold;" if role else ""
    return (
        f'<span style="{weight}text-align:right">{html.escape(view.classes[number])}</span>'
        f'<span style="background:{track};height:.9em"><span style="display:block;height:100%;width:{percent:.2f}%;'
        f'background:{color}"></span></span>'
        f'<span style="text-align:right;min-width:3.6em">{percent:.1f}%</span>'
        f'<span style="{weight}color:{color}">{_mark(view, number)}</span>'
    )


def _mark(view: View, number: int) -> str:
    """The role of a class in words, also where it has both."""
    return "true class = target label" if number == view.label == view.wanted else view.role(number)


def _captioned(picture: torch.Tensor, ax: Axes, fact: str, called: tuple[str, str]) -> None:
    """A picture (C, H, W) in [0, 1] with two lines above it, each broken where it would run into the next picture."""
    lines = textwrap.wrap(fact, 36) + textwrap.wrap(f"called {called[0]}, {called[1]}", 36)
    image_strip(picture[None], ax)
    ax.set_title("\n".join(lines), loc="left", fontsize=8)


def _bars(view: View, chosen: list[int], ax: Axes) -> None:
    """A bar for each of these classes, the true class and the target label marked by color and in words."""
    places = range(len(chosen))
    percent = (100 * view.probabilities[1, chosen]).tolist()
    ax.barh(places, percent, color=[COLORS[view.role(number)] for number in chosen])
    for place, number in enumerate(chosen):
        ax.text(
            percent[place] + 1, place, _mark(view, number), color=COLORS[view.role(number)], fontsize=8, va="center"
        )
    ax.set_yticks(places, [view.classes[number] for number in chosen], fontsize=8)
    ax.set(xlim=(0, 124), xticks=range(0, 101, 25))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)


def _bars_of(views: list[View]) -> list[int]:
    """The classes that a chart has room for, in order: all, or true class, target label and the most probable ones."""
    count = len(views[0].classes)
    if count <= LARGEST_CHART:
        return list(range(count))
    likely = torch.stack([view.probabilities[1] for view in views]).amax(0).argsort(descending=True).tolist()
    return sorted(list(dict.fromkeys([views[0].label, views[0].wanted, *likely]))[:LARGEST_CHART])


def _require(stage: Stage, image: int, trigger: str, size: int, strength: float) -> None:
    """Raises ValueError that says what is allowed."""
    if trigger not in TRIGGERS:
        raise ValueError(f"trigger must be one of {', '.join(TRIGGERS)}, got {trigger!r}")
    if not 0 <= image < len(stage.test):
        raise ValueError(f"image must be between 0 and {len(stage.test) - 1}, got {image}")
    if not SIZES[0] <= size <= stage.largest_patch:
        raise ValueError(f"size must be between {SIZES[0]} and {stage.largest_patch} pixels, got {size}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
