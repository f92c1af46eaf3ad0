"The Python API of `t2i_nb.run`: from a recipe to a score, opened again, stopped and gone on with; and a run that an older version left."
import json, os, subprocess, sys
from pathlib import Path
import pytest
from t2i_nb.core import InputError
from t2i_nb.run import Images, Run, bar, export_run, find_pipeline, read_recipe, run_config, sampling_settings

SMALL = ['data.n_images=32', 'unet.width=16', 'unet.overrides={}', 'train.global_batch=8', 'train.micro_batch=8', 'train.n_images=48',
         'train.validation_images=24', 'train.checkpoint_images=24', 'train.log_images=8', 'sample.num_inference_steps=2', 'sample.n_images=4']

@pytest.fixture(scope='module')
def run(tmp_path_factory): return Run('demo', tmp_path_factory.mktemp('api')/'run', SMALL).train()

def test_six_lines(run):
    images = run.sample('a red flower', 'a blue flower', seed=3)
    assert isinstance(images, Images) and len(images) == 2 and images[0].size == (64, 64) and images._repr_png_()[:4] == b'\x89PNG'
    assert images[1].tobytes() == run.sample('a blue flower', seed=4)[0].tobytes() # image i starts from seed + i
    assert images[0].tobytes() != run.sample('a red flower', seed=3, guidance_scale=6.)[0].tobytes()
    score = run.evaluate(n_open=0, n_training=8)
    assert 0 <= score.adherence['held_out'] <= 1 and score.adherence['n'] == 4
    for name in ('config.yaml', 'metrics.jsonl', 'evaluation.json', 'model_card.md', 'pipeline/model_index.json'): assert (run.dir/name).is_file()

def test_evaluate_says_what_it_draws(run):
    said = []
    run.evaluate(said.append, n_images=3, n_open=0, n_training=2)
    assert said == ['drawing and scoring 8 images'] # 3 held-out, 3 seen, 2 for copies
    for wrong, sentence in ((dict(n_images=2), '--n-images is 2; use 3 or more'), (dict(features='clasifier'), "did you mean 'classifier'"),
                            (dict(nearest=True, n_training=0), '--nearest looks among'), (dict(sampler='eular'), "did you mean 'euler'")):
        with pytest.raises(InputError, match=sentence.replace('(', r'\(')): run.evaluate(**wrong)

def test_open_a_run(run):
    again = Run(run.dir)
    assert again.cfg == run.cfg and repr(again) == f"Run('{run.dir.as_posix()}')"
    before = (run.dir/'pipeline/unet/diffusion_pytorch_model.safetensors').read_bytes()
    assert again.train().state.images_seen == 48 and (run.dir/'pipeline/unet/diffusion_pytorch_model.safetensors').read_bytes() == before
    with pytest.raises(InputError, match='holds a run with train.lr'): Run(run.dir, set=['train.lr=0.5']).train()
    with pytest.raises(InputError, match='is not empty'): Run('demo', run.dir, SMALL).train(fresh=True)
    with pytest.raises(InputError, match='there is no recipe'): Run('absent')

def test_a_recipe_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = read_recipe('demo', SMALL)
    assert Run(cfg, 'here').dir == Path('here') and Run('demo', set=SMALL).dir == Path('runs/demo')
    with pytest.raises(InputError, match='name the folder'): Run(cfg)
    with pytest.raises(InputError, match='data.source is empty'): Run('folder')

def test_pipeline_follows_the_files(run):
    first = run.pipeline()
    assert run.pipeline() is first
    file = run.dir/'pipeline/scheduler/scheduler_config.json'
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | dict(flow_shift=1.5)))
    try: assert run.pipeline() is not first
    finally: file.write_text(json.dumps(settings, indent=2))

def test_settings(run, tmp_path):
    assert sampling_settings(run.dir)['num_inference_steps'] == 2 and sampling_settings(tmp_path)['num_inference_steps'] == 16
    assert sampling_settings(run.dir, guidance_scale=1.)['guidance_scale'] == 1.
    with pytest.raises(InputError, match='num-inference-steps is 0'): sampling_settings(run.dir, 0)
    with pytest.raises(InputError, match='there is no run'): run_config(tmp_path)
    with pytest.raises(InputError, match='holds no pipeline'): find_pipeline(tmp_path)
    with pytest.raises(InputError, match='there is no run'): export_run(tmp_path/'absent')

def test_a_bar_is_hidden_in_tests_and_shown_in_notebooks(monkeypatch, capsys):
    monkeypatch.setenv('IN_TEST', '1')
    assert list(bar('x')([1, 2])) == [1, 2] and not capsys.readouterr().err
    monkeypatch.delenv('IN_TEST')
    monkeypatch.setitem(sys.modules, 'ipykernel', sys)
    list(bar('counting')([1, 2]))
    assert 'counting' in capsys.readouterr().err

@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_stopped(tmp_path):
    "Ctrl-C in `Run.train` saves and raises `Stopped`; the same call goes on"
    code = f"""import os, signal, threading
from t2i_nb.run import Run, Stopped
from t2i_nb.checkpoint import read_metrics
run = Run('demo', 'run', {SMALL + ['train.n_images=80000', 'train.checkpoint_images=40000', 'train.validation_images=40000']})
def stop():
    while not read_metrics(run.dir): pass
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop, daemon=True).start()
try: run.train()
except Stopped as e: print(e)"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout.startswith('SIGINT: stopped and saved after'), done.stdout + done.stderr
    seen = int(max(p.name for p in (tmp_path/'run/checkpoints').glob('img-*'))[4:])
    assert 0 < seen < 80000 and not (tmp_path/'run/pipeline').exists()
