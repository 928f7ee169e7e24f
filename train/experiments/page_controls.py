"""What each arm of a control takes away, in a sentence."""

import html
import re
from typing import Any

from train.experiments.comparison import ArmResult, Comparison

_LR, _WD = 'optimizer.learning_rate', 'optimizer.weight_decay'
_EPS, _NORM = 'optimizer.eps', 'optimizer.match_norm'


def draw(comparison: Comparison) -> str:
  """What the controls take away, as HTML; empty without any."""
  by_sentence: dict[str, list[str]] = {}
  for name, sentence in sentences(comparison).items():
    by_sentence.setdefault(sentence, []).append(name)
  items = ''.join(
    f'<li><strong>{html.escape(", ".join(names))}</strong>: '
    f'{html.escape(sentence)}</li>'
    for sentence, names in by_sentence.items()
  )
  return f'<h2>Controls</h2><ul class="told">{items}</ul>' if items else ''


def sentences(comparison: Comparison) -> dict[str, str]:
  """Of the arms that a control has made, by name.

  They are known by the names that `train.experiments.controls` gives, and by
  changing nothing but what it changes.
  """
  arms = comparison.arms
  out = {}
  for name, arm in arms.items():
    for pattern, fields, sentence in _KINDS:
      found = re.fullmatch(pattern, name)
      if not found or found['of'] not in arms:
        continue
      of = arms[found['of']]
      if _changed(arm, of) == fields:
        words = {key: word or '' for key, word in found.groupdict().items()}
        out[name] = sentence.format(
          **words, r=', as measured' if 'measured' in name else '',
          **{_word(key): _number(arm.overrides[key]) for key in fields},
        )  # fmt: skip
        break
  return out


_KINDS = (
  (
    r'(?P<of>.+?)-(?:measured-)?lr-of-(?P<to>.+)',
    {_LR, _WD},
    'learning rate {lr}, at which its steady steps are as long as those of '
    '{to}{r}: against it, {to} shows what is left without another length of '
    'steps.',
  ),
  (
    r'(?P<of>.+?)-(?:measured-)?lr',
    {_LR, _WD},
    'learning rate {lr}, at which its steady steps are as long as those of the '
    'baseline{r}: it takes away that the power changes their length.',
  ),
  (
    r'(?P<of>.+)-eps',
    {_EPS},
    "Adam's eps is {eps}, as small beside powered gradients as the baseline's "
    'is beside its own: it takes away that the power gives eps more weight.',
  ),
  (
    r'(?P<of>.+)-norm',
    {_NORM},
    "the powered gradient is scaled back to the clipped one's norm: it takes "
    'away that the power changes the size of the whole gradient.',
  ),
  (
    r'(?P<of>.+)-lr(?P<rate>[\d.e+-]+)',
    {_LR, _WD},
    '{of} at the other learning rates that it is tuned over; the best of each '
    'side are compared, so that no side has a rate chosen for the other.',
  ),
)


def _changed(arm: ArmResult, of: ArmResult) -> set[str]:
  """Fields in which an arm is another than the one it is made of."""
  ours, theirs = dict(arm.overrides), dict(of.overrides)
  return {
    key
    for key in ours.keys() | theirs.keys()
    if key not in ours or ours[key] != theirs.get(key)
  }


def _word(field: str) -> str:
  return {_LR: 'lr', _WD: 'wd', _EPS: 'eps', _NORM: 'norm'}[field]


def _number(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)
