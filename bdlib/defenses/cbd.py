"""Causality-inspired backdoor defense (CBD), Zhang et al., CVPR 2023, arXiv 2303.06818.

Train a clean network on a poisoned set, without clean images and without knowing which images are poisoned:
 1  f_B: train a network for few epochs; a backdoor is learned first, so f_B knows the backdoor and little else; freeze it
 2  f_C: train a second network from scratch; in each of its epochs
 3    critic: fit a critic that tells pairs (f_B's, f_C's embedding of an image) from pairs of two images: a bound on
      their mutual information; keep the critic smooth (Lipschitz)
 4    weigh each image by w = CE_B / (CE_B + CE_C), mean 1 in a batch: what f_B finds easy counts little
 5    step f_C downhill on mean(w CE_C) + mi_weight (E critic(pairs) - E critic(shuffled))

The defaults are the official code's (zaixizhang/CBD, 8a7bd37), but for step 3 and the last term of 5: the paper has them, the code
ships with them off (`released_variant`).  The paper's information bottleneck on f_C's embedding is not in the code, nor here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from bdlib import gpu
from bdlib.augment import cutout
from bdlib.data import Dataset
from bdlib.explain import WithEmbedding, last_linear
from bdlib.randomness import seeded
from bdlib.train import SCHEDULES, Batches, MakeModel, Watch, lr_factor, require_finite

LIPSCHITZ = ("root", "spectral")
Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # images -> logits (B, C), embedding (B, D)


@dataclass(frozen=True, kw_only=True)
class CbdConfig:
    """Settings of CBD; sources: [c] official code, [o] ours.  Raises ValueError if one is out of range."""

    batch_size: int = 64  # images [c]; never more than there are
    biased_epochs: int = 5  # of f_B [c]
    biased_lr: float = 0.1  # of f_B [c]
    biased_schedule: str = "constant"  # of f_B [c]; or another of train.SCHEDULES
    epochs: int = 100  # of f_C [c]
    lr: float = 0.1  # of f_C, the highest [c]
    schedule: str = (
        "steps"  # of f_C: "steps": divided by 10 after 20% and 70% of the epochs [c]; or one of train.SCHEDULES
    )
    momentum: float = 0.9  # Nesterov [c]
    weight_decay: float = 1e-4  # [c]
    # Side of a black square on every training image, pixels; 0 = none.  DIFFERS: the official code calls it 3 as well, but halves it
    # in whole numbers, so that its square is 2 wide.
    cutout: int = 3
    reweight: bool = True  # step 4 [c]
    mi_weight: float = 0.01  # of the mutual-information term; 0 = no critic, as the code ships [c]
    # Adam; divided by 10 every fifth of the epochs [c].  DIFFERS: there the first time comes one epoch sooner.
    critic_lr: float = 0.2
    critic_dropout: float = 0.2  # [c]
    # After each step every weight of the critic is divided by "root" = the square root of its largest singular value [c], or by
    # "spectral" = that value itself, which makes each layer 1-Lipschitz.
    lipschitz: str = "root"

    def __post_init__(self) -> None:
        for name in ("batch_size", "biased_epochs", "biased_lr", "epochs", "lr", "critic_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("mi_weight", "weight_decay", "cutout"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        choices = {"biased_schedule": SCHEDULES, "schedule": ("steps", *SCHEDULES), "lipschitz": LIPSCHITZ}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class CbdResult:
    """f_C and f_B in eval(), and what was seen on the way, on the CPU.

    biased_losses: f_B's loss on each training image as it was trained on, (biased_epochs, N).
    weights: each image's weight in each epoch of f_C, (epochs, N).
    critic: the critic's estimate E critic(pairs) - E critic(shuffled), its mean over each epoch's batches, (epochs,); 0 without the
    term.
    """

    model: nn.Module
    biased: nn.Module
    biased_losses: torch.Tensor
    weights: torch.Tensor
    critic: torch.Tensor


def cbd(
    make_model: MakeModel, train_set: Dataset, config: CbdConfig, *, generator: torch.Generator, watch: Watch = iter
) -> nn.Module:
    """f_C, a network trained on the poisoned split without its backdoor (arXiv:2303.06818), in eval().

    make_model: gives a fresh network, whose last nn.Linear sees the embedding, on the device to train on.
    Raises ValueError for an empty split or a network without nn.Linear, FloatingPointError when a loss is no longer a number.
    """
    return run(make_model, train_set, config, generator=generator, watch=watch).model


def run(
    make_model: MakeModel, train_set: Dataset, config: CbdConfig, *, generator: torch.Generator, watch: Watch = iter
) -> CbdResult:
    """As `cbd`, with f_B, the losses, the weights and the critic's estimates beside the model."""
    biased, losses = train_biased(make_model, train_set, config, generator=generator, watch=watch)
    model, weights, estimates = train_clean(make_model, biased, train_set, config, generator=generator, watch=watch)
    return CbdResult(model, biased, losses, weights, estimates)


def recipe(count: int) -> CbdConfig:
    """The official setting; for a small training split a lower rate and fewer epochs.

    DIFFERS: below 25,000 images f_B has 2 epochs, f_C 10, each at a rate that rises to .03 and then falls to 0.
    At the official .1 the networks collapse on a few thousand images.  An easy task is learned within 5 epochs, and an f_B that knows
    it tells nothing apart.  At a constant rate an f_B of few steps has running statistics that lag behind its weights: in
    eval() its loss on poisoned images was 2.5, in train() .05.  A long f_C ends up learning the backdoor: clean losses vanish, those
    on poisoned images do not.
    """
    if count >= 25_000:
        return CbdConfig()
    return CbdConfig(
        biased_epochs=2, biased_lr=0.03, biased_schedule="one_cycle", epochs=10, lr=0.03, schedule="one_cycle"
    )


def released_variant(config: CbdConfig) -> CbdConfig:
    """The setting as the official code ships: re-weighting alone, no mutual-information term."""
    return replace(config, mi_weight=0.0)


def ablation(config: CbdConfig) -> dict[str, CbdConfig]:
    """Each of CBD's two means alone and neither, other lengths of f_B, and the Lipschitz constraint as it is stated."""
    return {
        "re-weighting alone": released_variant(config),
        "mutual information alone": replace(config, reweight=False),
        "neither": replace(config, reweight=False, mi_weight=0.0),
        "f_B for 1 epoch": replace(config, biased_epochs=1),
        "f_B for 4 epochs": replace(config, biased_epochs=4),
        "f_B for 8 epochs": replace(config, biased_epochs=8),
        "critic 1-Lipschitz": replace(config, lipschitz="spectral"),
    }


def train_biased(
    make_model: MakeModel, train_set: Dataset, config: CbdConfig, *, generator: torch.Generator, watch: Watch = iter
) -> tuple[nn.Module, torch.Tensor]:
    """f_B in eval(), without gradient, and its loss on each image as it was trained on, (biased_epochs, N) (step 1)."""
    model = make_model(generator)
    device = next(model.parameters()).device
    batches = Batches(train_set, config.batch_size, device, generator=generator)
    optimizer = sgd(model, config.biased_lr, config)
    factor = lr_factor(config.biased_schedule, config.biased_epochs * len(batches))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = torch.zeros(config.biased_epochs, len(train_set), device=device)

    def descend(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with gpu.half(device):
            logits = model(augmented(images, config, batches.generator))
        each = F.cross_entropy(logits.float(), labels, reduction="none")
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
        return each.detach()

    step = gpu.replayed(descend, device, [batches.generator])
    with seeded(generator, device):
        for epoch in watch(range(config.biased_epochs)):
            model.train()
            for images, labels, picks in batches:
                losses[epoch, picks] = step(images, labels)
                scheduler.step()
            require_finite(losses[epoch].sum(), f"epoch {epoch + 1} of CBD's f_B")
    # The last step may have gone wrong after its loss was seen.
    require_finite(sum(weight.detach().sum() for weight in model.parameters()), "the last step of CBD's f_B")
    return model.eval().requires_grad_(False), losses.cpu()


def train_clean(
    make_model: MakeModel,
    biased: nn.Module,
    train_set: Dataset,
    config: CbdConfig,
    *,
    generator: torch.Generator,
    watch: Watch = iter,
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """f_C in eval(), the weight of each image in each epoch (epochs, N), the critic's estimates (epochs,) (steps 2 to 5)."""
    model = make_model(generator)
    device = next(model.parameters()).device
    batches = Batches(train_set, config.batch_size, device, generator=generator)
    optimizer = sgd(model, config.lr, config)
    steps = config.epochs * len(batches)
    if config.schedule == "steps":
        drops = [max(1, round(share * config.epochs)) * len(batches) for share in (0.2, 0.7)]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, gamma=0.1)
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(config.schedule, steps))
    weights = torch.zeros(config.epochs, len(train_set), device=device)
    estimates = torch.zeros(config.epochs, device=device)
    in_all = config.epochs * len(train_set)
    with (
        seeded(generator, device),
        gpu.fastest_convolutions(device, in_all),
        WithEmbedding(model) as f_c,
        WithEmbedding(biased) as f_b,
    ):
        critic = Critic(last_linear(model).in_features, config, device)
        clean, known = (gpu.compiled(network, device, in_all, batches.batch_size) for network in (f_c, f_b))

        def descend(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            images = augmented(images, config, batches.generator)
            (logits, embedding), (biased_logits, biased_embedding) = gpu.side_by_side(
                device, lambda: outputs(clean, images), lambda: frozen(known, images)
            )
            each = F.cross_entropy(logits, labels, reduction="none")
            weight = torch.ones_like(each)
            if config.reweight:
                weight = sample_weights(F.cross_entropy(biased_logits, labels, reduction="none"), each.detach())
            loss = (weight * each).mean()
            if config.mi_weight:
                loss = loss + config.mi_weight * critic.estimate(biased_embedding, embedding)
            optimizer.zero_grad()
            loss.backward(inputs=list(model.parameters()))  # the critic has steps of its own
            optimizer.step()
            return loss.detach(), weight

        def pairs(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return embeddings(known, clean, augmented(images, config, batches.generator))

        def climb(images: torch.Tensor, *earlier: torch.Tensor) -> tuple[torch.Tensor, ...]:
            later, estimate = gpu.side_by_side(device, lambda: pairs(images), lambda: critic.step(*earlier))
            return estimate, *later

        descend, climb = (gpu.replayed(step, device, [batches.generator]) for step in (descend, climb))
        for epoch in watch(range(config.epochs)):
            model.train()
            if config.mi_weight:
                estimates[epoch] = critic.fit(pairs, climb, batches)
            total = torch.zeros((), device=device)
            for images, labels, picks in batches:
                loss, weights[epoch, picks] = descend(images, labels)
                scheduler.step()
                total += loss
            require_finite(total, f"epoch {epoch + 1} of CBD's f_C")
    return model.eval(), weights.cpu(), estimates.cpu()


def outputs(network: Network, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, C) and embedding (B, D), float32 both; on a GPU the network computes in bfloat16 (DIFFERS: officially float32)."""
    with gpu.half(images.device):
        logits, embedding = network(images)
    return logits.float(), embedding.float()


@torch.no_grad()
def frozen(network: Network, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without gradient."""
    return outputs(network, images)


def embeddings(biased: Network, clean: Network, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f_B's and f_C's embedding of each image, (B, D) both, without gradient.

    f_C in train(): its batch-norm statistics move in this pass too, as in the code.
    """
    (_, found), (_, known) = gpu.side_by_side(
        images.device, lambda: frozen(clean, images), lambda: frozen(biased, images)
    )
    return known, found


def sample_weights(biased_losses: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Weights (B,), mean 1: small where f_B's loss is small beside f_C's (step 4)."""
    # w = CE_B / (CE_C + CE_B + 1e-8), then w <- w B / sum(w)
    weight = biased_losses / (losses + biased_losses + 1e-8)
    return weight * len(weight) / weight.sum().clamp(min=1e-8)


class Critic(nn.Module):
    """A small network on pairs of embeddings: high for two embeddings of one image, low for those of two (step 3)."""

    def __init__(self, width: int, config: CbdConfig, device: torch.device):
        super().__init__()
        # Dropout before each layer, always on [c]
        self.first, self.second = nn.Linear(2 * width, width), nn.Linear(width, 1)
        self.config = config
        self.to(device)
        self.optimizer = gpu.adam(self.parameters(), device, lr=config.critic_lr)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, max(1, config.epochs // 5), gamma=0.1)

    def forward(self, biased: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(torch.cat([biased, clean], 1), self.config.critic_dropout)
        hidden = F.dropout(F.leaky_relu(self.first(hidden)), self.config.critic_dropout)
        return self.second(hidden)

    def estimate(self, biased: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """E critic(r_i, z_i) - E critic(r_i, z_(i-1)): how much the pairing tells, a scalar."""
        return self(biased, clean).mean() - self(biased, clean.roll(1, 0)).mean()

    def fit(self, pairs: Callable[..., tuple], climb: Callable[..., tuple], batches: Batches) -> torch.Tensor:
        """Raise the estimate over one epoch, a step a batch; the mean estimate, detached.

        pairs: images -> `embeddings`; climb: images, the pairs of earlier ones -> what `step` says of those, the pairs of these.
        A GPU does both at once: f_C does not change in this epoch, so its embeddings need not wait for the critic.
        """
        total, pair = torch.zeros((), device=self.second.weight.device), None
        for images, _, _ in batches:
            if pair is None:
                pair = pairs(images)
            else:
                estimate, *pair = climb(images, *pair)
                total += estimate
        total += self.step(*pair)
        self.scheduler.step()
        return total / len(batches)

    def step(self, biased: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Raise the estimate on the pairs of a batch, the critic kept smooth; the estimate before it, detached."""
        estimate = self.estimate(biased, clean)
        self.optimizer.zero_grad()
        (-self.config.mi_weight * estimate).backward()
        self.optimizer.step()
        self.smooth()
        return estimate.detach()

    @torch.no_grad()
    def smooth(self) -> None:
        """Divide every parameter by its largest singular value, or its root, in place."""
        for layer in (self.first, self.second):
            for parameter in (layer.weight, layer.bias):
                largest = largest_singular_value(parameter.view(len(parameter), -1))
                divisor = gpu.root(largest) if self.config.lipschitz == "root" else largest
                parameter.div_(divisor.clamp(min=1e-12))


def largest_singular_value(matrix: torch.Tensor) -> torch.Tensor:
    """Of a matrix (M, N), a scalar.  On a GPU, whose SVD is slow and waits for the CPU, by powers: at most .1% too high."""
    if matrix.device.type != "cuda":
        return torch.linalg.matrix_norm(matrix, 2)
    return matrix.norm() if min(matrix.shape) == 1 else norm_by_powers(matrix)


def norm_by_powers(matrix: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """|A^p|_F^(1 / 2p) for A = W W^T and p = 16^rounds: the largest singular value s of W, or up to min(M, N)^(1 / 4p) s."""
    power = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    size = power.norm()
    norm = size.sqrt()
    for number in range(1, rounds + 1):
        power = power / (size + 1e-30)  # now its largest eigenvalue is 1 / sqrt(min(M, N)) at least
        for _ in range(4):
            power = power @ power
        size = power.norm()
        norm = norm * size ** (0.5 / 16**number)
    return norm


def augmented(images: torch.Tensor, config: CbdConfig, generator: torch.Generator) -> torch.Tensor:
    """The batch with the code's cutout."""
    return cutout(images, config.cutout, generator=generator) if config.cutout else images


def sgd(model: nn.Module, lr: float, config: CbdConfig) -> torch.optim.Optimizer:
    """The code's optimizer for both networks."""
    device = next(model.parameters()).device
    return gpu.sgd(
        model.parameters(), device, lr=lr, momentum=config.momentum, nesterov=True, weight_decay=config.weight_decay
    )
