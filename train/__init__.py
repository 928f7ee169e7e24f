"""A trainer for language models: from a laptop's CPU to a pod, one program."""
