import hashlib

from hypothesis import given
from hypothesis import strategies as st

from train.data import split

FRACTIONS = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.text(), FRACTIONS, FRACTIONS)
def test_larger_fraction_only_adds(text, a, b):
  text_hash = split.text_hash(text)
  small, large = sorted((a, b))
  if split.is_held_out(text_hash, small):
    assert split.is_held_out(text_hash, large)


def test_bounds():
  assert split.is_held_out(b'\0' * 32, 1e-9)
  assert not split.is_held_out(b'\xff' * 32, 1 - 1e-9)
  assert split.text_hash('é') == hashlib.sha256(b'\xc3\xa9').digest()


def test_share():
  hashes = [split.text_hash(str(i)) for i in range(20_000)]
  share = sum(split.is_held_out(h, 0.05) for h in hashes) / len(hashes)
  assert abs(share - 0.05) < 0.006  # Four standard deviations.
