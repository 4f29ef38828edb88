"""A tracked hyperparameter study of handwritten digits."""

from importlib.metadata import version

__version__ = version("digitlab")
