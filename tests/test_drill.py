"The container's script under torchrun, interrupted as a container is: every kind and moment with ZeRO-2, another number of machines, and no secret in what is left"
import json, os, secrets, subprocess, sys
from importlib.util import find_spec
import pytest
from t2i_nb.core import apply_overrides, find_recipe, load_config, save_config
from t2i_nb.recipe import RunConfig

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='sends SIGSTOP and SIGKILL')
SMALL = ['data.n_images=64', 'unet.width=16', 'unet.attention_size=8', 'unet.overrides={"block_out_channels": [8, 16]}', 'train.global_batch=8',
         'train.micro_batch=0', 'train.warmup_images=80', 'sample.num_inference_steps=2', f"train.zero_stage={2*bool(find_spec('deepspeed'))}"]
NAMES = ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN', 'HF_TOKEN', 'MLFLOW_TRACKING_PASSWORD', 'WANDB_API_KEY')

def small(*overrides): return apply_overrides(load_config(find_recipe('demo'), RunConfig), [*SMALL, *overrides])

def files(folder): return [p for p in folder.rglob('*') if p.is_file()]

@pytest.mark.slow
def test_every_interruption(tmp_path, monkeypatch):
    "Five interruptions of both kinds: the same bits, at most an interval lost, and six keys of the environment in no file"
    from t2i_nb.drill import run_drill, timeline
    keys = {name: f'{name[:4]}{secrets.token_hex(16)}' for name in NAMES}
    for name, value in keys.items(): monkeypatch.setenv(name, value)
    r = run_drill(small(), tmp_path/'drill', interruptions=5, deadline=600)
    text = '\n'.join(timeline(r))
    assert [i['kind'] for i in r['interruptions']] == ['machine', 'worker', 'machine', 'worker', 'machine'], text
    assert r['attempts'][-1]['ended'] == 'done' and set(r['equal']) == {'unet', 'ema', 'optimizer', 'pipeline'}, text
    assert all(r['equal'].values()) and r['same_draws'] and r['loss_difference'] == 0, text
    assert r['most_lost'] <= r['interval'] and all(i['lost'] == 0 for i in r['interruptions'] if i['kind'] == 'worker'), text
    assert r['gone_seconds'] < 120 and r['staged'] and r['overhead'] > 0, text # seconds are those of this machine: bench/drill.py states them
    left = files(tmp_path)
    assert len(left) > 100 and r['secrets'] == []
    assert not [(k, p) for p in left for content in [p.read_bytes()] for k, v in keys.items() if v.encode() in content]
    last = tmp_path/'drill'/'run'/f"attempt-{len(r['attempts'])}"/'algo-1'/'ml'
    assert {p.name for p in (last/'model').iterdir()} >= {'pipeline', 'config.yaml', 'metrics.jsonl', 'cost.json'}
    cost = json.loads((last/'model'/'cost.json').read_text())
    assert [o['images_from'] for o in cost['attempts']][-1] == r['attempts'][-1]['begins']

@pytest.mark.slow
def test_another_number_of_machines(tmp_path):
    "Two machines, then one: the same draws in the same order, and losses that differ by the order of summation"
    from t2i_nb.drill import run_drill, timeline
    r = run_drill(small('train.zero_stage=0'), tmp_path/'drill', interruptions=1, nodes=[2, 1], deadline=600)
    text = '\n'.join(timeline(r))
    assert [o['nodes'] for o in r['attempts']] == [2, 1] and r['same_draws'] and r['loss_difference'] < 1e-5, text

def test_a_lost_machine(tmp_path):
    "One machine that is lost once, and its restart: nothing but the bucket is left to it, and the run ends"
    from t2i_nb.drill import DrillRun, draws, drill_recipe, schedule
    from t2i_nb.staging import stage_source
    cfg = drill_recipe(small('train.zero_stage=0'), 1, 1, steps=4)
    run = DrillRun(stage_source(cfg, tmp_path/'source'), tmp_path/'run', cfg.train.checkpoint_images)
    [loss] = schedule(1, run.interval)
    first, second = run.attempt(1, loss), run.attempt(1)
    assert (first.ended, second.ended, second.begins) == ('machine', 'done', loss.kept) and 0 < loss.lost <= run.interval
    assert sorted(draws(run.folder)[0]) == [*range(cfg.train.n_images)] and {*run.outcome()['parts']} == {'unet', 'ema', 'optimizer', 'pipeline'}

LONE = '''
import os, sys, time
from pathlib import Path
from t2i_nb.checkpoint import checkpoint_folders, write_folder
from t2i_nb.engine import join_ranks
from t2i_nb.entry import same_checkpoint
ranks, here = join_ranks(), Path(sys.argv[1])/os.environ['RANK']
os.environ['LOCAL_RANK'] = '0' # a machine for each
def make(n): write_folder(here/'checkpoints'/f'img-{n:08d}', lambda tmp: (tmp/'state.json').write_text(f'{n} of rank 0'))
for n in ((8, 16), (8, 24, 32))[ranks.rank]: make(n)
if ranks.is_main: make(24)
else: (here/'checkpoints'/'img-00000024'/'state.json').write_text('cut short')
lines = same_checkpoint(here, ranks), checkpoint_folders(here)[-1].name, (here/'checkpoints'/'img-00000024'/'state.json').read_text()
(here/'found').write_text(' '.join(lines))
while not all((here.parent/rank/'found').is_file() for rank in '01'): time.sleep(.05) # who leaves first would cut the other off
'''

def test_machines_that_disagree(tmp_path):
    "Without a common disk, rank 0's newest checkpoint counts: others get it, and lose what is newer"
    (tmp_path/'lone.py').write_text(LONE)
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path/'lone.py'), str(tmp_path)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=600, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path/rank/'found').read_text() for rank in '01'] == ['img-00000024 img-00000024 24 of rank 0']*2

def test_wrong_input_is_the_failure_reason(tmp_path, project):
    "One sentence, exit code 2, and the same sentence where SageMaker looks for the reason of a failure"
    save_config(small('train.global_batch=16', 'train.n_images=16'), tmp_path/'config.yaml')
    env = {**os.environ, 'T2I_ML_ROOT': str(tmp_path/'ml'), 'SM_HOSTS': '["algo-1", "algo-2"]', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, str(project/'sagemaker_src'/'train.py'), '--config', str(tmp_path/'config.yaml')], capture_output=True, text=True,
                          timeout=600, env={**env, 'PYTHONPATH': str(project)})
    sentence = '2 hosts with 0 GPUs are 2 processes, and this run has 1; start it with torchrun'
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == f't2i: {sentence}', done.stderr
    assert (tmp_path/'ml'/'output'/'failure').read_text() == sentence
