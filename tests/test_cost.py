"Estimates that hang together for every recipe, instance type and number of machines; measured speeds; prices from an API that misbehaves"
import json, os, subprocess, sys
from dataclasses import asdict
import pytest
from t2i_nb import cost
from t2i_nb.checkpoint import cost_summary, open_cost_log, read_cost
from t2i_nb.core import InputError, apply_overrides, find_recipe, load_config, save_config
from t2i_nb.recipe import RunConfig

@pytest.fixture(autouse=True)
def nothing_measured(tmp_path, monkeypatch): monkeypatch.setenv('T2I_CALIBRATION', str(tmp_path/'none'/'calibration.json'))

def recipe(name, *overrides): return apply_overrides(load_config(find_recipe(name), RunConfig), list(overrides))

@pytest.mark.parametrize('name', ['flowers128', 'demo', *(pytest.param(o, marks=pytest.mark.slow) for o in ('cifar10', 'pokemon32', 'celeba128', 'folder'))])
def test_every_instance_type(name):
    "Low, expected and high are in order; dollars are hours times price; parts add up; a GPU too many is refused in a sentence"
    for i in cost.INSTANCES.values():
        for nodes in (1, 2, 4):
            try: e = cost.estimate_cost(recipe(name), i.name, nodes, spot=False)
            except InputError as error: assert 'cannot be shared' in str(error); continue
            assert 0 < e.hours[0] < e.hours[1] < e.hours[2] and 0 < e.dollars[0] < e.dollars[1] < e.dollars[2]
            assert e.dollars[1] == pytest.approx(e.hours[1]*nodes*i.dollars) == pytest.approx(e.on_demand) and e.dollars_per_hour == nodes*i.dollars
            assert sum(asdict(e.times).values()) == pytest.approx(e.seconds) and min(asdict(e.times).values()) >= 0
            assert e.images_per_second == pytest.approx(recipe(name).train.n_images/e.times.steps)
            spot = cost.estimate_cost(recipe(name), i.name, nodes)
            assert spot.dollars[1] < e.dollars[1] and spot.hours[1] > e.hours[1] and str(spot)

def test_what_must_change_an_estimate():
    base = recipe('flowers128')
    def hours(*overrides, **how): return cost.estimate_cost(recipe('flowers128', *overrides), 'ml.g4dn.xlarge', **{'spot': False, **how}).hours[1]
    plain = cost.estimate_cost(base, 'ml.g4dn.xlarge', spot=False).hours[1]
    assert hours('train.n_images=1106000') > 1.7*plain and hours('unet.width=256') > 2*plain and hours('train.precision=float32') > 2*plain
    assert hours('train.gradient_checkpointing=true') > plain and hours(cached=False) > 2*plain and hours(images=80_000) > plain
    assert hours('train.validation_images=2560') > plain and hours('data.flip=true') > plain
    assert cost.estimate_cost(base, 'ml.g4dn.xlarge', prices={'ml.g4dn.xlarge': 7.36}, spot=False).dollars[1] == pytest.approx(7.36*plain)
    assert not cost.estimate_cost(recipe('flowers128', 'unet.width=512', 'train.global_batch=512'), 'ml.g4dn.xlarge').fits
    with pytest.raises(InputError, match='--nodes is 0'): cost.estimate_cost(base, 'ml.g4dn.xlarge', 0)

def test_flops_are_those_of_a_real_pass():
    "Counting on shapes gives what a counter sees in a pass over real numbers"
    import diffusers, torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from t2i_nb.unet import UNetConfig, unet_keys
    keys = unet_keys(UNetConfig(width=16, attention_size=8), 8, 4, 32)
    shapes = (1, 4, 8, 8), (1,), (1, 7, 32)
    flops, kept, parameters = cost.count_passes(lambda: diffusers.UNet2DConditionModel(**keys), shapes)
    net = diffusers.UNet2DConditionModel(**keys)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: # the counter does not know the CPU's fused attention
        net(*map(torch.ones, shapes)).sample.sum().backward()
    assert (flops, parameters) == (counter.get_total_flops(), sum(p.numel() for p in net.parameters())) and kept > 0

def test_no_network_no_weights():
    "An estimate opens no connection and loads no weight"
    code = ('import socket, sys\ndef no(*a, **k): raise AssertionError("network")\nsocket.socket.connect = no\n'
            'from t2i_nb import cost\nassert "torch" not in sys.modules and "boto3" not in sys.modules\n'
            'from t2i_nb.core import find_recipe, load_config\nfrom t2i_nb.recipe import RunConfig\n'
            'import safetensors.torch, safetensors\nsafetensors.torch.load_file = safetensors.safe_open = no\n'
            'print(cost.estimate_cost(load_config(find_recipe("demo"), RunConfig), "ml.g5.xlarge").dollars[1] > 0)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'})
    assert done.stdout.strip() == 'True', done.stderr

def test_frozen_parts():
    "Text encoders and VAEs are counted by their configuration: shipped, known by name, and new"
    from t2i_nb.vae import VAEConfig
    assert cost._text_shape(recipe('flowers128').text) == (768, 12, 77) and cost._text_shape(recipe('demo').text)[:2] == (128, 3)
    small, vae = (cost.count_passes(make, shapes)[0] for make, shapes in (
        (lambda: cost._make_vae(cost._vae_config(VAEConfig(name='new', block_out_channels=(32, 64)))), ((1, 3, 32, 32),)),
        (lambda: cost._make_vae(cost.SD_VAE), ((1, 3, 32, 32),))))
    assert 0 < small < vae and cost._vae_config(VAEConfig(name='')) is None
    assert cost._vae_config(VAEConfig(name='tiny'))['_class_name'] and cost._vae_config(VAEConfig(name='stabilityai/sd-vae-ft-mse')) == cost.SD_VAE

def test_next_priced():
    names = list(cost.INSTANCES)
    walk = ['ml.g4dn.xlarge']
    while (after := cost.next_priced(walk[-1])): walk.append(after.name)
    dollars = [cost.INSTANCES[n].dollars for n in walk]
    assert walk[-1] == 'ml.p4d.24xlarge' and dollars == sorted(dollars) and len({*walk}) == len(walk) and {*walk} <= {*names}

def test_calibration(tmp_path, monkeypatch):
    "What a run measured is found again, for any number of machines, and the file of another GPU or a damaged one does no harm"
    cfg, run = recipe('flowers128', 'train.n_images=553000'), tmp_path/'run'
    monkeypatch.setenv('T2I_CALIBRATION', str(tmp_path/'deep'/'calibration.json'))
    run.mkdir(); save_config(cfg, run/'config.yaml')
    for name, nodes in (('ml.g5.xlarge', 1), ('ml.g4dn.xlarge', 1), ('ml.p3.2xlarge', 2)):
        before = cost.estimate_cost(cfg, name, nodes)
        assumed = before.images_per_second
        (run/'metrics.jsonl').write_text(''.join(json.dumps(dict(images_seen=n, images_per_second=assumed*.8)) + '\n' for n in range(5)) + '{"images')
        noted = cost.calibrate_gpu(run, name, nodes)
        e = cost.estimate_cost(cfg, name, nodes)
        assert 0 < noted['mfu'] < 1 and e.hours[2]/e.hours[0] < before.hours[2]/before.hours[0] and e.images_per_second == pytest.approx(.8*assumed, rel=.02) and e.calibrated == 'run'
    assert {*cost.read_calibration()} == {'A10G', 'T4', 'V100'} and not cost.estimate_cost(cfg, 'ml.g6.xlarge').calibrated
    cost.calibration_file().write_text('{"T4": ')
    assert not cost.estimate_cost(cfg, 'ml.g4dn.xlarge').calibrated
    from t2i_nb.__main__ import main
    assert main(['calibrate', str(run), '--instance-type', 'ml.g5.xlarge']) == 0
    assert main(['calibrate', str(run)]) == 2 and main(['calibrate', str(run), '--instance-type', 'ml.g5.xlrge']) == 2
    assert main(['calibrate', str(tmp_path/'nowhere'), '--instance-type', 'ml.g5.xlarge']) == 2
    (run/'metrics.jsonl').write_text('')
    with pytest.raises(InputError, match='train for longer'): cost.calibrate_gpu(run, 'ml.g5.xlarge')

@pytest.mark.parametrize('answer', ({}, {'PriceList': []}, {'PriceList': ['{']}, {'PriceList': ['{"terms": {"OnDemand": {}}}']}))
def test_prices_of_an_api_that_misbehaves(answer):
    class Client:
        def get_products(self, **rest): return answer
    messages = []
    assert cost.prices('eu-central-1', Client(), messages.append)['ml.g5.xlarge'] == 1.408 and 'from the table' in messages[0]

def test_the_real_client(monkeypatch):
    "The question is one that botocore's model of the Pricing API accepts"
    boto3, stub = pytest.importorskip('boto3'), pytest.importorskip('botocore.stub')
    client = boto3.client('pricing', region_name='us-east-1', aws_access_key_id='x', aws_secret_access_key='x')
    term = dict(terms=dict(OnDemand=dict(a=dict(priceDimensions=dict(b=dict(pricePerUnit=dict(USD='1.25')))))))
    with stub.Stubber(client) as answers:
        for _ in cost.INSTANCES: answers.add_response('get_products', dict(PriceList=[json.dumps(term)]))
        messages = []
        assert {*cost.prices('us-east-1', client, messages.append).values()} == {1.25} and messages == ['prices of us-east-1, from the AWS Pricing API']

def test_the_cost_log_over_attempts(tmp_path, monkeypatch):
    "Attempts add up, whatever is lost: the file, a checkpoint's totals, or both"
    monkeypatch.setenv('T2I_PREDICTED_SECONDS', '400')
    cost_log = open_cost_log(tmp_path, 36., 0)
    cost_log.since -= 100
    totals = cost_log.note(640, now=True)
    assert totals['dollars'] >= 1 and cost_summary(tmp_path)['predicted_seconds'] == 400
    monkeypatch.delenv('T2I_PREDICTED_SECONDS')
    second = open_cost_log(tmp_path, 36., 600, totals)
    assert second.attempt['images_lost'] == 40 and second.predicted == 400
    (tmp_path/'cost.json').unlink()
    third = open_cost_log(tmp_path, 36., 600, totals)
    assert third.note(700, now=True)['attempts'] == 2 and cost_summary(tmp_path)['dollars'] >= totals['dollars']
    (tmp_path/'cost.json').write_bytes(b'\0'*50)
    assert open_cost_log(tmp_path, 0., 600).note(700)['attempts'] == 1 and read_cost(tmp_path)['attempts']
