"""ACC, ASR, RA and DER against numbers counted by hand."""

import math

import pytest
import torch
from torch import nn

from bdlib import metrics
from bdlib.data import replace


class Says(nn.Module):
    """Answers with the class written in an image's first pixel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 3).float()


def images_saying(dataset, answers):
    images = dataset.images.clone()
    images[:, 0, 0, 0] = torch.tensor(answers, dtype=torch.uint8)
    return replace(dataset, images=images)


def test_all_five_by_hand(tiny):
    six = replace(tiny, images=tiny.images[:6], labels=torch.tensor([0, 0, 1, 1, 2, 2]))
    clean = images_saying(six, [0, 1, 1, 1, 2, 0])  # right: images 0, 2, 3, 4
    triggered = images_saying(six, [0, 2, 0, 1, 0, 0])  # target 0: the last four count; called it: 2, 4, 5
    found = metrics.evaluate(Says(), clean, triggered, torch.zeros(6, dtype=torch.long))
    assert found == pytest.approx(
        {"acc": 4 / 6, "asr": 3 / 4, "ra": 1 / 4, "asr_all_classes": 4 / 6, "acc_non_target": 3 / 4}
    )


def test_all_to_all_counts_every_image(tiny):
    three = replace(tiny, images=tiny.images[:3], labels=torch.tensor([0, 1, 2]))
    found = metrics.evaluate(
        Says(), images_saying(three, [0, 1, 2]), images_saying(three, [1, 2, 2]), torch.tensor([1, 2, 0])
    )
    assert found == pytest.approx({"acc": 1, "asr": 2 / 3, "ra": 1 / 3, "asr_all_classes": 2 / 3, "acc_non_target": 1})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),
        ((0.9, 1.0), (0.9, 1.0), 0.5),
        ((0.9, 1.0), (0.8, 0.4), 0.75),
        ((0.8, 0.5), (0.9, 0.6), 0.5),
        ((0.9, 0.2), (0.5, 0.2), 0.3),
    ],
)
def test_der_weighs_both_drops_and_rewards_no_rise(before, after, expected):
    pair = [dict(zip(("acc", "asr"), values, strict=True)) for values in (before, after)]
    assert metrics.der(*pair) == pytest.approx(expected)


def test_der_of_a_printed_row():
    # FT-SAM on BadNets-A2O, Table 1 of arXiv:2304.11823: 91.82/93.79 -> 92.21/1.63, DER 96.08.
    assert metrics.der({"acc": 0.9182, "asr": 0.9379}, {"acc": 0.9221, "asr": 0.0163}) == pytest.approx(
        0.9608, abs=5e-5
    )


def test_a_test_split_of_the_target_alone_is_an_error(tiny):
    one = replace(tiny, images=tiny.images[:1], labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="only images of the wanted class"):
        metrics.evaluate(Says(), images_saying(one, [0]), images_saying(one, [0]), torch.tensor([0]))


def test_confusion_counts_rows_in_percent(tiny):
    four = replace(tiny, images=tiny.images[:4], labels=torch.tensor([0, 0, 0, 1]))
    table = metrics.confusion(Says(), images_saying(four, [0, 0, 2, 1]))
    assert table.loc["red"].tolist() == pytest.approx([200 / 3, 0, 100 / 3]) and table.loc["green", "green"] == 100


def test_visibility_by_hand():
    clean = torch.full((2, 3, 16, 16), 0.5)
    triggered = clean.clone()
    triggered[:, :, :8, :8] += 0.1
    seen = metrics.visibility(clean, triggered)
    assert seen["psnr"] == pytest.approx(-10 * math.log10(0.01 / 4), rel=1e-4)  # -10 log10 of the mean squared change
    assert seen["largest"] == pytest.approx(0.1, rel=1e-4) and seen["share_changed"] == 0.25
    triggered[0] = clean[0]  # an image that has the trigger's pixels already does not make the mean infinite
    assert metrics.visibility(clean, triggered)["psnr"] == pytest.approx(-10 * math.log10(0.01 / 8), rel=1e-4)
    same = metrics.visibility(clean, clean.clone())
    assert same["psnr"] == math.inf and same["ssim"] == pytest.approx(1) and seen["ssim"] < 0.99
    assert same["largest"] == same["share_changed"] == 0
