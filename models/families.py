"""The models by name, and by their config."""

from flax import nnx
from jax.sharding import Mesh

from models.config import DecoderConfig, LlamaConfig, Qwen2MoeConfig
from models.decoder import Decoder
from models.llama import Llama
from models.qwen2_moe import Qwen2Moe

CONFIGS: dict[str, type[DecoderConfig]] = {
  'llama': LlamaConfig,
  'qwen2_moe': Qwen2MoeConfig,
}

_MODELS: dict[type[DecoderConfig], type[Decoder]] = {
  LlamaConfig: Llama,
  Qwen2MoeConfig: Qwen2Moe,
}


def build(
  config: DecoderConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None
) -> Decoder:
  """Makes the model of a config; see `models.decoder.Decoder`."""
  return _MODELS[type(config)](config, rngs=rngs, mesh=mesh)


def family(config: DecoderConfig) -> str:
  """The name of a config's family, a key of `CONFIGS`."""
  return next(name for name, kind in CONFIGS.items() if type(config) is kind)
