"The UNet's configuration, its determinism, its attention maps and its costs."
import inspect
import pytest
import torch
from diffusers import UNet2DConditionModel
from t2i_nb.core import InputError, from_dict
from t2i_nb.unet import UNET_KEYS, UNetConfig, attention_maps, build_unet, count_flops, count_parameters, unet_keys

def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope='module')
def unet(): return build_unet(UNetConfig(width=32), 8, 4, 48).eval()

def test_keys_are_those_of_the_stock_class():
    assert set(UNET_KEYS) == set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {'self'}

def test_width_32_on_8_pixels_is_the_network_written_by_hand():
    keys = unet_keys(UNetConfig(width=32), 8, 4, 48)
    assert keys == dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=48,
        down_block_types=('CrossAttnDownBlock2D',)*2, up_block_types=('CrossAttnUpBlock2D',)*2, norm_num_groups=8, attention_head_dim=(1, 2))

@pytest.mark.parametrize('size, channels', ((4, (64,)), (8, (64, 128)), (16, (64, 128, 256)), (32, (64, 128, 256, 256)), (64, (64, 128, 256, 256))))
def test_levels_follow_from_the_size(size, channels):
    assert unet_keys(UNetConfig(), size, 4, 48)['block_out_channels'] == channels

@pytest.mark.parametrize('width, groups, heads', ((32, 8, (1, 2, 4)), (40, 10, (1, 2, 5)), (64, 16, (2, 4, 8)), (96, 24, (3, 6, 12)), (320, 32, (10, 20, 40))))
def test_groups_and_heads_divide_the_channels(width, groups, heads):
    keys = unet_keys(UNetConfig(width=width), 16, 4, 48)
    assert (keys['norm_num_groups'], keys['attention_head_dim']) == (groups, heads)
    assert all(c % n == 0 for c, n in zip(keys['block_out_channels'], heads))

def test_attention_begins_at_its_size():
    assert unet_keys(UNetConfig(), 32, 3, 48)['down_block_types'][:2] == ('DownBlock2D', 'CrossAttnDownBlock2D')
    assert unet_keys(UNetConfig(attention_size=8), 32, 3, 48)['up_block_types'] == ('CrossAttnUpBlock2D',)*2 + ('UpBlock2D',)*2

def test_sizes_and_widths_that_cannot_work_are_refused():
    unet_keys(UNetConfig(levels=3), 20, 4, 48)
    with pytest.raises(InputError, match='sample size 18 is not a multiple of 4.*use 16 or 20'): unet_keys(UNetConfig(levels=3), 18, 4, 48)
    with pytest.raises(InputError, match='width 50 is not a multiple of 8; use 48'): unet_keys(UNetConfig(width=50), 8, 4, 48)

def test_overrides_reach_every_key_and_derived_keys_follow():
    cfg = from_dict(UNetConfig, {'width': '32', 'overrides': {'block_out_channels': [48, 96, 96], 'norm_eps': 1e-6}})
    keys = unet_keys(cfg, 16, 4, 48)
    assert (keys['attention_head_dim'], keys['norm_num_groups'], keys['norm_eps']) == ((1, 3, 3), 12, 1e-6)
    with pytest.raises(InputError, match="did you mean 'norm_eps'"): unet_keys(UNetConfig(overrides={'norm_esp': 1e-6}), 8, 4, 48)
    with pytest.raises(InputError, match=r'\(32\) must be divisible by num_groups \(12\)'):
        build_unet(UNetConfig(width=32, overrides={'norm_num_groups': 12}), 8, 4, 48)

def test_weights_depend_on_the_seed_alone(unet):
    before = torch.get_rng_state()
    torch.manual_seed(5)
    same, other = (build_unet(UNetConfig(width=32), 8, 4, 48, seed=s) for s in (0, 1))
    assert torch.equal(same.conv_in.weight, unet.conv_in.weight) and not torch.equal(other.conv_in.weight, unet.conv_in.weight)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    build_unet(UNetConfig(width=16), 8, 4, 48)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)

def test_classes_change_the_prediction_and_are_saved(tmp_path):
    unet = build_unet(UNetConfig(width=16), 8, 4, 48, class_names=('rose', 'tulip')).eval()
    with torch.no_grad(): a, b, c = (unet(torch.ones(1, 4, 8, 8), 500, torch.ones(1, 3, 48), torch.tensor([k])).sample for k in (0, 0, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    unet.save_pretrained(tmp_path)
    assert UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=False).config.class_names == ['rose', 'tulip']

def test_looking_at_attention_changes_nothing(unet):
    latents, words, timestep = randn(2, 4, 8, 8), randn(2, 24, 48, seed=1), torch.tensor([10, 900])
    before = dict(unet.attn_processors)
    with torch.no_grad(): model_pred = unet(latents, timestep, words).sample
    maps = attention_maps(unet, latents, timestep, words)
    assert unet.attn_processors == before and len(maps) == 7
    for m in maps.values(): assert torch.allclose(m.sum(1), torch.ones_like(m[:, 0]), atol=1e-5)
    with torch.no_grad(): assert torch.equal(unet(latents, timestep, words).sample, model_pred)

def test_costs_are_counted(unet):
    from torch.utils.flop_counter import FlopCounterMode
    assert count_parameters(unet.conv_in) == 3*3*4*32 + 32
    with FlopCounterMode(display=False) as counter, torch.no_grad(): unet(randn(1, 4, 8, 8), 10, randn(1, 24, 48))
    assert .9 < counter.get_total_flops()/count_flops(unet) <= 1 # a real pass hides the fused attention's products
    wide = build_unet(UNetConfig(width=64), 8, 4, 48)
    assert count_flops(wide)/count_flops(unet) == pytest.approx(4, abs=.4) and count_flops(unet, sample_size=16) > 3*count_flops(unet)

def test_pixels_and_a_pooled_sentence():
    unet = build_unet(UNetConfig(width=16, overrides=dict(addition_embed_type='text', addition_embed_type_num_heads=4,
                                                          resnet_time_scale_shift='scale_shift')), 32, 3, 48)
    with torch.no_grad(): assert unet(randn(1, 3, 32, 32), 500, randn(1, 24, 48)).sample.shape == (1, 3, 32, 32)
    assert unet.add_embedding(randn(1, 24, 48)).shape == (1, 64)
