"""Text to token windows, once: a TFDS dataset in ArrayRecord."""
