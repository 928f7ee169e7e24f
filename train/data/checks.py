"""What a document must be, wherever it comes from."""

import codecs
from collections.abc import Callable

from train.data import source

Place = Callable[[], str]
"""Says where a document is; asked only when something is wrong with it."""


def decoded(
  raw: bytes,
  place: Place,
  problems: source.Problems,
  of_text_file: bool = False,
) -> str | None:
  """Returns UTF-8 bytes as text; None if bad.

  Args:
    raw: The bytes.
    place: Where they are.
    problems: What is told where they are bad.
    of_text_file: Whether they are of a file of text, which iconv can convert,
      and whose byte order mark is left out.

  Raises:
    UserError: as `problems.found`.
  """
  try:
    return raw.decode('utf-8-sig' if of_text_file else 'utf-8')
  except UnicodeDecodeError as error:
    hint = encoding_hint(raw) if of_text_file else ''
    problems.found(
      'encoding',
      f'{place()} is not UTF-8 text (byte {error.start}: {error.reason}){hint}',
    )
    return None


def encoding_hint(raw: bytes) -> str:
  """Returns how to convert a file with bytes that are not UTF-8 text.

  With NUL bytes it is no text at all, and there is no hint, unless they are as
  many as in UTF-16.
  """
  first = raw[:1000]
  if (
    raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    or first.count(0) > len(first) // 4
  ):
    return '; it looks like UTF-16: iconv -f UTF-16 -t UTF-8'
  if b'\0' in raw:
    return ''
  return '; if it is in another encoding: iconv -f LATIN1 -t UTF-8'


def document(text: str, place: Place, problems: source.Problems) -> str | None:
  """Returns a text without a leading byte order mark; None if it is unusable.

  Raises:
    UserError: as `problems.found`.
  """
  text = text.removeprefix('\ufeff')
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
    return text
  return None


def _has_half_surrogates(text: str) -> bool:
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:
    return True
  return False
