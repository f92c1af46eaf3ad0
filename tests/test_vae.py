"Guards of the page 02_vae: layouts of configurations, statistics, and what a cache of latents keeps apart"
import diffusers
import pytest
import torch
from t2i_nb.core import InputError
from t2i_nb.data import DataConfig
from t2i_nb.sources import load_dataset
from t2i_nb.vae import (VAEConfig, build_latent_cache, build_vae, decode_latents, encode_images, fold_statistics, load_vae,
                        measure_latents, posterior, round_trip, vae_factor)

@pytest.fixture(scope='module')
def vae(): return load_vae(VAEConfig())

@pytest.fixture(scope='module')
def flowers(): return load_dataset(DataConfig(n_images=16))

def tiny_vae():
    return diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                                     num_decoder_blocks=(1, 1), latent_channels=4)

def test_factor_of_a_vae_its_configuration_or_none(vae):
    assert [vae_factor(o) for o in (vae, vae.config, dict(vae.config), None)] == [8, 8, 8, 1]
    assert [vae_factor(o) for o in (tiny_vae(), tiny_vae().config)] == [2, 2]

def test_a_vae_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no VAE '.*absent'"): load_vae(VAEConfig(name=str(tmp_path/'absent')))

def test_sides_are_checked(vae):
    for shape in ((66, 64), (64, 66)):
        with pytest.raises(InputError, match='size 66 is not a multiple of 8.*use 64 or 72'): posterior(vae, torch.zeros(1, 3, *shape))

def test_fold_with_scale_and_shift(flowers):
    "Latents get unit variance, images stay"
    raw, x = build_vae(VAEConfig(name='new')).eval(), flowers.batch(range(8))
    raw.register_to_config(scaling_factor=.18215, shift_factor=.1)
    before = decode_latents(raw, encode_images(raw, x))
    fold_statistics(raw, *measure_latents(raw, [x]))
    mean, std = measure_latents(raw, [x])
    assert mean.abs().max() < 1e-3 and (std - 1).abs().max() < 1e-3 and raw.config.scaling_factor == 1
    assert (decode_latents(raw, encode_images(raw, x)) - before).abs().max() < 1e-4

def test_fold_of_a_tiny_autoencoder(flowers):
    tiny, x = tiny_vae().eval(), flowers.batch(range(8))
    fold_statistics(tiny, *measure_latents(tiny, [x]))
    assert abs(measure_latents(tiny, [x])[1].mean() - 1) < 1e-3 and posterior(tiny, x)[1].abs().max() == 0
    assert 'kl' not in round_trip(tiny, [x])

def test_the_shipped_vae_is_folded(vae):
    mean, std = measure_latents(vae, load_dataset(DataConfig(n_images=256)).batch(range(256)).split(64))
    assert mean.abs().max() < .1 and (std - 1).abs().max() < .1

def test_divergence_is_that_of_torch(vae, flowers):
    x = flowers.batch(range(4))
    mean, std = posterior(vae, x)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(mean, std), normal(0., 1.)).sum((1, 2, 3)).mean()
    assert abs(round_trip(vae, [x])['kl'] - theirs) < .05

def test_posterior_samples_are_keyed_per_image(vae, flowers):
    x = flowers.batch(range(4))
    def seeds(*numbers): return [torch.Generator().manual_seed(i) for i in numbers]
    whole = encode_images(vae, x, seeds(0, 1, 2, 3))
    assert (encode_images(vae, x[1:2], seeds(1)) - whole[1:2]).abs().max() < 1e-4
    assert not torch.equal(encode_images(vae, x[:1], seeds(5)), whole[:1])

def test_cache_encodes_what_is_new(vae, flowers, tmp_path):
    seen = []
    hook = vae.encoder.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    cache = build_latent_cache(flowers, vae, tmp_path)['mean']
    again = build_latent_cache(flowers, vae, tmp_path)['mean']
    more = build_latent_cache(load_dataset(DataConfig(n_images=24)), vae, tmp_path)['mean']
    hook.remove()
    assert seen == [16, 8] and torch.equal(again[:], cache[:]) and torch.equal(more[:16], cache[:])
    mirrored = build_latent_cache(flowers.subset(range(4)), vae, tmp_path, flip=True)['mean']
    assert (mirrored[:].float() - posterior(vae, flowers.batch(range(4), flip=True))[0]).abs().max() < 5e-3
    assert len(list(tmp_path.glob('latents-*'))) == 1

def test_another_scaling_factor_is_another_folder(flowers, tmp_path):
    raw = build_vae(VAEConfig(name='new')).eval()
    once = build_latent_cache(flowers, raw, tmp_path)['mean'][:]
    raw.register_to_config(scaling_factor=2.)
    assert (build_latent_cache(flowers, raw, tmp_path)['mean'][:] - 2*once).abs().max() < 2e-3
    assert len(list(tmp_path.glob('latents-*'))) == 2

def test_a_replaced_image_is_encoded_and_a_moved_one_is_not(vae, flowers, tmp_path):
    garden, photos = tmp_path/'garden', DataConfig(source=str(tmp_path/'garden'), validation_fraction=0)
    garden.mkdir()
    for i in range(4): flowers.image(i).save(garden/f'{i}.png')
    first = build_latent_cache(load_dataset(photos), vae, tmp_path)['mean'][:]
    flowers.image(9).save(garden/'1.png')
    (garden/'3.png').rename(garden/'0a.png')
    second = build_latent_cache(load_dataset(photos), vae, tmp_path)['mean'][:] # 0.png, 0a.png, 1.png, 2.png
    assert [torch.equal(first[i], second[j]) for i, j in enumerate((0, 2, 3, 1))] == [True, False, True, True]
