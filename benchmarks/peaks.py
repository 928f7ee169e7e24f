"""Published speeds of devices, for model FLOPs utilisation."""

from train.hardware import PEAKS, peak

__all__ = ['PEAKS', 'peak']
