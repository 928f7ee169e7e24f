"""Text to batches: sources, tokenizers, layouts, prepared data, a loader.

Nothing is imported here: what prepares data in many processes needs no JAX.
"""
