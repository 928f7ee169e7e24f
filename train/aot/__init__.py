"""Compiling a recipe for TPUs that are not there; see `docs/aot.md`."""
