"""How fast text becomes batches, against what bounds it and against peers.

    python -m benchmarks.input --tokenizer gpt2.tiktoken --files 'text/*.jsonl'
    python -m benchmarks.input --tokenizer gpt2.tiktoken \
      --tokenizer t5.spiece.model --minutes 10 --json FILE

Preparing is timed against the tokenizer's library alone, which encodes the same
text from memory in as many processes; reading against a gather from one
memory-mapped array, single reads through TFDS, and Grain's own pipelines.
Nothing is dropped from the page cache: what is timed is the processor's work.
Without `--files` the text is the prose in the directory that GRADPOWER_DATA
names, a few times over.
"""


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  # Not above: processes that are started import this file again, and are not
  # to wait for jax.
  from benchmarks import input_command

  input_command.main(argv)


if __name__ == '__main__':
  main()
