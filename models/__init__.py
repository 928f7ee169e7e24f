"""Language models in Flax NNX: authored as modules, run as plain pytrees."""
