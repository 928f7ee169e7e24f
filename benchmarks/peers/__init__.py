"""Other trainers at the step benchmark's shape, each in its own environment.

A peer is a process that takes steps when it is told to, so that programs which
are compared run in turn.
"""
