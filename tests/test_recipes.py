"Every recipe trains two steps: the published layouts, the same code, shrunk by overrides alone."
import json
import re
import pytest
import yaml
import layouts
from t2i_nb.__main__ import main
from t2i_nb.core import find_recipe, flat, load_config, to_dict
from t2i_nb.checkpoint import read_metrics
from t2i_nb.recipe import RunConfig

SMALL = ['unet.width=16', 'unet.overrides={}', 'unet.attention_size=4', 'unet.layers_per_block=1', 'train.n_images=8', 'train.global_batch=4',
         'train.micro_batch=2', 'train.log_images=4', 'train.validation_images=8', 'train.checkpoint_images=8', 'train.warmup_images=4',
         'sample.num_inference_steps=2', 'sample.prompts=["a flower", "a red flower"]']

def shrunk(name, tmp_path):
    "Overrides that make a recipe small, and data for it in its published layout"
    clip, vae = [f'text.encoder={tmp_path/"clip"}'], [f'vae.name={tmp_path/"vae"}', 'data.size=64']
    if name in ('flowers128', 'pokemon32', 'celeba128'): layouts.clip(tmp_path/'clip')
    if name in ('flowers128', 'celeba128', 'folder'): layouts.vae(tmp_path/'vae')
    root = [f'data.root={tmp_path}']
    if name == 'demo': return ['data.n_images=32']
    if name == 'folder': layouts.hub(tmp_path/'photos'); return [f'data.source={tmp_path/"photos"}', 'text.encoder=tiny', 'text.max_length=0', *vae]
    if name == 'cifar10': layouts.cifar10(tmp_path); return [*root, 'text.encoder=tiny', 'text.max_length=0', 'data.label=label']
    if name == 'flowers128': layouts.flowers102(tmp_path); return [*root, *clip, *vae]
    if name == 'celeba128': layouts.celeba(tmp_path); return [*root, *clip, *vae]
    pytest.importorskip('datasets', reason='hf: sources need the datasets library')
    layouts.hub(tmp_path/'pokemon')
    return [f'data.source=hf:{tmp_path/"pokemon"}', *clip]

NAMES = ('demo', 'folder', 'flowers128', 'cifar10', 'pokemon32', 'celeba128')

@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_holds_what_it_decides(name):
    "Another value than the default, or the default with its reason behind it; config.yaml of a run has the rest"
    text, defaults = find_recipe(name).read_text(encoding='utf-8'), flat(to_dict(RunConfig()))
    for key, value in flat(yaml.safe_load(text)).items():
        line = next(l for l in text.splitlines() if re.match(rf' *{key.split(".")[-1]}:', l))
        assert '#' in line or value != defaults.get(key) or key in ('data.source', 'vae.name', 'unet.width'), f'{key} decides nothing'
    assert len(text.splitlines()) <= 65

@pytest.mark.parametrize('name', NAMES)
def test_two_steps(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'datasets'))
    overrides, run = [*SMALL, *shrunk(name, tmp_path)], tmp_path/'run'
    code = main(['train', name, '--run-dir', str(run), '--set', *overrides])
    assert code == 0, capsys.readouterr().err
    rows = [r for r in read_metrics(run) if 'loss' in r]
    assert [r['images_seen'] for r in rows] == [4, 8] and all(r['lr'] > 0 and r['loss'] > 0 for r in rows)
    cfg = load_config(run/'config.yaml', RunConfig)
    index = json.loads((run/'pipeline'/'model_index.json').read_text())
    stock = bool(cfg.vae.name) and not cfg.data.label # what plain diffusers can draw
    assert index['_class_name'] == ('StableDiffusionPipeline' if stock else 'TextToImagePipeline')
    assert main(['sample', str(run), 'a red flower', '--out', str(tmp_path/'a.png'), '--num-inference-steps', '2']) == 0
    if name == 'demo': # the prior: refused where there is none, then trained and drawn from
        late = ['sample', str(run), 'a red flower', '--out', str(tmp_path/'a.png'), '--start-level', '0.7', '--num-inference-steps', '4']
        capsys.readouterr()
        assert main(late) == 2 and 'prior' in capsys.readouterr().err
        assert main(['vae', 'prior', str(run), '--n-images', '256']) == 0 and main(late) == 0
        capsys.readouterr()
        assert main([*late[:-4], '--start-level', '1.5']) == 2 and '--start-level is 1.5' in capsys.readouterr().err
    from PIL import Image # b: drawn at the size it was trained at
    with Image.open(tmp_path/'a.png') as image: assert image.size == (cfg.data.size, cfg.data.size)

@pytest.mark.slow
def test_two_caches_at_once(tmp_path):
    "Two processes of `t2i cache` on one run share the work: what they leave is what one leaves"
    import subprocess, sys
    words = ['cache', 'demo', '--set', 'data.n_images=1100']
    code = 'import sys; from t2i_nb.__main__ import main; sys.exit(main(sys.argv[1:]))'
    def start(run): return subprocess.Popen([sys.executable, '-c', code, *words, '--run-dir', str(tmp_path/run)], stdout=subprocess.DEVNULL)
    pair = [start('two'), start('two')]
    assert [p.wait() for p in pair] == [0, 0] and start('one').wait() == 0
    files = lambda run: {p.relative_to(tmp_path/run): p.read_bytes() for p in (tmp_path/run/'cache').rglob('*') if p.is_file()}
    assert files('two') == files('one') and len(files('one')) >= 4

@pytest.mark.slow
def test_a_prompt_tells_its_class(tmp_path):
    layouts.cifar10(tmp_path)
    overrides = [*SMALL, f'data.root={tmp_path}', 'text.encoder=tiny', 'text.max_length=0', 'data.label=label', 'train.n_images=64',
                 'train.lr=0.01', 'sample.prompts=["a"]', 'data.flip=false']
    assert main(['train', 'cifar10', '--run-dir', str(tmp_path/'run'), '--set', *overrides]) == 0
    from t2i_nb.sampling import class_labels, draw, make_generators
    from t2i_nb.pipeline import load_pipeline
    pipeline = load_pipeline(tmp_path/'run')
    assert pipeline.unet.config.class_names == layouts.CLASSES
    assert class_labels(pipeline.unet, ['a photo of a ship', 'a boat']).tolist() == [8, 10]
    ship, boat = draw(pipeline, ['ship', 'boat'], make_generators([0, 0]), 4, 1.)
    assert (ship - boat).abs().max() > 1e-4
