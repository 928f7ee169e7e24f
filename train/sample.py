"""Text from a run directory or a Hugging Face folder, as it is generated."""

import dataclasses
import io
import logging
import os
import pathlib
import sys
from typing import Any

import jax
from flax import nnx

from models import families, huggingface, sharding
from models.decoder import Decoder, unstacked
from train import checkpoint, config, storage
from train.data.prompt import PromptTokenizer, TextStream, read_json
from train.errors import UserError
from train.generate import generate
from train.interrupt import Interrupt
from train.sample_options import Options

_logger = logging.getLogger('train')


@dataclasses.dataclass(frozen=True)
class Source:
  """What text comes from."""

  model: Decoder
  """On one device, its layers not stacked."""
  tokenizer: PromptTokenizer
  """Of the model's tokens."""
  length: int | None
  """Tokens that the model saw at once in training, if known."""


def load(folder: pathlib.Path, step: int | None = None) -> Source:
  """Reads a run directory or a Hugging Face folder, whichever it is.

  Args:
    folder: Its config.json tells.
    step: Of a run's checkpoint; None for the latest.

  Raises:
    UserError: it is neither, or a file is missing or broken.
  """
  path = folder / 'config.json'
  if not path.exists():
    raise UserError(_neither(folder))
  given = read_json(path)
  mesh = sharding.make_mesh(jax.devices()[:1])
  if 'model_type' in given:
    if step is not None:
      raise UserError(f'{folder} is a Hugging Face folder: it has no --step')
    tokenizer = PromptTokenizer.of_hugging_face(folder)
    try:
      model = huggingface.load(folder, mesh=mesh)
    except (ValueError, OSError) as error:
      raise UserError(_first_line(error)) from error
    length = given.get('max_position_embeddings')
    return Source(model, tokenizer, length if type(length) is int else None)
  if not {'model', 'data'} <= given.keys():
    raise UserError(_neither(folder))
  try:
    run = config.from_dict(given)
  except ValueError as error:
    reason = _first_line(error)
    if isinstance(given['model'], dict) and 'family' not in given['model']:
      reason = 'it does not say model.family'
    raise UserError(
      f'{path} was written by another version of this program, or is damaged '
      f'({reason}): sample it with that version, or train it again, in another '
      '--run-dir'
    ) from error
  tokenizer = PromptTokenizer.of_run(folder, run.data.layout)
  model = _restore(run.model, folder / 'checkpoints', step, mesh)
  return Source(model, tokenizer, run.data.sequence_length)


def run(folder: pathlib.Path, options: Options, step: int | None = None) -> str:
  """Writes the prompt and what follows to stdout, warnings to stderr.

  Args:
    folder: See `load`.
    options: What to generate.
    step: See `load`.

  Returns:
    'done', also where whoever reads stdout has had enough; or 'interrupted'.

  Raises:
    UserError: the input is at fault.
  """
  source = load(folder, step)
  prompt = source.tokenizer.encode(options.prompt)
  _check(source, prompt, options.tokens)
  tokens = generate(
    source.model,
    prompt,
    options.tokens,
    temperature=options.temperature,
    top_p=options.top_p,
    seed=options.seed,
    allowed_V=source.tokenizer.known(source.model.config.vocab_size),
  )
  stream = TextStream(source.tokenizer.decode, prompt)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='replace')  # Of a terminal without Unicode.
  with Interrupt() as interrupt:
    try:
      _write(options.prompt)
      try:
        for token in tokens:
          if interrupt.received or token in source.tokenizer.ends:
            break
          _write(stream.add(token))
        _write(stream.rest())
      finally:
        _write('\n')
    except OSError as error:
      # Python flushes stdout once more as it exits.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      if not isinstance(error, BrokenPipeError):
        raise UserError(f'cannot write the text: {error.strerror}') from error
    return 'interrupted' if interrupt.received else 'done'


def _restore(
  model_config: Any,
  checkpoints: pathlib.Path,
  step: int | None,
  mesh: jax.sharding.Mesh,
) -> Decoder:
  """A model with the parameters of a checkpoint, its layers unstacked."""

  def structure(model_config):
    return nnx.eval_shape(
      lambda: families.build(model_config, rngs=nnx.Rngs(params=0), mesh=mesh)
    )

  model = structure(model_config)
  shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  params = checkpoint.restore_params(
    checkpoints,
    jax.tree.map(
      lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
      shapes,
      sharding.param_shardings(model, mesh),
    ),
    step,
  )
  if model_config.scan_layers:  # Each token would slice all of them.
    params = params | {'layers': unstacked(params['layers'], model_config)}
    model = structure(dataclasses.replace(model_config, scan_layers=False))
  graph, _ = nnx.split(model, nnx.Param)
  return nnx.merge(graph, params)


def _check(source: Source, prompt: list[int], tokens: int) -> None:
  vocab_size = source.model.config.vocab_size
  if max(prompt) >= vocab_size:
    raise UserError(
      f'the prompt has token {max(prompt)}, the model only {vocab_size}: '
      'the tokenizer is of another model'
    )
  total = len(prompt) + tokens
  if source.length is not None and total > source.length:
    _logger.warning(
      'warning: prompt and --tokens come to %d tokens, the model was trained '
      'on %d at once: the text may fall apart past them',
      total,
      source.length,
    )


def _write(text: str) -> None:
  print(text, end='', flush=True)


def _neither(folder: pathlib.Path) -> str:
  if not folder.is_dir():
    return f'no directory {folder}'
  message = (
    f'{folder} is neither a run directory nor a Hugging Face folder: its '
    'config.json is missing or of something else'
  )
  runs = sorted(
    str(path.parent) for path in storage.matches(folder, '*/config.json')
  )
  return f'{message}; did you mean {" or ".join(runs)}?' if runs else message


def _first_line(error: Exception) -> str:
  return str(error).strip().split('\n')[0]
