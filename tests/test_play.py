"""The panel of 00: what it shows is what the model gives for that very picture."""

import base64
import html
import io
import json
import re
from types import SimpleNamespace

import IPython
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from bdlib import play, poison, triggers
from bdlib.data import to_float
from tests.stored import NOTEBOOKS


@pytest.fixture
def triggered(tiny):
    """Every image of `tiny` with Blended on it; the attacker wants class 1."""
    return poison.triggered_test(tiny, poison.Attack(name="blended", target_label=1))


@pytest.fixture
def stage(tiny, network, triggered):
    # So that pictures that differ a little are called differently, and with other probabilities.
    with torch.no_grad():
        network[-1].weight *= 40
    return play.Stage(network, tiny, triggered.wanted, poison.Attack(name="blended", target_label=1).stamps().test)


@pytest.fixture
def panel(stage):
    return play.panel(stage)


def move(panel, **values):
    """Set the panel's controls: trigger, image, strength or size."""
    for control in panel.children[0].children:
        name = control.description.partition(" ")[0]
        if name in values:
            control.value = values[name]


def shown(panel):
    """What a reader sees: the pictures (2, 3, H, W), uint8, percent by class, and the text."""
    source = panel.children[1].value
    files = [base64.b64decode(found) for found in re.findall(r"base64,([^\"]+)\"", source)]
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    text = html.unescape(re.sub(r"(\s*<[^>]*>\s*)+", "|", source))
    lines = re.findall(r"\|(\w+)\|([\d.]+)%(?:\|(true class = target label|true class|target label))?", text)
    bars = {name: (float(percent), role) for name, percent, role in lines}
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), bars, text


def expected(stage, picture):
    """The model's percent for one picture, uint8 (3, H, W)."""
    with torch.no_grad():
        return 100 * stage.model.eval()(to_float(picture[None])).softmax(1)[0]


@pytest.mark.parametrize(
    "values",
    [
        {"trigger": "patch", "size": 2, "strength": 0.5},
        {"trigger": "patch", "size": 6, "strength": 1.0, "image": 5},
        {"trigger": "blended", "strength": 0.35},
        {"trigger": "signal", "strength": 0.6, "image": 7},
        {"trigger": "own", "strength": 0.4, "image": 35},
    ],
)
def test_a_moved_slider_changes_picture_and_probabilities_to_the_models(stage, panel, values):
    move(panel, strength=0.0)
    before = panel.children[1].value
    move(panel, **values)
    pictures, bars, _ = shown(panel)
    assert panel.children[1].value != before and not torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], stage.test.images[values.get("image", stage.first)])
    percent = [bars[name][0] for name in stage.test.classes]
    assert percent == pytest.approx(expected(stage, pictures[1]).tolist(), abs=0.0501)


def test_the_captions_name_true_class_target_label_and_what_each_picture_is_called(stage, panel):
    move(panel, image=3, trigger="patch", size=5)
    pictures, bars, text = shown(panel)
    assert {name: role for name, (_, role) in bars.items()} == {
        "red": "true class",
        "green": "target label",
        "blue": "",
    }
    assert "|true class: red|" in text and "|target label: green|" in text and "white square, 5 x 5 px" in text
    assert not torch.allclose(expected(stage, pictures[0]), expected(stage, pictures[1]), atol=1)
    for picture, caption in zip(pictures, text.split("|called|")[1:], strict=True):
        percent = expected(stage, picture)
        assert caption.startswith(f"{stage.test.classes[percent.argmax()]}|with probability {percent.max():.1f}%|")


def test_an_image_of_the_target_class_is_marked_as_both(panel):
    move(panel, image=4)
    assert shown(panel)[1]["green"][1] == "true class = target label"


@pytest.mark.parametrize("trigger", play.TRIGGERS)
def test_strength_0_shows_the_clean_image(stage, panel, trigger):
    move(panel, trigger=trigger, strength=0.0, image=8)
    pictures = shown(panel)[0]
    assert torch.equal(pictures[0], stage.test.images[8]) and torch.equal(pictures[1], pictures[0])


def test_the_attackers_trigger_at_full_strength_is_that_of_the_measured_images(stage, panel, triggered):
    for image in (0, 9, 35):
        move(panel, trigger="own", strength=1.0, image=image)
        assert torch.equal(shown(panel)[0][1], triggered.test.images[image])


def test_patch_pixels(stage):
    """A square of 2, a pixel off the corner, half transparent: the mean of white and what was there; nothing else changes."""
    clean, stamped = play.look(stage, 0, "patch", 2, 0.5).pictures.double()
    square = (slice(None), slice(5, 7), slice(5, 7))
    assert (stamped[square] - (clean[square] + 255) / 2).abs().max() <= 0.5
    stamped[square] = clean[square]
    assert torch.equal(stamped, clean)


@pytest.mark.parametrize(
    ("trigger", "change"),
    [("signal", triggers.signal(0.15)), ("blended", triggers.blended(0.15, seed=1))],
)
def test_wave_and_noise_have_this_strength(stage, trigger, change):
    clean, stamped = play.look(stage, 0, trigger, 3, 0.15).pictures
    assert torch.equal(stamped, (change(to_float(clean[None]))[0] * 255).round().to(torch.uint8))


def test_the_other_noise_is_not_the_attackers(stage):
    own = play.look(stage, 0, "own", 3, 1.0).pictures[1]
    assert not torch.equal(own, play.look(stage, 0, "blended", 3, 0.2).pictures[1])


def test_the_size_is_the_patchs_alone(panel):
    size = panel.children[0].children[3]
    assert size.disabled and size.value == 3 and size.max == 7  # of 8 pixels one is the margin
    move(panel, trigger="patch")
    assert not size.disabled
    move(panel, trigger="signal")
    assert size.disabled


def test_it_starts_with_an_image_that_is_not_of_the_target_class(stage, network):
    assert stage.first == 0
    wanted = torch.zeros(36, dtype=torch.long)
    assert play.Stage(network, stage.test, wanted, stage.own).first == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trigger": "badnets"}, "trigger must be one of own, patch, blended, signal, got 'badnets'"),
        ({"image": 36}, "image must be between 0 and 35, got 36"),
        ({"image": -1}, "image must be between 0 and 35, got -1"),
        ({"size": 0}, "size must be between 1 and 7 pixels, got 0"),
        ({"size": 8}, "size must be between 1 and 7 pixels, got 8"),
        ({"strength": 1.1}, "strength must be in [0, 1], got 1.1"),
        ({"strength": float("nan")}, "strength must be in [0, 1], got nan"),
    ],
)
def test_a_bad_argument_is_named(stage, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        play.look(stage, **{"image": 0} | change)


@pytest.mark.parametrize("count", [0, 36])
def test_a_stage_needs_images_and_their_wanted_labels(stage, count):
    part = stage.test.subset(slice(0, count))
    wanted = stage.wanted[: count // 2]
    with pytest.raises(ValueError, match=f"got {count // 2} for {count}"):
        play.Stage(stage.model, part, wanted, stage.own)


def test_the_model_stays_as_it_was(stage, panel, untouched):
    stage.model.train()
    mean = stage.model[1].running_mean.clone()
    move(panel, image=2, strength=0.3)
    assert stage.model.training and torch.equal(mean, stage.model[1].running_mean)


def test_class_names_are_shown_as_they_are_written(stage):
    view = play.look(stage, 0)
    odd = play.View(view.pictures, view.probabilities, ("<i>&", "b", "c"), 0, 1, view.trigger)
    assert "<i>&" not in play.as_html(odd) and "&lt;i&gt;&amp;" in play.as_html(odd)


def test_the_figure_shows_the_same_for_each_strength(stage):
    drawn = play.figure(stage, (0.0, 1.0))
    assert len(drawn.axes) == 6
    for row, strength in enumerate((0.0, 1.0)):
        view = play.look(stage, stage.first, strength=strength)
        left, middle, right = drawn.axes[3 * row : 3 * row + 3]
        for ax, picture in zip((left, middle), view.pictures, strict=True):
            inner = torch.from_numpy(np.array(ax.images[0].get_array()))[1:-1, 1:-1].permute(2, 0, 1)
            assert torch.allclose(inner, to_float(picture))
        assert [bar.get_width() for bar in right.patches] == pytest.approx((100 * view.probabilities[1]).tolist())
        for which, ax in enumerate((left, middle)):
            assert ax.get_title(loc="left").endswith("called {}, {}".format(*view.called(which)))
        assert {"true class", "target label"} <= {text.get_text() for text in right.texts}
    assert view.called(0) != view.called(1)
    plt.close(drawn)


def test_a_chart_of_many_classes_has_the_likely_ones_the_true_class_and_the_target():
    probabilities = torch.arange(40.0).expand(2, -1) / 780
    view = play.View(torch.zeros(2, 3, 8, 8), probabilities, tuple(map(str, range(40))), 3, 5, "")
    assert play._bars_of([view]) == [3, 5, *range(30, 40)]


@pytest.mark.parametrize(("metadata", "answer"), [({"cellId": "a1"}, True), ({}, False)])
def test_a_notebook_interface_is_known_by_the_cells_id(monkeypatch, metadata, answer):
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(get_parent=lambda: {"metadata": metadata}))
    assert play.has_reader() is answer


def test_without_a_reader_there_is_a_word_and_no_panel(stage, capsys):
    assert play.show(stage) is None and "Live in JupyterLab" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_stored_notebook_holds_a_dead_widget(path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    kinds = {kind for cell in stored["cells"] for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert not any("widget" in kind for kind in kinds) and "widgets" not in stored["metadata"]
