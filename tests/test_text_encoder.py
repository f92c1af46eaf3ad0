"Guards of the page 01b_text_encoder: no text is unknown, pooling finds the end mark, the seed decides a training"
import math
import pytest
import torch
import transformers
from t2i_nb.captions import tokenize
from t2i_nb.data import DataConfig, toy_flowers
from t2i_nb.text_encoder import (ClipConfig, _attribute_codes, _clip_batches, _linear_probe, _wordings, clip_text_config,
                                 contrastive_loss, train_clip, train_tokenizer)

@pytest.fixture(scope='module')
def flowers(): return toy_flowers(DataConfig(n_images=1024))

@pytest.fixture(scope='module')
def tokenizer(flowers, tmp_path_factory): return train_tokenizer(flowers.captions, tmp_path_factory.mktemp('tokenizer'))

def test_every_word_is_a_token_and_no_text_is_unknown(flowers, tokenizer):
    words = {w for c in flowers.captions for w in c.replace(',', '').replace('-', ' ').split() if w != '12'}
    assert len(words) > 60 and [w for w in words if len(tokenizer.tokenize(w)) > 1] == []
    assert len(tokenizer) < 800 and tokenizer.model_max_length == 28
    spelt = tokenizer.tokenize('Übergröße 🌸')
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(spelt)

def test_pooling_needs_the_tokenizers_end_mark(tokenizer):
    ids, config = tokenize(tokenizer, ['a red flower', 'a blue bloom at night'])['input_ids'], clip_text_config(tokenizer)
    def pooled(): return transformers.CLIPTextModel(config).eval()(ids).pooler_output
    right = pooled()
    config.eos_token_id = 49407 # CLIP's, which this vocabulary does not have
    wrong = pooled()
    assert not torch.equal(right[0], right[1]) and torch.equal(wrong[0], wrong[1])

def test_contrastive_loss():
    alike, perfect = torch.ones(8, 4), torch.eye(8)
    twins = perfect[[0, 0, *range(2, 8)]]
    assert contrastive_loss(alike, alike, perfect, 20.).item() == pytest.approx(math.log(8))
    assert contrastive_loss(perfect, perfect, perfect, 20.).item() < 1e-4
    assert contrastive_loss(twins, twins, twins @ twins.T, 20.).item() == pytest.approx(2*math.log(2)/8, abs=1e-5)

def test_hard_batches_share_attributes(flowers):
    codes = _attribute_codes(flowers)
    easy, hard = (_clip_batches(codes, epoch, ClipConfig(batch=32))[0] for epoch in range(2))
    common = [sum(codes[o][:, k].bincount().max().item() for k in range(6)) for o in (easy, hard)]
    assert common[1] > 1.3*common[0]
    plain = toy_flowers(DataConfig(n_images=8))
    plain.attributes = None
    assert _attribute_codes(plain).tolist() == [[i] for i in range(8)] and _wordings(plain, [3], 0, 'x') == [plain.captions[3]]

def test_the_seed_decides_a_training(flowers, tokenizer):
    def losses(seed):
        cfg = ClipConfig(hidden_size=32, num_layers=1, n_images=32, batch=16, images_seen=32, seed=seed)
        return [s.loss for s in train_clip(flowers, tokenizer, cfg)]
    assert losses(0) == losses(0) != losses(1)

def test_linear_probe_reads_a_sign():
    dots = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    signs = (dots[:, 0] > 0).long()
    assert (_linear_probe(dots[:100], signs[:100], dots[100:]) == signs[100:]).float().mean() > .85
