"""Channel Lipschitzness-based pruning (CLP), Zheng et al., ECCV 2022, arXiv 2208.03111.

A channel that answers a trigger reacts strongly to a small change of its input; its weights alone show that.  No images are needed:
 1  for each channel k of a convolution with batch norm behind it: sigma_k = |W_k|_2 |gamma_k / s_k|, an upper bound on its
    Lipschitz constant (W_k the kernel as a matrix of input channels x pixels, gamma the norm's scale, s its running deviation)
 2  in each layer, remove the channels with sigma_k > mean + u std: scale and shift of the batch norm are 0
"""

from functools import partial

import torch
from torch import nn

from bdlib import gpu
from bdlib.data import Dataset
from bdlib.masks import norms, require_batch_norm
from bdlib.selection import OutlierConfig, Values, without_outliers
from bdlib.train import evaluating

PAIRINGS = ("flow", "order")


def clp(model: nn.Module, clean: Dataset, config: OutlierConfig, *, pairing: str = "flow") -> nn.Module:
    """A copy of the model without the channels of outlying Lipschitz bound (arXiv:2208.03111), in eval().

    clean: the defender's images; they tell the size of an image, and serve to choose u where `config.u` is None: with u = 3 CLP is
    data-free.  pairing: as in `pairs`.  The input model is not changed.  Raises ValueError for a model without such a pair.
    """
    require_batch_norm(model, "CLP")
    return without_outliers(model, channel_bounds(model, clean.floats()[:1], pairing), config, clean)


@torch.no_grad()
def channel_bounds(model: nn.Module, image: torch.Tensor, pairing: str = "flow") -> Values:
    """sigma (K,) of the channels of each batch norm that has a convolution before it, by the norm's name (step 1).

    image: any one image, float32 (1, C, H, W).
    """
    bounds = {}
    for name, (convolution, norm) in pairs(model, image, pairing).items():
        kernels = convolution.weight.flatten(2).cpu()  # (K, C, h w); thousands of small SVDs take a GPU a minute
        # sigma_k = |W_k|_2 |gamma_k / s_k|.  DIFFERS: eps under the root, as the norm itself has it; the code has none.
        deviation = gpu.root(norm.running_var + norm.eps)
        bounds[name] = torch.linalg.matrix_norm(kernels, 2).to(deviation) * (norm.weight / deviation).abs()
    return bounds


def pairs(model: nn.Module, image: torch.Tensor, pairing: str = "flow") -> dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Batch norms with the convolution that feeds each, by the norm's name.

    "flow": the convolution whose output the norm reads.  "order": the one before it in `named_modules`, as in the official code, which
    in a pre-activation block is another one: its first norm reads the sum of both branches.  Norms of another width are left out.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, got {pairing!r}")
    found = flow_pairs(model, image) if pairing == "flow" else order_pairs(model)
    found = {name: pair for name, pair in found.items() if pair[0].out_channels == pair[1].num_features}
    if not found:
        raise ValueError("CLP needs a convolution with a batch norm behind it, but the model has none")
    return found


@torch.no_grad()
def flow_pairs(model: nn.Module, image: torch.Tensor) -> dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Norms that read a convolution's output itself, seen in one pass with the model in eval()."""
    made_by: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # the tensors are kept, so that no two have the same id
    found = {}

    def note_output(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        made_by[id(output)] = module, output

    def note_pair(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if id(inputs[0]) in made_by:
            found[name] = made_by[id(inputs[0])][0], module

    handles = [part.register_forward_hook(note_output) for part in model.modules() if isinstance(part, nn.Conv2d)]
    for name, norm in norms(model).items():
        handles.append(norm.register_forward_pre_hook(partial(note_pair, name)))
    try:
        with evaluating(model):
            model(image.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def order_pairs(model: nn.Module) -> dict[str, tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each norm with the last convolution before it in `named_modules`."""
    found, last = {}, None
    for name, part in model.named_modules():
        if isinstance(part, nn.Conv2d):
            last = part
        elif isinstance(part, nn.BatchNorm2d) and part.weight is not None and last is not None:
            found[name] = last, part
    return found
