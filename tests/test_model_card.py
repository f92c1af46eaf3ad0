"The model card: what may stand on it, whatever the run lacks, and code that runs."
import contextlib, io, json
from dataclasses import replace
import pytest
import yaml
from t2i_nb.core import InputError, apply_overrides, find_recipe, load_config, save_config
from t2i_nb.evaluation import load_evaluation, save_evaluation
from t2i_nb.model_card import last_name, model_card, save_model_card
from t2i_nb.recipe import RunConfig

def make_run(folder, *overrides, size=8):
    from t2i_nb.objective import Objective
    from t2i_nb.pipeline import save_pipeline
    from t2i_nb.recipe import load_components
    from t2i_nb.unet import build_unet
    small = ['unet.width=16', 'unet.levels=1', 'unet.overrides={}', 'sample.num_inference_steps=2', *overrides]
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), small)
    models = load_components(cfg)
    channels = models.vae.config.latent_channels if models.vae else 3
    save_pipeline(folder/'pipeline', build_unet(cfg.unet, size, channels, models.text_encoder.config.hidden_size), models, Objective(cfg.objective))
    save_config(cfg, folder/'config.yaml')
    return cfg

@pytest.fixture(scope='module')
def run(tmp_path_factory, project):
    "A run with an evaluation, a grid and metrics"
    folder = tmp_path_factory.mktemp('runs')/'flowers'
    cfg = make_run(folder)
    for name, file in {'demo_evaluation.json': 'evaluation.json', 'demo_grid.png': 'grid.png'}.items():
        (folder/file).write_bytes((project/'nbs'/'images'/name).read_bytes())
    (folder/'metrics.jsonl').write_text(''.join(json.dumps(dict(images_seen=n, loss=1/n, seconds=n/80)) + '\n' for n in (400, 8000, 20000)))
    return folder, cfg

def test_sections_and_front_matter(run):
    card = model_card(run[0])
    assert [s.split('\n')[0] for s in card.split('\n## ')[1:]] == ['Use', 'Data', 'Training', 'Cost', 'Scores', 'Limits', 'Not measured', 'License']
    assert yaml.safe_load(card.split('---')[1])['tags'] == ['text-to-image', 'diffusers', 'latent-diffusion', 'flow', 't2i_nb']
    assert '![Samples](grid.png)' in card and 'Nearness to real images' not in card and 'Price: none was recorded' in card
    assert save_model_card(run[0]).read_text(encoding='utf-8') == card == model_card(run[0]) # the same files, the same card

def test_nothing_of_the_machine_stands_on_it(run, tmp_path):
    places = ('/home/ada/photos', r'C:\Users\ada\photos', '~ada/photos', '../ada/photos', 'https://ada:secret@host/x')
    assert not any(word in str([last_name(p) for p in places]) for word in ('ada', '..', 'secret'))
    assert [last_name(p) for p in ('toy_flowers', 'openai/clip-vit-large-patch14')] == ['toy_flowers', 'openai/clip-vit-large-patch14']
    folder, cfg = run
    (tmp_path/'pipeline').symlink_to(folder/'pipeline')
    save_config(replace(cfg, data=replace(cfg.data, source='/home/ada/photos', captions_file='/home/ada/words.csv')), tmp_path/'config.yaml')
    for key in ('images', 'pictures'): # the second is of an older version
        (tmp_path/'data.json').write_text(json.dumps({key: 1234, 'fingerprint': 'c0ffee'}))
        card = model_card(tmp_path)
        assert 'ada' not in card and str(folder) not in card and '1,234 training images' in card and '`c0ffee`' in card

def test_another_evaluation_another_card(run, tmp_path):
    folder, cfg = run
    (tmp_path/'pipeline').symlink_to(folder/'pipeline')
    save_config(cfg, tmp_path/'config.yaml')
    assert 'Not scored yet' in model_card(tmp_path) and '- Whether images show what was asked' in model_card(tmp_path) and '![' not in model_card(tmp_path)
    e = load_evaluation(folder)
    save_evaluation(replace(e, adherence={}, kid={}, copies=e.copies | dict(copies=.25)), tmp_path)
    card = model_card(tmp_path)
    assert '25.0% of its images are nearly copies' in card and '- Nearness to real images' in card
    with pytest.raises(InputError, match='holds no finished model'): model_card(tmp_path/'nowhere')

def test_cost_of_two_attempts(run, tmp_path):
    folder, cfg = run
    (tmp_path/'pipeline').symlink_to(folder/'pipeline')
    save_config(cfg, tmp_path/'config.yaml')
    one = dict(began='', seconds=200., images_from=0, images_to=12_000, images_lost=0, dollars_per_hour=1.6, dollars=.0889)
    both = [one, one | dict(images_from=10_400, images_to=20_000, images_lost=1600)]
    for key in ('attempts', 'lives'): # the second is of an older version
        (tmp_path/'cost.json').write_text(json.dumps({'predicted_seconds': 360, key: both}))
        assert '400 seconds; 360 were predicted; started 2 times, 1,600 images' in model_card(tmp_path) and '$0.18, $8.89' in model_card(tmp_path)

@pytest.mark.parametrize('space', ('latents', 'pixels'))
def test_the_code_on_the_card_draws(run, tmp_path, monkeypatch, space):
    folder = run[0]
    if space == 'pixels': make_run(folder := tmp_path, 'vae.name=', 'data.size=16', size=16)
    code = model_card(folder).split('```python\n')[1].split('```')[0]
    assert ('StableDiffusionPipeline' in code) == (space == 'latents')
    monkeypatch.chdir(folder)
    with contextlib.redirect_stderr(io.StringIO()): exec(code, found := {})
    assert found['image'].size == ((64, 64) if space == 'latents' else (16, 16)) and (folder/'image.png').is_file()

def test_the_first_score_is_of_combinations_never_trained(run):
    e = load_evaluation(run[0])
    row = next(l for l in model_card(run[0]).splitlines() if 'combinations never trained' in l and 'All six' not in l)
    assert f"{e.adherence['held_out']:.3g}" in row and f"{e.adherence['seen']:.3g}" not in row
