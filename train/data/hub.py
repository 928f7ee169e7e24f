"""Files of repositories on the Hugging Face hub."""

import pathlib
from collections.abc import Sequence

import huggingface_hub
from huggingface_hub import errors as hub_errors

from train import errors

_SECONDS = 10


def download(repo: str, names: Sequence[str], option: str) -> pathlib.Path:
  """Brings a file of a repository into the hub's cache, or finds it there.

  Args:
    repo: Its id, 'org/name'.
    names: The first of these files that it has is taken; without a network,
      the first that is in the cache.
    option: The option that named it, for the errors.

  Raises:
    UserError: there is no such repository or file, it is closed, or there is
      no network.
  """
  hub = huggingface_hub.HfApi()
  try:
    files = hub.model_info(repo, timeout=_SECONDS).siblings or []
    present = {file.rfilename for file in files}
    for name in names:
      if name in present:
        return pathlib.Path(hub.hf_hub_download(repo, name))
  except hub_errors.GatedRepoError as error:
    raise errors.UserError(
      f'{option}: {repo} is gated: ask for access on its page and log in with '
      '`hf auth login`, or download the file and name it'
    ) from error
  except (
    hub_errors.RepositoryNotFoundError,
    hub_errors.HFValidationError,
  ) as error:
    raise errors.UserError(
      f'{option}: {repo} is no file or folder here, and no public repository '
      'on the Hugging Face hub'
    ) from error
  except Exception as error:  # Of whatever carries the request.
    for name in names:
      cached = huggingface_hub.try_to_load_from_cache(repo, name)
      if isinstance(cached, str):
        return pathlib.Path(cached)
    raise errors.UserError(
      f'{option}: {repo} is no file or folder here, and the Hugging Face hub '
      f'cannot be reached: download {" or ".join(names[:2])} of {repo} '
      'elsewhere and name the file'
    ) from error
  raise errors.UserError(
    f'{option}: {repo} on the Hugging Face hub has none of {", ".join(names)}'
  )
