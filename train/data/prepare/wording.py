"""Counts in words, as the errors and the summary say them."""

from collections.abc import Mapping


def counted(count: int, thing: str) -> str:
  """Returns '1 document' or '1,234 documents'."""
  return f'{count:,} {thing}{"" if count == 1 else "s"}'


def left_out(skipped: Mapping[str, int]) -> str:
  """Returns '3 field, 1 file cut short (truncated)'.

  Args:
    skipped: By kind, as `train.data.source.Problems.counts`.
  """
  return ', '.join(
    f'{counted(count, "file")} cut short ({kind})'
    if kind == 'truncated'
    else f'{count:,} {kind}'
    for kind, count in sorted(skipped.items())
  )
