"""The shared package behind the notebooks: data, attacks, training, defenses, metrics, results."""

__version__ = "0.1.0"
