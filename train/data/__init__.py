"""Text to batches: sources, a vocabulary, a cache of tokens, a loader."""

from train.data.cache import default_directory
from train.data.dataset import Dataset, load

__all__ = ['Dataset', 'default_directory', 'load']
