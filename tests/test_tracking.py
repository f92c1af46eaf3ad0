"Trackers that are killed, never come back or are told everything twice, in processes of their own"
import json, os, shutil, socket, subprocess, sys, time
import pytest
import yaml
from PIL import Image
from servers import MlflowServer
from t2i_nb.core import InputError
from t2i_nb.checkpoint import read_metrics
from t2i_nb.tracking import check_trackers, follow, read_notes, send_run

mlflow = pytest.importorskip('mlflow')

@pytest.fixture(autouse=True)
def patient(monkeypatch):
    "A busy machine answers late"
    monkeypatch.setattr('t2i_nb.tracking.LAST_SECONDS', 30.)
    monkeypatch.setattr('t2i_nb.tracking.LONGEST_PAUSE', 1.)

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    made = MlflowServer(tmp_path_factory.mktemp('mlflow')/'server')
    made.start()
    yield made
    made.kill()

posix = pytest.mark.skipif(os.name == 'nt', reason='sends SIGKILL')

def begin(run):
    "The files with which a run starts; more settings than MLflow takes at once"
    (run/'samples').mkdir(parents=True)
    (run/'config.yaml').write_text(yaml.safe_dump(dict(train=dict(lr=1e-3), many={f'n{i}': i for i in range(120)}, long='x'*7000,
                                                     odd={'a (b)': '', 'none': None, 'list': [1, 2]})))
    return run

def stand_in(run, start=0, end=3200, pause=0., speed=80.):
    "What a training appends, and the longest time that one of its steps took"
    longest, mark = 0., time.perf_counter()
    with open(run/'metrics.jsonl', 'a') as f:
        for n in range(start + 8, end + 1, 8):
            rows = [dict(images_seen=n, loss=1/n, lr=1e-3, grad_norm=2/n, images_per_second=speed, seconds=n/speed)]
            if n % 800 == 0:
                rows.append(dict(images_seen=n, validation_loss=.5/n, validation_bins=[k/n for k in range(8)]))
                Image.new('RGB', (8, 8), (n % 256, 0, 0)).save(run/'samples'/f'img-{n:08d}.png')
            for row in rows: f.write(json.dumps(row) + '\n')
            f.flush()
            time.sleep(pause)
            now = time.perf_counter()
            longest, mark = max(longest, now - mark), now
            yield n, longest

def everything(run, address):
    "The server has what the run's files have, each number once"
    client, run_id = mlflow.MlflowClient(address), read_notes(run)['mlflow']['run_id']
    there, expected = client.get_run(run_id), {}
    for row in read_metrics(run):
        bins = {f'validation_bin_{i}': v for i, v in enumerate(row.pop('validation_bins', ()))}
        for k, v in (row | bins).items():
            if k != 'images_seen': expected.setdefault(k, []).append((row['images_seen'], v))
    val = {k: sorted((m.step, m.value) for m in client.get_metric_history(run_id, k)) for k in there.data.metrics}
    system = {k: val.pop(k) for k in list(val) if k.startswith('system/')}
    assert val == expected
    assert all(len({step for step, _ in values}) == len(values) for values in system.values())
    assert (len(there.data.params), there.data.params['train.lr'], len(there.data.params['long'])) == (125, '0.001', 6000)
    images = sorted(p.name for p in (run/'samples').iterdir())
    assert [f.path for f in client.list_artifacts(run_id, 'samples')] == [f'samples/{name}' for name in images]
    return there, system

@pytest.mark.slow
@posix
def test_server_killed_while_training(server, tmp_path, monkeypatch):
    "Killed in the middle and started again: nothing is lost, nothing is there twice, no step waited"
    monkeypatch.setenv('MLFLOW_TRACKING_URI', server.address)
    run, said, down = tmp_path/'run', [], 0
    with follow(run, ['mlflow'], said.append, every=.2): # the run does not exist yet
        begin(run)
        for n, longest in stand_in(run, end=30_000, pause=.04):
            if n >= 160 and not down and read_notes(run).get('mlflow', {}).get('sent', {}).get('loss', 0) > 0:
                server.kill()
                down = n
            if down and n == down + 160: server.start(wait=False)
            if len(said) == 2 and n > 1600: break
    assert len(said) == 2 and 'cannot be reached' in said[0] and said[1] == 'mlflow is back', said
    assert longest < 1, longest
    there, system = everything(run, server.address)
    assert there.info.status == 'FINISHED' and system

@posix
@pytest.mark.parametrize('mute', (False, True))
def test_server_never_comes_back(tmp_path, monkeypatch, mute):
    "Refused or never answered: one sentence while training, one at the end"
    run, said = begin(tmp_path/'run'), []
    monkeypatch.setattr('t2i_nb.tracking.LAST_SECONDS', 1.)
    monkeypatch.setattr('t2i_nb.tracking.TIMEOUT', 1)
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))
        if mute: deaf.listen()
        monkeypatch.setenv('MLFLOW_TRACKING_URI', f'http://me:pass-8d1f@127.0.0.1:{deaf.getsockname()[1]}')
        with follow(run, ['mlflow'], said.append, every=.05):
            for n, longest in stand_in(run, pause=.005): pass
        assert len(said) == 2 and 'training goes on' in said[0] and f'`t2i track {run}` sends the rest' in said[1], said
        assert longest < 1 and 'pass-8d1f' not in str(said)
        if mute: return # `send_run` would wait a minute
        with pytest.raises(InputError, match='mlflow cannot be reached') as e: send_run(run, ['mlflow'])
        assert '\n' not in str(e.value) and 'pass-8d1f' not in str(e.value)

@pytest.mark.slow
@posix
def test_all_is_sent_later(server, tmp_path, monkeypatch):
    "What a server that was away did not get, `send_run` brings, and no password stands in any file"
    run = begin(tmp_path/'run')
    monkeypatch.setattr('t2i_nb.tracking.LAST_SECONDS', 1.)
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))
        monkeypatch.setenv('MLFLOW_TRACKING_URI', f'http://me:pass-8d1f@127.0.0.1:{deaf.getsockname()[1]}')
        with follow(run, ['mlflow'], every=.05):
            for _ in stand_in(run): pass
    (run/'pipeline').mkdir()
    (run/'pipeline'/'model_index.json').write_text('{}')
    monkeypatch.setenv('MLFLOW_TRACKING_URI', server.address)
    assert send_run(run, ['mlflow'])['mlflow'] == dict(rows=404, images=4, pipelines=1)
    there, _ = everything(run, server.address)
    assert [f.path for f in mlflow.MlflowClient(server.address).list_artifacts(there.info.run_id, 'pipeline')] == ['pipeline/model_index.json']
    assert not any(b'pass-8d1f' in p.read_bytes() for p in run.rglob('*') if p.is_file())

@pytest.mark.slow
@posix
def test_resumed_run_leaves_no_duplicate(server, tmp_path, monkeypatch):
    "Lines are written twice, the second time at another speed; even a note that was lost changes nothing"
    monkeypatch.setenv('MLFLOW_TRACKING_URI', server.address)
    run, said, ids = begin(tmp_path/'run'), [], set()
    for forget in (False, True):
        with follow(run, ['mlflow', 'tensorboard'], said.append, every=.1):
            for _ in stand_in(run, start=1600*(len(ids) > 0), end=2400 + 800*forget): pass
        notes = read_notes(run)
        ids.add(notes['mlflow']['run_id'])
        kept = [r for r in read_metrics(run) if r['images_seen'] <= 1600]
        if not forget: (run/'rewound').write_text(''.join(json.dumps(r) + '\n' for r in kept)); os.replace(run/'rewound', run/'metrics.jsonl')
    everything(run, server.address)
    first = read_metrics(run)
    (run/'tracking.json').write_text(json.dumps(notes | dict(mlflow={}, tensorboard={}))) # killed between sending and noting
    (run/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in kept))
    for _ in stand_in(run, start=1600, speed=70.): pass
    assert [n['rows'] for n in send_run(run, ['mlflow', 'tensorboard']).values()] == [0, 0]
    (run/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in first))
    everything(run, server.address)
    assert said == [] and len(ids) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    steps = [e.step for e in EventAccumulator(str(run/'tensorboard')).Reload().Scalars('loss')]
    assert steps == [r['images_seen'] for r in first if 'loss' in r]

@pytest.mark.slow
def test_no_secret_in_any_file(server, tmp_path):
    "What the environment holds is in no file of the run, and nothing is printed"
    run, secrets = begin(tmp_path/'run'), dict(MLFLOW_TRACKING_PASSWORD='pw-3f9a2c', MLFLOW_TRACKING_TOKEN='tk-77e0b1', WANDB_API_KEY='5c'*20)
    code = f'''
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
import t2i_nb.tracking
from test_tracking import follow, send_run, stand_in
t2i_nb.tracking.LAST_SECONDS = 300. # a busy machine answers late
run = Path(sys.argv[1])
with follow(run, ['mlflow', 'tensorboard'], every=.1):
    for _ in stand_in(run): pass
send_run(run, ['mlflow', 'tensorboard'])
'''
    env = os.environ | secrets | dict(MLFLOW_TRACKING_URI=f'sqlite:///{run}/mlflow.db', MLFLOW_EXPERIMENT_NAME='secrets',
                                      MLFLOW_TRACKING_USERNAME='me', PYTHONWARNINGS='ignore')
    shutil.copy(server.folder/'mlflow.db', run/'mlflow.db') # to make one takes seconds
    done = subprocess.run([sys.executable, '-c', code, str(run)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    files = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert {'mlflow.db', 'tracking.json', 'config.yaml'} <= {p.name for p in files} and any('tfevents' in p.name for p in files)
    assert not [p for p in files if any(s.encode() in p.read_bytes() for s in secrets.values())]

def test_unknown_tracker(tmp_path):
    "Refused before anything starts; importing the module loads no tracker"
    for refuse in (lambda: check_trackers(['mlfow']), lambda: send_run(tmp_path, ['mlfow']), lambda: follow(tmp_path, ['mlfow']).__enter__()):
        with pytest.raises(InputError, match="there is no tracker 'mlfow' \\(did you mean 'mlflow'\\?\\)"): refuse()
    with pytest.raises(InputError, match='holds no run'): send_run(tmp_path, ['mlflow'])
    heavy = "{'torch', 'mlflow', 'tensorboard', 'wandb', 'psutil', 'matplotlib', 'PIL', 'numpy'}"
    code = f'import sys, t2i_nb.tracking; print(sorted({heavy} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
