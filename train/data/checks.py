"""What a document must be, wherever it comes from."""

from collections.abc import Callable

from train.data import source

Place = Callable[[], str]
"""Says where a document is; asked only when something is wrong with it."""


def decoded(raw: bytes, place: Place, problems: source.Problems) -> str | None:
  """Returns UTF-8 bytes as text, without a byte order mark; None if bad.

  Raises:
    UserError: as `problems.found`.
  """
  try:
    return raw.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    problems.found(
      'encoding',
      f'{place()} is not UTF-8 text (byte {error.start}: {error.reason})',
    )
    return None


def usable(text: str, place: Place, problems: source.Problems) -> bool:
  """Whether a text can be a document.

  Raises:
    UserError: as `problems.found`.
  """
  if not text or text.isspace():
    problems.found('empty', f'{place()}: the text is blank')
  elif len(text) > source.LARGEST:
    problems.found(
      'giant',
      f'{place()}: the text has {len(text):,} characters, a document may have'
      f' {source.LARGEST:,}',
    )
  elif '\0' in text:
    problems.found('encoding', f'{place()} is not text: it has NUL bytes')
  elif _has_half_surrogates(text):  # From an escape such as '\ud800'.
    problems.found(
      'encoding', f'{place()}: half a surrogate pair, which is no character'
    )
  else:
    return True
  return False


def _has_half_surrogates(text: str) -> bool:
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:
    return True
  return False
