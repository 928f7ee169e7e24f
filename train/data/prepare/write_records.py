"""The second step: rows become files of records."""

import dataclasses
import pathlib

from array_record.python import array_record_module

from train.data.prepare import files, piece, plan, records, tokenize_part

# Records lie in groups of about so many bytes. A reader keeps 32 bytes a group
# in memory, looks at all of them in every read, and reads a group as a whole:
# of one record each, a large corpus takes gigabytes and milliseconds.
_GROUP_BYTES = 2**13
_READ_BYTES = 2**23


@dataclasses.dataclass(frozen=True)
class WriteRecords:
  """Writes a file of records, unless that is there."""

  rows: dict[str, piece.Rows]
  """By split."""
  serializer: records.Serializer
  out: pathlib.Path
  work: pathlib.Path

  def __call__(self, shard: plan.Shard, count: tokenize_part.Count) -> None:
    """Raises: UserError: the disk cannot be written."""
    if not (self.out / shard.name).exists():
      with files.writing(self.out):
        self._write(shard, count)

  def _write(self, shard: plan.Shard, count: tokenize_part.Count) -> None:
    temporary = self.work / shard.name
    step = max(1, _READ_BYTES // self.serializer.size)
    group = max(1, _GROUP_BYTES // self.serializer.size)
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), f'group_size:{group},uncompressed'
    )
    try:
      for start in range(shard.start, shard.stop, step):
        stop = min(start + step, shard.stop)
        rows = self.rows[shard.split].read(start, stop)
        for record in self.serializer.records(rows):
          writer.write(record)
        count(0, (stop - start) * self.serializer.size)
    finally:
      writer.close()
    files.move(temporary, self.out / shard.name)
