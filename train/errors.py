"""The one exception that means: the user can mend this."""


class UserError(Exception):
  """A mistake in the input; its message is one line that says what to do."""

  shared = False
  """Whether all processes of a run raise it; one of them prints it."""
  status = 2
  """What the program exits with."""


class DivergedError(UserError):
  """Training has come to where nothing it computes is a number any more."""

  status = 3
