"Guards of the page 02c_prior: what decides a training, and what a prior is refused for"
import json
from dataclasses import replace
from types import SimpleNamespace
import pytest
import torch
from t2i_nb.captions import load_text_encoder
from t2i_nb.core import InputError
from t2i_nb.prior import PriorConfig, _prior_gap, check_prior, load_prior, made_for, sample_prior, save_prior, train_prior
from t2i_nb.vae import VAEConfig, load_vae

SHORT = PriorConfig(hidden=32, n_images=512)

@pytest.fixture(scope='module')
def training():
    "Latents that follow from their text, text embeddings with the null prompt first, rows"
    g = torch.Generator().manual_seed(0)
    texts = torch.randn(33, 4, 16, generator=g)
    return texts[1:, :2, :8].reshape(32, 1, 4, 4).contiguous(), texts, torch.arange(1, 33)

@pytest.fixture(scope='module')
def pipeline():
    tokenizer, text_encoder = load_text_encoder()
    def takes(side): return SimpleNamespace(vae=load_vae(VAEConfig()), tokenizer=tokenizer, text_encoder=text_encoder,
                                            unet=SimpleNamespace(config=SimpleNamespace(in_channels=1, sample_size=side)))
    return takes

def last(data, cfg=SHORT): return list(train_prior(*data, cfg))[-1].prior.net[-1].weight

def test_the_seed_decides_a_training(training):
    assert torch.equal(last(training), last(training)) and not torch.equal(last(training), last(training, replace(SHORT, seed=1)))

def test_several_captions_of_an_image(training):
    "A second wording that is the same, or is missing, changes nothing; another one does"
    z, texts, rows = training
    for second in (rows, 0*rows - 1): assert torch.equal(last((z, texts, torch.stack([rows, second], 1))), last(training))
    assert not torch.equal(last((z, texts, torch.stack([rows, rows.roll(1)], 1))), last(training))

def test_it_learns_from_text(training):
    *_, state = train_prior(*training, PriorConfig(hidden=64, n_images=9_600, batch=32, caption_dropout=0.))
    assert state.nll < 0 # the standard normal has 1.419
    assert (sample_prior(state.prior, training[1][1:]) - training[0]).abs().mean() < .3

def test_samples_are_keyed_per_image(training):
    prior = list(train_prior(*training, SHORT))[-1].prior
    def seeds(*numbers): return [torch.Generator().manual_seed(i) for i in numbers]
    assert (sample_prior(prior, training[1][1:4], seeds(0, 1, 2))[1:2] - sample_prior(prior, training[1][2:3], seeds(1))).abs().max() < 1e-4

def test_gap_of_two_correlated_numbers():
    a, b = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    pair = torch.stack([a, .8*a + .6*b], 1)[:, :, None, None]
    assert _prior_gap(pair, 1, 0) == pytest.approx(-.5*torch.log(torch.tensor(1 - .8**2)).item(), abs=.01)
    assert _prior_gap(pair, 0, 1) == pytest.approx(0, abs=1e-9)

def test_saved_and_refused(training, pipeline, tmp_path):
    prior = list(train_prior(*training, SHORT))[-1].prior
    prior.made_for = made_for(pipeline(4).vae, pipeline(4).tokenizer, pipeline(4).text_encoder)
    save_prior(prior, tmp_path/'prior')
    loaded = load_prior(tmp_path/'prior')
    assert torch.equal(sample_prior(loaded, training[1]), sample_prior(prior, training[1]))
    check_prior(loaded, pipeline(4))
    with pytest.raises(InputError, match=r'the UNet takes \(1, 16, 16\)'): check_prior(loaded, pipeline(16))
    for part in ('vae', 'text_encoder'):
        with pytest.raises(InputError, match=f"made for another {part.replace('_', ' ')}"):
            check_prior(replace(loaded, made_for=loaded.made_for | {part: '0'*16}), pipeline(4))
    with pytest.raises(InputError, match='there is no prior in'): load_prior(tmp_path/'absent')

def test_priors_of_an_older_version_load(training, pipeline, tmp_path):
    "Text encoders once had digests of 32 digits"
    prior = list(train_prior(*training, SHORT))[-1].prior
    prior.made_for = made_for(pipeline(4).vae, pipeline(4).tokenizer, pipeline(4).text_encoder)
    save_prior(prior, tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    config['made_for']['text_encoder'] = 'b5086c20c0214654ce07851b2797a8d6'
    (tmp_path/'config.json').write_text(json.dumps(config))
    check_prior(load_prior(tmp_path), pipeline(4))

def test_samples_have_the_deviation_that_is_predicted(monkeypatch):
    "A log variance of log 4 is a deviation of 2, not a variance of 4 as one"
    prior = SimpleNamespace(net=torch.nn.Identity(), shape=(4, 8, 8))
    monkeypatch.setattr('t2i_nb.prior._moments', lambda prior, x: (torch.zeros(len(x), *prior.shape), torch.full((len(x), *prior.shape), 4.).log()))
    monkeypatch.setattr('t2i_nb.prior._pool', lambda embeddings: embeddings)
    drawn = sample_prior(prior, torch.zeros(32, 1), [torch.Generator().manual_seed(i) for i in range(32)])
    assert abs(drawn.std().item() - 2) < .1
