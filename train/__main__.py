"""The entry point of `python -m train`."""

import importlib.util
import logging
import os
import signal
import sys

_PROG = 'python -m train'
_NEEDED = ('etils.epath', 'flax', 'jax', 'ml_dtypes', 'optax')
_TO_SAMPLE = ('grain', 'orbax.checkpoint', 'safetensors', 'tokenizers')
_TO_TRAIN = (
  'array_record', 'grain', 'orbax.checkpoint', 'tensorflow_datasets',
  'tokenizers',
)  # fmt: skip
_TO_PREPARE = (
  'array_record', 'pyarrow', 'sentencepiece', 'tensorflow_datasets', 'tiktoken',
  'tokenizers', 'zstandard',
)  # fmt: skip
# Beyond what every command needs.
_NEEDED_BY = {
  'compare': (*_TO_TRAIN, 'scipy'),
  'demo': _TO_TRAIN,
  'figure': (*_TO_TRAIN, 'scipy'),
  'prepare': _TO_PREPARE,
  'run': _TO_TRAIN,
  'sample': _TO_SAMPLE,
  'sweep': (*_TO_TRAIN, 'scipy'),
}


def main(argv: list[str] | None = None) -> int:
  """Runs a command.

  Args:
    argv: The command line after the program's name.

  Returns:
    The exit status: 0 done or stopped as asked, 2 a mistake in the input, 3
    diverged, 75 preempted, 130 interrupted.
  """
  argv = sys.argv[1:] if argv is None else argv
  needed = {*_NEEDED, *_NEEDED_BY.get(argv[0] if argv else '', ())}
  missing = sorted(name for name in needed if not _installed(name))
  if missing:
    print(
      f'{_PROG}: error: not installed: {", ".join(missing)}; the trainer needs '
      "the 'train' extra: pip install -e '.[train]'",
      file=sys.stderr,
    )
    return 2
  # The imports take a second, in which JAX can swallow a KeyboardInterrupt.
  previous = signal.signal(signal.SIGINT, _leave)
  from train import commands, errors  # After the check above.

  signal.signal(signal.SIGINT, previous)
  # Libraries configure the root logger as they are imported: keep out of it.
  logger = logging.getLogger('train')
  logger.handlers = [logging.StreamHandler()]
  logger.propagate = False
  logger.setLevel(logging.INFO)
  try:
    return commands.run(_PROG, argv)
  except errors.UserError as error:
    if not error.shared or _is_main():
      print(f'{_PROG}: error: {error}', file=sys.stderr)
    return error.status
  except KeyboardInterrupt:
    print(f'\n{_PROG}: interrupted', file=sys.stderr)
    return 130


def _is_main() -> bool:
  from train import distributed

  return distributed.is_main()


def _leave(number, frame):
  """Ends the program while nothing is under way."""
  del number, frame
  os.write(2, f'\n{_PROG}: interrupted\n'.encode())
  os._exit(130)


def _installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False


if __name__ == '__main__':
  sys.exit(main())
