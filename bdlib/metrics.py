"""ACC, ASR, RA and DER, as fractions, with the variants that the official codes print."""

import pandas as pd
import torch
from torch import nn

from bdlib.data import Dataset
from bdlib.train import predict


def evaluate(model: nn.Module, test: Dataset, triggered: Dataset, wanted: torch.Tensor) -> dict[str, float]:
    """acc, asr, ra, asr_all_classes and acc_non_target of a model.

    triggered: the same test images with the trigger; wanted (N,): the attacker's labels for them.
    acc             share of clean test images called their class
    asr             share of triggered images, those whose class is the wanted one left out, called the wanted class
    ra              share of the same images called their true class
    asr_all_classes asr over all triggered images (AWM's code; a clean model scores about 1/C)
    acc_non_target  acc without images whose class is the wanted one (RNP's code)
    """
    clean, attacked = predict(model, test.images), predict(model, triggered.images)
    other = test.labels != wanted
    return {
        "acc": _share(clean == test.labels),
        "asr": _share((attacked == wanted)[other]),
        "ra": _share((attacked == test.labels)[other]),
        "asr_all_classes": _share(attacked == wanted),
        "acc_non_target": _share((clean == test.labels)[other]),
    }


def confusion(model: nn.Module, test: Dataset) -> pd.DataFrame:
    """Percent of the images of each true class (row) that the model calls each class (column)."""
    called = pd.Series(predict(model, test.images).cpu().numpy(), name="called")
    counts = pd.crosstab(pd.Series(test.labels.cpu().numpy(), name="true class"), called, normalize="index")
    every = range(len(test.classes))
    return (
        (100 * counts.reindex(index=every, columns=every, fill_value=0))
        .set_axis(test.classes, axis=0)
        .set_axis(test.classes, axis=1)
    )


def visibility(clean: torch.Tensor, triggered: torch.Tensor) -> dict[str, float]:
    """How far triggered images are from clean ones, both float32 (N, C, H, W) in [0, 1], by torchmetrics.

    psnr           peak signal-to-noise ratio of all pixels, dB: higher is harder to see (infinite only where no image changed)
    ssim           structural similarity: 1 = the same
    largest        largest change of a pixel, 1 = black to white
    share_changed  share of the pixels that changed at all
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    change = (triggered - clean).abs()
    return {
        "psnr": float(peak_signal_noise_ratio(triggered, clean, data_range=1.0)),
        "ssim": float(structural_similarity_index_measure(triggered, clean, data_range=1.0)),
        "largest": float(change.amax((1, 2, 3)).mean()),
        "share_changed": float((change.amax(1) > 0).float().mean()),
    }


def der(before: dict[str, float], after: dict[str, float]) -> float:
    """Defense effectiveness rating: (max(0, ASR drop) - max(0, ACC drop) + 1) / 2 (Eq. 7, arXiv:2304.11823)."""
    asr_drop = max(0.0, before["asr"] - after["asr"])
    acc_drop = max(0.0, before["acc"] - after["acc"])
    return (asr_drop - acc_drop + 1) / 2


def _share(right: torch.Tensor) -> float:
    if not len(right):
        raise ValueError("a share of no images: the test split has only images of the wanted class")
    return right.double().mean().item()
