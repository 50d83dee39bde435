"""The first page: a backdoor in one picture, the five papers in one table of measured numbers, where to start."""

from dataclasses import dataclass
from pathlib import Path

from bdlib import figures, results, signs, triggers

PICTURED = 16  # of the first 60 drawings of seed 0: a sign in the middle, a dark corner where the patch will be


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the table: which measured rows it is the mean of."""

    notebook: str
    method: str
    paper: str
    rows: str  # file in figures/
    defense: str
    variant: str
    attack: str
    poison_rate: float
    budget: int  # images
    holds: str  # the budget in words, {budget} for the number


LINES = (
    Line(notebook="01_linf_pruning", method="l-infinity pruning", paper="Cheng et al., 2020", rows="linf_pruning_rows",
         defense="linf_pruning", variant="linf", attack="badnets", poison_rate=0.1, budget=200, holds="{budget} clean images"),
    Line(notebook="02_awm", method="AWM", paper="Chai & Chen, NeurIPS 2022", rows="awm_rows",
         defense="awm", variant="soft", attack="blended", poison_rate=0.1, budget=200, holds="{budget} clean images"),
    Line(notebook="02_awm", method="AWM, one-shot", paper="the same", rows="awm_rows",
         defense="awm", variant="soft", attack="blended", poison_rate=0.1, budget=10, holds="{budget} clean images, one a class"),
    Line(notebook="03_rnp", method="RNP", paper="Li et al., ICML 2023", rows="rnp_rows",
         defense="rnp", variant="default", attack="blended", poison_rate=0.1, budget=200, holds="{budget} clean images"),
    Line(notebook="04_cbd", method="CBD", paper="Zhang et al., CVPR 2023", rows="cbd_rows",
         defense="cbd", variant="default", attack="signal", poison_rate=0.3, budget=5000,
         holds="the {budget:,} training images, poisoned ones among them; no clean ones"),
    Line(notebook="05_ft_sam", method="FT-SAM", paper="Zhu et al., ICCV 2023", rows="ft_sam_rows",
         defense="ft_sam", variant="default", attack="blended", poison_rate=0.1, budget=200, holds="{budget} clean images"),
)  # fmt: skip


def page(root: Path, contents: dict[str, list[tuple[str, str]]]) -> str:
    """The first page's Markdown.  contents: part of the book -> places and titles of its pages."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("bdlib.book", ".")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    places = {place for pages in contents.values() for place, _ in pages}
    return environment.get_template("index.md.j2").render(
        picture=picture(root),
        table=[measured(root, line) for line in LINES],
        contents=contents,
        guide="notebooks/teachers_guide.md" in places,
    )


def measured(root: Path, line: Line) -> dict:
    """Means of ACC and ASR before and after, in percent, with the number of seeds.

    Raises ValueError if figures/ has no row of this line, or more than one a seed.
    """
    rows = results.load(root / "figures" / f"{line.rows}.csv")
    rows = rows[(rows["profile"] == "quick") & (rows["dataset"] == "signs") & (rows["notebook"] == line.notebook)]
    for column in ("defense", "variant", "attack", "poison_rate", "budget"):
        rows = rows[rows[column] == getattr(line, column)]
    if rows.empty or rows["seed"].duplicated().any():
        raise ValueError(f"figures/{line.rows}.csv must have one row a seed of {line}; got {len(rows)}")
    means = 100 * rows[["acc_before", "acc", "asr_before", "asr"]].mean()
    words = {"line": line, "holds": line.holds.format(budget=line.budget), "seeds": len(rows)}
    return words | {name: f"{value:.1f}" for name, value in means.items()}


def picture(root: Path) -> dict:
    """Two images as data addresses, the names of their classes, and how often the network says so (percent, mean over seeds)."""
    import torch

    images, labels = signs.draw(60, 0)
    clean = torch.from_numpy(images[PICTURED : PICTURED + 1])
    triggered = (triggers.make("badnets")(clean / 255) * 255).round().to(torch.uint8)
    rows = results.load(root / "figures" / "all_five_rows.csv")
    rows = rows[(rows["defense"] == "none") & (rows["attack"] == "badnets") & (rows["dataset"] == "signs")]
    rows = rows[(rows["variant"] == "default") & (rows["profile"] == "quick")]
    if rows.empty:
        raise ValueError("figures/all_five_rows.csv has no row of the network without a defense, badnets on signs")
    return {
        "clean": figures.data_address(clean[0]),
        "triggered": figures.data_address(triggered[0]),
        "label": signs.CLASSES[labels[PICTURED]],
        "target": signs.CLASSES[rows["target_label"].iloc[0]],
        "acc": f"{100 * rows['acc'].mean():.1f}",
        "asr": f"{100 * rows['asr'].mean():.1f}",
        "poison_rate": f"{100 * rows['poison_rate'].iloc[0]:.0f}%",
        "seeds": rows["seed"].nunique(),
    }
