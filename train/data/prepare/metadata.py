"""What makes files of records a TFDS dataset: features.json and the like."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters

from train import storage
from train.data import layouts, source, stats
from train.data.prepare import files, plan

_DESCRIPTION = """\
Windows of {length} tokens and one more, of text in the layout '{layout}': \
inputs are tokens[:-1], targets tokens[1:].
"""


def write(
  out: pathlib.Path,
  request: source.Request,
  dtype: np.dtype,
  shards: Mapping[str, Sequence[plan.Shard]],
) -> None:
  """Describes the files that are there; the same ones in the same bytes.

  Args:
    out: Where they are.
    request: What was made.
    dtype: Of the tokens.
    shards: The files, by split.
  """
  arrays = layouts.features(request.layout, request.sequence_length, dtype)
  features = tfds.features.FeaturesDict(
    {
      name: tfds.features.Tensor(
        shape=shape, dtype=kind.type, encoding=tfds.features.Encoding.BYTES
      )
      for name, (shape, kind) in arrays.items()
    }
  )
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name=plan.NAME,
      version=tfds.core.Version(f'{stats.FORMAT}.0.0'),
      data_dir=str(out),
      module_name=__name__,
    ),
    description=_DESCRIPTION.format(
      length=request.sequence_length, layout=request.layout
    ),
    features=features,
  )
  info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
  info.set_splits(
    tfds.core.splits.SplitDict(
      [
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=[shard.stop - shard.start for shard in of_split],
          num_bytes=sum(shard.size for shard in of_split),
          filename_template=tfds.core.ShardedFileTemplate(
            data_dir=out,
            dataset_name=plan.NAME,
            split=split,
            filetype_suffix='array_record',
          ),
        )
        for split, of_split in shards.items()
      ]
    )
  )
  info.write_to_directory(out)
  for name in ('features.json', 'dataset_info.json'):
    files.sync(out / name)
  storage.sync_directory(out)
