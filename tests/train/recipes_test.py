import pytest

from models import accounting, presets
from models.config import Qwen2MoeConfig
from train import config as config_lib
from train import ladder, paper, recipes
from train.config import MeshConfig
from train.errors import UserError
from train.mesh import check, make_mesh

LLAMA = {
  'llama_66m': 66e6,
  'llama_0.2b': 0.2e9,
  'llama_0.4b': 0.4e9,
  'llama_1b': 1e9,
  'llama_2b': 2e9,
}
MOE = {
  'qwen2_moe_0.2b': 0.2e9,
  'qwen2_moe_0.5b': 0.5e9,
  'qwen2_moe_1b': 1e9,
  'qwen2_moe_2b': 2e9,
}


def test_these_are_all():
  own = ['demo', 'demo_moe', *ladder.NAMES]
  assert list(recipes.RECIPES) == [*own, *LLAMA, *MOE]
  assert (*LLAMA, *MOE) == paper.NAMES


@pytest.mark.parametrize('name', recipes.RECIPES)
def test_a_recipe_is_a_function_of_a_config(name):
  config = recipes.get(name)
  assert config == recipes.RECIPES[name]()
  assert config_lib.from_dict(config_lib.to_dict(config)) == config
  assert recipes.RECIPES[name].__doc__.endswith(('.', '.\n  '))
  assert config.optimizer.power == (1.0 if name in ladder.NAMES else 1.2)
  assert config.optimizer.clip_norm == 1.0
  assert config.optimizer.weight_decay == 0.1
  assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.95)
  assert config.optimizer.eps == 1e-8
  assert config.optimizer.power_eps == 0
  assert config.seed == 0
  assert config.mesh == MeshConfig()


def test_the_demo():
  demo = recipes.get('demo')
  assert demo.optimizer.schedule == 'wsd'
  assert demo.tokens_per_step == 16 * 128
  assert demo.data.repeat


def test_an_unknown_name_lists_those_there_are():
  with pytest.raises(
    UserError, match=r"no recipe 'llama_7b'; there are: demo, .*, llama_2b, "
  ) as error:
    recipes.get('llama_7b')
  assert '\n' not in str(error.value)


def test_a_choice_goes_to_a_recipe_that_takes_it(monkeypatch):
  monkeypatch.setitem(recipes.RECIPES, 'mine', lambda corpus='a': corpus)
  assert recipes.get('mine') == 'a'
  assert recipes.get('mine', corpus=None) == 'a'
  assert recipes.get('mine', corpus='b', schedule='cos') == 'b'


@pytest.mark.parametrize('name', paper.NAMES)
def test_the_papers_on_c4(name):
  config = recipes.get(name)
  assert config == recipes.get(name, corpus='c4', schedule='cos')
  assert config.model == presets.get(name, 't5')
  assert config.model.vocab_size == config.data.vocab_size == 32100
  total = accounting.parameters(config.model).total
  # The mixtures are ours: as near as widths in steps of 64 come.
  wanted, far = {**LLAMA, **MOE}[name], 0.03 if name in MOE else 0.01
  assert total == pytest.approx(wanted, rel=far)
  assert (config.data.batch_size, config.data.sequence_length) == (512, 256)
  tokens = config.steps * config.tokens_per_step
  assert 20 * total <= tokens < 20 * total + config.tokens_per_step
  assert config.optimizer.schedule == 'cos'
  assert config.optimizer.final_lr_ratio == 0.1
  assert config.optimizer.warmup_steps == 1000
  assert config.eval_every == 200
  assert config.data.validation_tokens == 819_200
  assert not config.data.repeat
  assert not config.data.files


@pytest.mark.parametrize('name', paper.NAMES)
def test_the_papers_on_openwebtext(name):
  config = recipes.get(name, corpus='openwebtext')
  assert config.data.corpus == 'openwebtext'
  assert config.model == presets.get(name, 'gpt2')
  assert (config.model.vocab_size, config.data.vocab_size) == (50304, 50257)
  assert config.data.sequence_length == 1024
  assert config.tokens_per_step == 512 * 256
  total = accounting.parameters(config.model).total
  assert config.steps == -(-20 * total // 2**17)
  assert config.optimizer.final_lr_ratio == 0.05
  assert config.optimizer.learning_rate == (
    recipes.get(name).optimizer.learning_rate
  )


@pytest.mark.parametrize('corpus', paper.CORPORA)
def test_wsd_ends_in_a_tenth(corpus):
  config = recipes.get('llama_0.2b', corpus=corpus, schedule='wsd')
  assert config.optimizer.schedule == 'wsd'
  assert config.optimizer.final_lr_ratio == 0.1


def test_another_text_is_treated_as_c4_is():
  config = recipes.get('llama_66m', corpus='wikipedia_leads')
  assert config.data.corpus == 'wikipedia_leads'
  assert config.model == recipes.get('llama_66m').model


def test_a_wrong_schedule_is_named():
  with pytest.raises(UserError, match=r"--optimizer.schedule .* not 'linear'"):
    recipes.get('llama_66m', schedule='linear')


def test_learning_rates():
  """The one that is known, and the rule for the others."""
  rates = {n: recipes.get(n).optimizer.learning_rate for n in paper.NAMES}
  assert rates['llama_0.2b'] == 1e-3
  assert list(rates.values()) == [
    1.5e-3, 1e-3, 6e-4, 6e-4, 3e-4, 1.5e-3, 1.5e-3, 1e-3, 6e-4,
  ]  # fmt: skip


def test_the_known_run_has_about_30k_steps():
  assert recipes.get('llama_0.2b').steps == 30_568


@pytest.mark.parametrize('name', paper.NAMES)
def test_eight_devices_can_share_it(name):
  config = recipes.get(name)
  check(config, make_mesh(MeshConfig(fsdp=8)))
  check(config, make_mesh(MeshConfig(data=2, fsdp=4)))
  if isinstance(config.model, Qwen2MoeConfig):
    check(config, make_mesh(MeshConfig(expert=8)))


def test_heads_that_a_tensor_axis_cannot_split_are_named():
  config = recipes.get('llama_1b')
  with pytest.raises(UserError, match=r'--model.n_heads \(25\)'):
    check(config, make_mesh(MeshConfig(tensor=2)))
  check(recipes.get('llama_2b'), make_mesh(MeshConfig(tensor=4)))
