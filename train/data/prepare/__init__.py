"""Text to token windows, once: a TFDS dataset in ArrayRecord."""

from train.data.prepare.pipeline import prepare

__all__ = ['prepare']
