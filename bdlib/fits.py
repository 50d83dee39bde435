"""Whether the values of settings fit: names, ranges, budgets and attacks against the datasets at hand.

`python -m bdlib.fits` takes settings as JSON on its standard input; what is wrong with each, or null, comes on its standard output.
"""

import functools
import json
import sys

from bdlib import data, experiment, places


def complaints(settings: list[dict]) -> list[str | None]:
    """For each setting what is wrong with it, or None."""
    return [_complaint(values) for values in settings]


def _complaint(values: dict) -> str | None:
    try:
        setting = experiment.Setting(**values)
        if _at_hand(setting.dataset):
            setting.require_fits(_training_split(setting.profile, setting.dataset))
    except (ValueError, RuntimeError, OSError) as error:
        return str(error)
    return None


@functools.cache
def _training_split(profile: str, dataset: str) -> data.Dataset:
    """What a run of this profile trains on, read once for all runs."""
    return experiment.load_data(profile, dataset)[0]


def _at_hand(dataset: str) -> bool:
    """Whether the dataset can be looked at without a download; if not, the notebook itself checks the rest."""
    on_disk = places.dataset_file(dataset).exists()
    return on_disk or dataset in data.EMBEDDED or dataset not in data.NAMES


if __name__ == "__main__":
    json.dump(complaints(json.load(sys.stdin)), sys.stdout)
