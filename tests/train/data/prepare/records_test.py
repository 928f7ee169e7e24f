import hypothesis
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import strategies as st
from tensorflow_datasets.core import example_serializer

from train.data import layouts
from train.data.prepare import records


def features(layout, length, dtype):
  return tfds.features.FeaturesDict(
    {
      name: tfds.features.Tensor(
        shape=shape, dtype=kind.type, encoding=tfds.features.Encoding.BYTES
      )
      for name, (shape, kind) in layouts.features(layout, length, dtype).items()
    }
  )


def random_rows(layout, length, dtype, count):
  rng = np.random.default_rng(count)
  return {
    name: rng.integers(0, 2**15, (count, *shape)).astype(kind)
    for name, (shape, kind) in layouts.features(layout, length, dtype).items()
  }


@hypothesis.settings(max_examples=60)
@hypothesis.given(
  layout=st.sampled_from(layouts.LAYOUTS),
  # Lengths of one byte and of more, of every field.
  length=st.integers(1, 300) | st.sampled_from([8191, 16384]),
  dtype=st.sampled_from([np.dtype(np.uint16), np.dtype(np.uint32)]),
  count=st.integers(1, 4),
)
def test_tfds_reads_what_was_written(layout, length, dtype, count):
  serializer = records.Serializer(layout, length, dtype)
  rows = random_rows(layout, length, dtype, count)
  found = list(serializer.records(rows))
  assert [len(record) for record in found] == [serializer.size] * count
  parsed = features(layout, length, dtype)
  for i, record in enumerate(found):
    example = parsed.deserialize_example_np(record)
    assert set(example) == set(rows)
    for name, values in rows.items():
      np.testing.assert_array_equal(example[name], values[i])
      assert example[name].dtype == values.dtype


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_as_tfds_writes_it(layout):
  dtype = np.dtype(np.uint16)
  rows = random_rows(layout, 7, dtype, 1)
  [record] = records.Serializer(layout, 7, dtype).records(rows)
  parsed = features(layout, 7, dtype)
  theirs = example_serializer.ExampleSerializer(
    parsed.get_serialized_info()
  ).serialize_example(
    parsed.encode_example({name: values[0] for name, values in rows.items()})
  )
  assert len(record) == len(theirs)
  if len(rows) == 1:  # Of several, protobuf promises no order.
    assert record == theirs
