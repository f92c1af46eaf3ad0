"Folders whole or not at all, and a cost log that survives its file"
import json, subprocess, sys, time
import pytest, torch
from t2i_nb.core import InputError
from t2i_nb.checkpoint import (checkpoint_folders, cost_summary, drop_old_checkpoints, find_weights, is_valid, load_checkpoint, newest_checkpoint, open_cost_log,
                               read_cost, read_metrics, rewind_metrics, save_checkpoint, warm_start, write_folder)
from t2i_nb.engine import EngineConfig, TorchEngine

@pytest.fixture
def saved(tmp_path):
    layer = torch.nn.Linear(4, 4)
    engine = TorchEngine(EngineConfig(), layer)
    engine.step(lambda k: layer(torch.ones(4)).sum(), range(1))
    ema = {k: p.detach().clone()*2 for k, p in layer.named_parameters()}
    for n in (16, 32): save_checkpoint(tmp_path, engine, ema, dict(images_seen=n, step=n//16, seconds=0.))
    return tmp_path, engine, ema

def test_damage_is_seen(saved):
    run, engine, ema = saved
    newest = run/'checkpoints'/'img-00000032'
    for name in ('unet', 'ema', 'optimizer'):
        path = newest/f'{name}.safetensors'
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert not is_valid(newest) and newest_checkpoint(run).name == 'img-00000016'
        path.write_bytes(good)
    assert newest_checkpoint(run) == newest
    (newest/'state.json').unlink()
    assert newest_checkpoint(run).name == 'img-00000016'

def test_a_failed_write_leaves_the_old_folder(saved, tmp_path):
    run, *_ = saved
    def write(tmp): (tmp/'half').write_text('x'); raise OSError(28, 'No space left on device')
    with pytest.raises(InputError, match='make room'): write_folder(run/'checkpoints'/'img-00000032', write)
    assert is_valid(run/'checkpoints'/'img-00000032') and not any((run/'checkpoints').glob('.img-*'))

def test_the_best_stays(saved):
    run, engine, ema = saved
    for n in (48, 64): save_checkpoint(run, engine, ema, dict(images_seen=n))
    drop_old_checkpoints(run, 1, 32)
    assert [p.name for p in checkpoint_folders(run)] == ['img-00000032', 'img-00000064']

def test_weights_to_begin_with(saved, tmp_path):
    run, engine, ema = saved
    said, start = [], torch.nn.Linear(4, 4)
    warm_start(start, run, said.append)
    assert torch.equal(start.bias, ema['bias']) and said == [f'begins with 2 of 2 tensors of {run}']
    wider = torch.nn.Linear(5, 4)
    warm_start(wider, run, said.append)
    assert torch.equal(wider.bias, ema['bias']) and said[-1].endswith('; not weight')
    with pytest.raises(InputError, match='no tensor of'): warm_start(torch.nn.Linear(3, 3), run)
    with pytest.raises(InputError, match='holds no UNet'): find_weights('nowhere')
    (tmp_path/'text').write_text('no tensors')
    with pytest.raises(InputError, match='no safetensors file'): warm_start(start, tmp_path/'text')

def test_old_counters(saved):
    "A checkpoint of an earlier version: BLAKE2b in its manifest, other names in its counters"
    import hashlib
    run, engine, ema = saved
    folder = run/'checkpoints'/'img-00000032'
    (folder/'state.json').write_text(json.dumps(dict(images_seen=32, usual_loss=1.5, worse=2, cost=dict(seconds=3., lives=2))))
    digests = {p.name: hashlib.blake2b(p.read_bytes()).hexdigest()[:32] for p in folder.iterdir() if p.name != 'manifest.json'}
    (folder/'manifest.json').write_text(json.dumps(digests))
    assert is_valid(folder)
    assert load_checkpoint(folder, engine, ema) == dict(images_seen=32, loss_ema=1.5, bad_validations=2, cost=dict(seconds=3., attempts=2))

def test_metrics_are_rewound(tmp_path):
    (tmp_path/'metrics.jsonl').write_text(''.join(f'{{"images_seen": {n}}}\n' for n in (8, 16, 24)) + '{"images')
    rewind_metrics(tmp_path, 16)
    assert read_metrics(tmp_path) == [dict(images_seen=8), dict(images_seen=16)] and read_metrics(tmp_path/'nowhere') == []

def test_a_lost_cost_log(tmp_path):
    "What the checkpoint remembers takes the place of the file"
    first = open_cost_log(tmp_path, 3.6, 0)
    first.since -= 100
    totals = first.note(96, now=True)
    assert totals['attempts'] == 1 and abs(totals['dollars'] - .1) < .01
    (tmp_path/'cost.json').write_text('{"attempts": [')
    again = open_cost_log(tmp_path, 0, 96, totals).note(96)
    assert (again['dollars'], again['attempts'], cost_summary(tmp_path)['images_lost']) == (totals['dollars'], 2, 0)
    assert cost_summary(tmp_path/'nowhere')['dollars'] is None and read_cost(tmp_path/'nowhere') == {}

def test_a_process_costs_from_its_start():
    code = 'import time, t2i_nb.checkpoint as c\ntime.sleep(.3); print(c._seconds_before() >= .3, c._seconds_before())'
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.split()
    assert said == ['True' if sys.platform == 'linux' else 'False', '0.0']

def test_a_launcher_knows_the_start(monkeypatch):
    monkeypatch.setattr('t2i_nb.checkpoint._COUNTED', set())
    monkeypatch.setenv('T2I_STARTED', str(time.time() - 50))
    from t2i_nb.checkpoint import _seconds_before
    assert 50 <= _seconds_before() < 60 and _seconds_before() == 0
