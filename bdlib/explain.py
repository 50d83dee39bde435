"""What goes on inside a network: feature maps and their norms, Grad-CAM, activation change, trigger synthesis.

Functions take any nn.Module and images as float32 (N, C, H, W) in [0, 1]; a layer is named as in `model.named_modules()`.
Nothing here changes the model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.data import Dataset
from bdlib.masks import norms
from bdlib.train import Watch, evaluating, require_finite

NORMS = ("l1", "l2", "linf")
_BATCH = 250


def layer(model: nn.Module, name: str) -> nn.Module:
    """The module of this name.  Raises ValueError, with the names that exist, if there is none."""
    modules = dict(model.named_modules())
    if not name or name not in modules:
        raise ValueError(f"layer must be one of {', '.join(filter(None, modules))}; got {name!r}")
    return modules[name]


def last_feature_map(model: nn.Module, images: torch.Tensor) -> str:
    """Name of the module that gives the last feature map: the last one to finish whose output is larger than 1 x 1.

    In a residual network that is the sum of both branches, if it is larger.  Raises ValueError for a model without such an output.
    """
    return _map_sizes(model, images)[-1][0]


def stages(model: nn.Module, images: torch.Tensor, count: int) -> tuple[str, ...]:
    """Names of the modules that give the last feature map of each of the last `count` sizes, from first to last.

    Raises ValueError for a model with fewer sizes.
    """
    last = {size: name for name, size in _map_sizes(model, images)}
    if len(last) < count:
        sizes = ", ".join(f"{height} x {width}" for height, width in last)
        raise ValueError(f"the model must have feature maps of at least {count} sizes, it has {sizes}")
    return tuple(last.values())[-count:]


def _map_sizes(model: nn.Module, images: torch.Tensor) -> list[tuple[str, torch.Size]]:
    """Name and size (h, w) of every module's feature map larger than 1 x 1, in the order in which they finish."""
    finished: list[tuple[str, torch.Size]] = []

    def note(name: str) -> Callable:
        def hook(module, inputs, output) -> None:
            if isinstance(output, torch.Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
                finished.append((name, output.shape[2:]))

        return hook

    has_convolution = any(isinstance(module, nn.Conv2d) for module in model.modules())
    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        _in_batches(model, images[:1], model)
    finally:
        for handle in handles:
            handle.remove()
    if not finished or not has_convolution:
        raise ValueError("the model has no nn.Conv2d layer with a feature map (N, C, H, W) larger than 1 x 1")
    return finished


def feature_maps(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    """Output (N, K, h, w) of a layer, detached, with the model in eval().  Raises ValueError for an unknown layer."""
    return _hooked(model, images, layer(model, name), lambda module, inputs, output: output)


def embeddings(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the last nn.Linear sees, (N, D), with the model in eval().  Raises ValueError for a model without one."""
    return _hooked(model, images, last_linear(model), lambda module, inputs, output: inputs[0])


def with_embedding(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C) and what the last nn.Linear saw (B, D), from one pass in the model's own mode."""
    with WithEmbedding(model) as both:
        return both(images)


class WithEmbedding(nn.Module):
    """The model, with its embedding (B, D) beside its logits (B, C), in a form that torch.compile takes; to be closed.

    Raises ValueError if the model has no nn.Linear.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.last = model, last_linear(model)
        # Not a closure: torch.compile would take each for another program.
        self.handle = self.last.register_forward_pre_hook(_keep)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, embedding = self.model(images), self.last.seen
        self.last.seen = None
        return logits, embedding

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
        vars(self.last).pop("seen", None)


def _keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    module.seen = inputs[0]


def norm_inputs(model: nn.Module, images: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and input (N, K, h, w) of one nn.BatchNorm2d with a scale after the other, with the model in eval().

    One pass for each norm, so that the inputs of one norm are held at a time.
    """
    for name, norm in norms(model).items():
        yield name, _hooked(model, images, norm, lambda module, inputs, output: inputs[0])


def last_linear(model: nn.Module) -> nn.Linear:
    """The last nn.Linear of the model.  Raises ValueError if it has none."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ValueError("the model has no nn.Linear layer, whose input is the embedding")
    return found[-1]


def map_norms(maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """l1, l2 and l-infinity norm (N, K) of every feature map of (N, K, h, w)."""
    flat = maps.flatten(2)
    return {"l1": flat.norm(1, dim=2), "l2": flat.norm(2, dim=2), "linf": flat.abs().amax(2)}


def effect_size(clean: torch.Tensor, triggered: torch.Tensor) -> torch.Tensor:
    """Cohen's d (K,) of values (N, K): difference of the means over the pooled standard deviation; above 0 where triggered is larger.

    Raises ValueError for fewer than two images of either.
    """
    if min(len(clean), len(triggered)) < 2:
        raise ValueError("an effect size needs at least two images of each kind")
    pooled = gpu.root((clean.var(0) + triggered.var(0)) / 2)
    return (triggered.mean(0) - clean.mean(0)) / pooled.clamp(min=1e-12)


def tac(clean_maps: torch.Tensor, triggered_maps: torch.Tensor) -> torch.Tensor:
    """Trigger-activated change (K,): mean over images of |A_k(x) - A_k(triggered x)|_2 (arXiv:2304.11823, Sec. 3.2)."""
    return (clean_maps - triggered_maps).flatten(2).norm(dim=2).mean(0)


def auroc(clean: torch.Tensor, triggered: torch.Tensor) -> float:
    """Area under the ROC curve of scores (N,) and (M,): the chance that a triggered image scores above a clean one."""
    from sklearn.metrics import roc_auc_score

    truth = [0] * len(clean) + [1] * len(triggered)
    return float(roc_auc_score(truth, torch.cat([clean, triggered]).cpu().numpy()))


def filter_norms(model: nn.Module, name: str) -> torch.Tensor:
    """|W_k|_2 (K,) of every filter of a convolution, detached.  Raises ValueError if the layer is none or does not exist."""
    module = layer(model, name)
    if not isinstance(module, nn.Conv2d):
        convolutions = [other for other, part in model.named_modules() if isinstance(part, nn.Conv2d)]
        raise ValueError(f"layer must be a convolution, one of {', '.join(convolutions)}; got {name!r}")
    return module.weight.detach().flatten(1).norm(dim=1)


def last_convolution(model: nn.Module) -> str:
    """Name of the last nn.Conv2d larger than 1 x 1 (shortcuts are left out).  Raises ValueError if there is none."""
    found = [name for name, part in model.named_modules() if isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1]
    if not found:
        raise ValueError("the model has no nn.Conv2d layer larger than 1 x 1")
    return found[-1]


def grad_cam(model: nn.Module, images: torch.Tensor, classes: torch.Tensor, name: str) -> torch.Tensor:
    """Grad-CAM (N, H, W) in [0, 1]: where the evidence for each image's class (N,) lies, by captum's LayerGradCam.

    Each map is stretched to the image's size and divided by its largest value.  Raises ValueError for an unknown layer.
    """
    from captum.attr import LayerAttribution, LayerGradCam

    device = next(model.parameters()).device
    watched, classes = images.to(device, copy=True).requires_grad_(True), classes.to(device)
    with evaluating(model):
        maps = LayerGradCam(model, layer(model, name)).attribute(watched, target=classes, relu_attributions=True)
    maps = LayerAttribution.interpolate(maps, tuple(images.shape[2:]), "bilinear").detach()[:, 0].clamp(min=0)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def project_2d(points: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """t-SNE of points (N, D) in the plane, (N, 2), by scikit-learn, from a start that the data decide."""
    from sklearn.manifold import TSNE

    seed = int(torch.randint(2**31, (), generator=generator))
    return torch.from_numpy(TSNE(2, init="pca", random_state=seed).fit_transform(points.cpu().numpy()))


def class_points(
    model: nn.Module, clean: Dataset, triggered: Dataset, *, generator: torch.Generator, count: int = 300
) -> pd.DataFrame:
    """t-SNE of the embeddings of `count` clean images and their triggered twins: columns x, y and group (class or "triggered")."""
    both = torch.cat([clean.subset(slice(count)).floats(), triggered.subset(slice(count)).floats()])
    points = project_2d(embeddings(model, both), generator=generator)
    groups = [clean.classes[label] for label in clean.labels[:count].tolist()]
    groups += ["triggered"] * (len(both) - len(groups))
    return pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "group": groups})


def by_poison(values: torch.Tensor, poisoned: torch.Tensor) -> pd.DataFrame:
    """A value for each epoch and training image (E, N) as a table: columns epoch (from 1), images ("clean" or "poisoned", as the
    flags (N,) say) and value."""
    epochs, count = values.shape
    kinds = ["poisoned" if flag else "clean" for flag in poisoned.tolist()]
    numbers = torch.arange(1, epochs + 1).repeat_interleave(count)
    return pd.DataFrame({"epoch": numbers, "images": kinds * epochs, "value": values.flatten().cpu()})


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """Settings of the trigger synthesis, in the manner of Neural Cleanse.  Raises ValueError if one is out of range."""

    steps: int = 100
    batch_size: int = 64  # images; never more than there are
    lr: float = 0.1  # Adam, on the values before the sigmoid
    weight: float = 0.01  # of the mask's L1 norm in the loss, at 32 x 32 pixels; at any other size a share of the image costs the same

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.weight < 0:
            raise ValueError(f"weight must not be negative, got {self.weight}")


@dataclass(frozen=True)
class SyntheticTrigger:
    """A trigger x -> (1 - mask) x + mask pattern: mask (1, 1, H, W) and pattern (1, C, H, W) in [0, 1]."""

    mask: torch.Tensor
    pattern: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The images, float32 (N, C, H, W) in [0, 1], with the trigger."""
        return (1 - self.mask) * images + self.mask * self.pattern

    @property
    def size(self) -> float:
        """L1 norm of the mask: the number of pixels replaced."""
        return self.mask.sum().item()


def synthesize_trigger(
    model: nn.Module,
    clean: Dataset,
    target_label: int,
    config: SynthesisConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
) -> SyntheticTrigger:
    """A small trigger that makes the model call clean images the target: mask and pattern, by gradient descent.

    Minimizes CE(f((1 - m) x + m p), target) + weight 32^2 / (H W) |m|_1 (Wang et al., Neural Cleanse, S&P 2019).
    Raises ValueError without clean images or for a label that is no class.
    """
    if not len(clean):
        raise ValueError("the synthesis of a trigger needs at least one clean image, got none")
    if not 0 <= target_label < len(clean.classes):
        raise ValueError(f"target_label must be between 0 and {len(clean.classes) - 1}, got {target_label}")
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    images = clean.floats().to(next(frozen.parameters()).device)
    mask_logit, pattern_logit = starting_logits(images, generator=generator)
    optimizer = gpu.adam([mask_logit, pattern_logit], images.device, lr=config.lr)
    weight = config.weight * (32 * 32 / mask_logit.numel())

    def descend(batch: torch.Tensor) -> torch.Tensor:
        trigger = SyntheticTrigger(mask_logit.sigmoid(), pattern_logit.sigmoid())
        labels = torch.full((len(batch),), target_label, device=images.device)
        loss = F.cross_entropy(frozen(trigger(batch)), labels) + weight * trigger.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = gpu.replayed(descend, images.device)
    picks = torch.randint(len(images), (config.steps, min(config.batch_size, len(images))), generator=generator)
    total = torch.zeros((), device=images.device)
    for batch in watch(picks.to(images.device)):
        total += step(images[batch])
    require_finite(total, "the synthesis of a trigger")
    return SyntheticTrigger(mask_logit.sigmoid().detach(), pattern_logit.sigmoid().detach())


def starting_logits(images: torch.Tensor, *, generator: torch.Generator) -> list[torch.Tensor]:
    """Mask (1, 1, H, W) and pattern (1, C, H, W) before the sigmoid: near .12 and .5, ready for gradients.

    The start is drawn: from a constant one, all pixels of an edge would move alike.
    """
    shape = images.shape[1:]
    mask = (torch.randn(1, 1, *shape[1:], generator=generator) * 0.1 - 2).to(images)
    pattern = (torch.randn(1, *shape, generator=generator) * 0.1).to(images)
    return [mask.requires_grad_(True), pattern.requires_grad_(True)]


def _hooked(model: nn.Module, images: torch.Tensor, module: nn.Module, read: Callable) -> torch.Tensor:
    """What `read` takes from each call of the module, for all images."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda *call: seen.append(read(*call).detach().clone()))
    try:
        _in_batches(model, images, model)
    finally:
        handle.remove()
    return torch.cat(seen)


@torch.no_grad()
def _in_batches(model: nn.Module, images: torch.Tensor, call: Callable) -> None:
    """Call it on one batch after the other, with the model in eval()."""
    device = next(model.parameters()).device
    with evaluating(model):
        for batch in images.split(_BATCH):
            call(batch.to(device))
