"Steps and ends of a training in this process, and runs that are killed, stopped, starved of disk or damaged, in processes of their own"
import json, os, random, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
import pytest, torch
from t2i_nb.core import InputError, apply_overrides, keyed_seed
from t2i_nb.unet import build_unet
from t2i_nb.objective import Objective
from t2i_nb.engine import make_engine
from t2i_nb.checkpoint import checkpoint_folders, cost_summary, newest_checkpoint, read_cost, read_metrics
from t2i_nb.recipe import Components, RunConfig, TrainConfig, TrainingData
from t2i_nb.train import (TrainState, averaged, best_average, check_share, guarded_step, image_order, learning_rate, make_batch, train_steps, update_ema,
                          validation_loss)

def noise_data(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 4, 8, 8, generator=draw).half()
    return TrainingData(images, images.abs()/4, torch.arange(1, n + 1)[:, None], torch.randn(n + 1, 4, 16, generator=draw).half())

def recipe(*overrides):
    return apply_overrides(RunConfig(), ['unet.width=8', 'unet.levels=2', 'unet.head_dim=8', 'unet.attention_size=8', 'train.n_images=64', 'train.global_batch=8',
                                         'train.checkpoint_images=32', 'train.validation_images=32', 'train.log_images=8', 'train.warmup_images=16',
                                         'train.device=cpu', 'train.precision=float32', 'vae.name=', 'data.size=8', *overrides])

def small_unet(seed=0): return build_unet(recipe().unet, 8, 4, 16, seed)

def trained(run, *overrides, images=None, until=None, **how):
    "The last state of a run on noise, left alone or abandoned at `until` images"
    data = noise_data(16) if images is None else images
    for state in train_steps(recipe(*overrides), run, Components(None, None, None), data, noise_data(8, 1), **how):
        if state.images_seen == until: break
    return state

def trace(run): return [(r['images_seen'], r['loss']) for r in read_metrics(run) if 'loss' in r]

def test_captions_flips_and_classes():
    "Each visit of an image draws one of its captions and of its two sides; dropout takes text and class together"
    data, cfg = noise_data(4), recipe().train
    pair = TrainingData(data.mean, data.std, torch.tensor([[1, 2], [3, -1], [4, 5], [6, 7]]), noise_data(7).states, '', (data.mean.flip(-1), data.std),
                        torch.arange(4), tuple('abcd'))
    seen = {(what, i): set() for what in ('caption', 'flip') for i in range(4)}
    for j in range(64):
        one, i = make_batch(pair, cfg, j, 1), image_order(4, 0, j)
        text = next(r for r in range(8) if torch.equal(one['encoder_hidden_states'][0], pair.states[r].float()))
        assert one['class_labels'].item() == (i if text else 4)
        if text: seen['caption', i].add(text)
        seen['flip', i].add(torch.equal(one['x0'][0], pair.mean[i].float()))
    assert [seen['caption', i] for i in range(4)] == [{1, 2}, {3}, {4, 5}, {6, 7}] and all(seen['flip', i] == {True, False} for i in range(4))
    assert torch.equal(make_batch(pair, cfg, 0, 4)['eps'], make_batch(replace(pair, flips=()), cfg, 0, 4)['eps']) # the other draws stay as they are

def test_epochs_and_dropout():
    assert all(sorted(image_order(16, 0, 16*epoch + k) for k in range(16)) == list(range(16)) for epoch in range(3))
    data, cfg = noise_data(512), recipe('train.caption_dropout=0.1').train
    dropped = sum(torch.equal(s, data.states[0].float()) for s in make_batch(data, cfg, 0, 512)['encoder_hidden_states'])
    assert 20 < dropped < 90

def test_learning_rates():
    "Warm-up and cosine at their ends; onecycle is torch's to 4e-6 of the peak, where torch's bends into a floor"
    plain = TrainConfig()
    assert learning_rate(plain, 0) == pytest.approx(1e-3*16/1600) and learning_rate(plain, 48_000) < 1e-9
    assert learning_rate(replace(plain, lr_schedule='constant'), 40_000) == plain.lr
    one, sgd = TrainConfig(lr_schedule='onecycle', n_images=1600), torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    theirs = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=one.lr, total_steps=101, pct_start=31/101) # torch is at the top one step early
    for step in range(100):
        assert learning_rate(one, 16*step) == pytest.approx(theirs.get_last_lr()[0], abs=5e-6*one.lr)
        sgd.step(); theirs.step()

def test_moving_average():
    counter, ema = torch.nn.Linear(1, 1, bias=False), {'weight': torch.zeros(1, 1)}
    counter.weight.data.fill_(1.)
    for step in range(1, 4): update_ema(ema, counter, .9999, step)
    left = 1.
    for step in range(1, 4): left *= min(.9999, (1 + step)/(10 + step))
    assert ema['weight'].item() == pytest.approx(1 - left, abs=1e-6)
    assert torch.equal(averaged(counter, ema).weight, ema['weight'])

def test_validation_loss():
    "The same at each visit, another for another seed; per image it has the same mean, whatever the images beside it"
    unet, data, objective = small_unet(), noise_data(70), Objective(recipe().objective)
    bins, each = validation_loss(unet, objective, data), validation_loss(unet, objective, data, per_image=True)
    assert bins == validation_loss(unet, objective, data) != validation_loss(unet, objective, data, seed=1)
    assert (len(bins), len(each)) == (8, 64) and sum(bins)/8 == pytest.approx(sum(each)/64, rel=1e-5)
    assert validation_loss(unet, objective, data, n_images=70, per_image=True)[:64] == pytest.approx(each, rel=1e-5)
    classes = replace(data, labels=torch.arange(70) % 2, class_names=('a', 'b'))
    aware = build_unet(recipe().unet, 8, 4, 16, 0, classes.class_names)
    assert validation_loss(aware, objective, classes, n_images=4) != validation_loss(aware, objective, replace(classes, labels=1 - classes.labels), n_images=4)

def fresh(**numbers):
    unet = small_unet()
    state = TrainState(unet=unet, ema={k: p.detach().clone() for k, p in unet.named_parameters()}, **numbers)
    def attempt(data): guarded_step(make_engine(recipe().train, unet), Objective(recipe().objective), data, recipe().train, state)
    return state, attempt, lambda: all(torch.equal(p, q) for p, q in zip(unet.parameters(), small_unet().parameters()))

def test_steps_that_would_do_damage():
    good = noise_data(16)
    bad, far = replace(good, mean=good.mean*float('nan')), replace(good, mean=good.mean*30)
    state, attempt, same = fresh()
    for _ in range(9): attempt(bad)
    assert (state.skipped, state.step) == (9, 0) and same()
    with pytest.raises(InputError, match='10 steps in a row were not taken, up to image 0'): attempt(bad)
    state, attempt, same = fresh() # what is usual is not known yet
    attempt(far)
    assert (state.skipped, same()) == (0, False)
    state, attempt, same = fresh(step=100, loss_ema=2.)
    attempt(far)
    assert (state.skipped, same()) == (1, True)
    attempt(good)
    assert (state.skipped, state.skipped_in_a_row, same()) == (1, 0, False)

def test_smaller_micro_batches():
    from t2i_nb.train import _smaller_micro
    cfg = recipe().train
    assert _smaller_micro(cfg, cfg, 1).micro_batch == 4
    with pytest.raises(InputError, match='use train.micro_batch=2'): _smaller_micro(cfg, cfg, 2)
    with pytest.raises(InputError, match='use train.micro_batch=4'): _smaller_micro(replace(cfg, micro_batch=8), replace(cfg, micro_batch=8), 1)
    with pytest.raises(InputError, match='use a smaller unet.width'): _smaller_micro(replace(cfg, micro_batch=1), cfg, 1)
    with pytest.raises(InputError, match='cannot be shared by 3 processes'): check_share(cfg, 3)

def test_memory_runs_out_once(tmp_path, monkeypatch):
    "The step is repeated in halves, and is the same step"
    import t2i_nb.train as train
    calls, guarded = [], train.guarded_step
    def short(engine, objective, data, cfg, state):
        calls.append(cfg.micro_batch)
        if len(calls) == 2: raise torch.OutOfMemoryError('no room')
        return guarded(engine, objective, data, cfg, state)
    trained(tmp_path/'enough')
    monkeypatch.setattr(train, 'guarded_step', short)
    messages = []
    trained(tmp_path/'little', log=messages.append)
    assert calls[:4] == [0, 0, 4, 4] and 'memory ran out: goes on in micro-batches of 4' in messages
    assert max(abs(a - b) for (_, a), (_, b) in zip(trace(tmp_path/'enough'), trace(tmp_path/'little'))) < 1e-5

def test_ends():
    from t2i_nb.train import _end_of
    cases = {('', 0, 16, 0., 0): '', ('', 90, 16, 0., 1): 'minutes', ('', 0, 16, .5, 1): 'dollars', ('', 0, 16, .4, 2): 'patience', ('', 90, 48_000, .5, 2): 'images'}
    for (_, seconds, n, dollars, bad), why in cases.items():
        assert _end_of(TrainConfig(max_minutes=1, max_dollars=.5, patience=2), TrainState(images_seen=n, seconds=seconds, dollars=dollars, bad_validations=bad)) == why

def test_signals():
    "The first is noted; a second one within a second is its echo, a later one ends at once"
    code = ('import signal, sys, time, t2i_nb.train as t\nwith t.stop_signals() as should_stop: signal.raise_signal(signal.SIGTERM); '
            'signal.raise_signal(signal.SIGTERM); sys.stdout.write(should_stop()); time.sleep(1.1); signal.raise_signal(signal.SIGINT)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr.split()[-1]) == ('SIGTERM', 'KeyboardInterrupt')

def test_abandoned_and_called_again(tmp_path):
    "Weights, EMA and losses are those of the run that was left alone, and so after a death before the first checkpoint"
    whole = trained(tmp_path/'whole')
    for name, until in (('killed', 40), ('early', 16)):
        trained(tmp_path/name, until=until)
        messages = []
        again = trained(tmp_path/name, log=messages.append)
        assert f"goes on at {32 if until > 32 else 0} images" in messages[-1]
        assert all(torch.equal(p, q) for p, q in zip(whole.unet.parameters(), again.unet.parameters())) and all(torch.equal(whole.ema[k], again.ema[k]) for k in again.ema)
        assert trace(tmp_path/name) == trace(tmp_path/'whole')

def test_first_step_and_micro_batches(tmp_path):
    "The first step reaches the whole network; micro-batches change the order of summation alone; a prediction changes nothing"
    first = trained(tmp_path/'one', until=8)
    begun = small_unet(keyed_seed(0, 'weights'))
    moved = [(p - q).abs().max().item() > 0 for p, q in zip(first.unet.parameters(), begun.parameters())]
    assert sum(moved) > .95*len(moved)
    for name, more, how in (('whole', (), {}), ('split', ('train.micro_batch=2',), {}), ('predicted', (), dict(predict=True))): trained(tmp_path/name, *more, **how)
    assert trace(tmp_path/'predicted') == trace(tmp_path/'whole')
    assert max(abs(a - b) for (_, a), (_, b) in zip(trace(tmp_path/'whole'), trace(tmp_path/'split'))) < 1e-5

def test_prediction(tmp_path):
    "Asked to predict, a run first logs speed and memory, and its lines have the MFU"
    messages = []
    trained(tmp_path, 'train.n_images=2400', until=8, log=messages.append, predict=True)
    assert 'images a second' in messages[-1] and 'MFU' in messages[-1] and 'GB a process' in messages[-1]
    assert 0 < read_metrics(tmp_path)[0]['mfu'] < 2 and trace(tmp_path)[0][0] == 8

def test_another_setting_in_another_directory(tmp_path):
    trained(tmp_path/'first')
    shutil.copytree(tmp_path/'first'/'checkpoints', tmp_path/'slower'/'checkpoints')
    slowed = trained(tmp_path/'slower', 'train.lr=1e-5', 'train.n_images=128', until=72)
    assert slowed.images_seen == 72 and slowed.lr < 1e-5

def test_the_best_is_left(tmp_path):
    "The EMA weights of the best validation, from their checkpoint"
    state = trained(tmp_path, 'train.keep_checkpoints=1', 'train.checkpoint_images=8', 'train.validation_images=8')
    assert state.best_at and torch.equal(best_average(tmp_path, state)['conv_in.weight'], best_average(tmp_path, replace(state, images_seen=1))['conv_in.weight'])
    older = replace(state, best_at=8)
    assert best_average(tmp_path, older) is older.ema # no such checkpoint any more

def test_a_budget_in_this_process(tmp_path):
    "A dollar each second, and two to spend: a run that is asked to go on says at once that it is over; with a greater budget it goes on"
    rich = ['train.n_images=80000', 'train.dollars_per_hour=36000', 'train.max_dollars=5', 'train.validation_images=16']
    spent = trained(tmp_path, *rich)
    again = trained(tmp_path, *rich)
    assert (spent.ended, again.ended, again.images_seen) == ('dollars', 'dollars', spent.images_seen)
    more = trained(tmp_path, *rich[:2], 'train.max_dollars=1e6', rich[3], until=spent.images_seen + 8)
    log = cost_summary(tmp_path)
    assert (more.images_seen - spent.images_seen, log['attempts'], log['images_lost']) == (8, 3, 0)

SMALL = ['data.n_images=64', 'data.size=64', 'unet.width=16', 'unet.attention_size=8', 'unet.overrides={"block_out_channels": [8, 16]}',
         'train.n_images=320', 'train.global_batch=8', 'train.micro_batch=0', 'train.warmup_images=80', 'train.log_images=8',
         'train.validation_images=160', 'train.checkpoint_images=16', 'train.precision=float32', 'train.device=cpu']

# A process that has imported everything, and forks a training for each line it reads: a start takes a tenth of a second
NURSERY = '''
import hashlib, json, os, resource, signal, sys
wire = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1) # torch 2.10, the oldest, greets on stdout where processes meet
import torch
import t2i_nb.train
from pathlib import Path
from t2i_nb.core import apply_overrides, find_recipe, load_config
from t2i_nb.recipe import Components, RunConfig, TrainingData
from t2i_nb.train import make_batch, image_order, stop_signals, train_steps
torch.set_num_threads(1)
def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g).half()
    return TrainingData(draw(n, 8, 8, 8), draw(n, 8, 8, 8).abs()/4, torch.arange(1, n + 1)[:, None], draw(n + 1, 4, 32))
parts = images(64, 0), images(8, 1)
def note_draws(path): # one line a draw: its number, its image, a digest of everything that was drawn for it
    def noting(data, cfg, k, n):
        batch = make_batch(data, cfg, k, n)
        digest = lambda i: hashlib.blake2b(b''.join(v[i].numpy().tobytes() for v in batch.values())).hexdigest()[:16]
        with open(path, 'a') as f:
            for i in range(n): f.write(json.dumps([k + i, image_order(len(data), cfg.seed, k + i), digest(i)]) + '\\n')
        return batch
    t2i_nb.train.make_batch = noting
def fit(run, overrides, log=lambda text: None):
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), overrides)
    with stop_signals() as should_stop:
        for state in train_steps(cfg, Path(run), Components(None, None, None), *parts, log=log, should_stop=should_stop): pass
    return state.ended
os.environ['DS_ACCELERATOR'] = 'cpu'
try: import deepspeed.runtime.zero.muon.muon_optimizer # the slow one of its imports
except ImportError: pass
fit(sys.argv[1], json.loads(sys.argv[2]))
print('ready', file=wire, flush=True)
for line in sys.stdin:
    job, pids = json.loads(line), []
    world = job.get('world', 1)
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1]: continue
        if world > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(job['port']))
        if 'limit' in job:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job['limit'], job['limit']))
        if 'memory' in job: # so many bytes more than now
            have = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (have + job['memory'],)*2)
        if 'draws' in job: note_draws(f"{job['draws']}.{os.getpid()}")
        heard = []
        try: said = dict(ended=fit(job['run'], job['overrides'], heard.append), **(dict(heard=heard) if 'memory' in job else {}))
        except Exception as e: said = dict(error=f'{type(e).__name__}: {e}')
        if not rank: print(json.dumps(said), file=wire, flush=True)
        os._exit(0)
    print(json.dumps(dict(pids=pids)), file=wire, flush=True)
    status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(dict(status=status[0])), file=wire, flush=True)
'''

class Nursery:
    "Starts trainings, and lets a function end them"
    def __init__(self, folder, overrides):
        code = [sys.executable, '-c', NURSERY, str(folder/'first'), json.dumps(overrides + ['train.n_images=16'])]
        self.process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == 'ready\n'
    def answer(self): return json.loads(self.process.stdout.readline())
    def train(self, run, overrides, end=None, **job):
        "What the training said last, its exit status, its seconds"
        begun, said = time.perf_counter(), {}
        if 'world' in job:
            with socket.socket() as s: s.bind(('127.0.0.1', 0)); job['port'] = s.getsockname()[1]
        self.process.stdin.write(json.dumps(dict(run=str(run), overrides=overrides, **job)) + '\n'); self.process.stdin.flush()
        pids = self.answer()['pids']
        if end: end(pids)
        while 'status' not in (answer := self.answer()): said = answer
        return said, answer['status'], time.perf_counter() - begun
    def close(self): self.process.stdin.close(); self.process.wait()

@pytest.fixture(scope='module')
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp('nursery'), SMALL)
    yield made
    made.close()

@pytest.fixture(scope='module')
def alone(nursery, tmp_path_factory):
    "What a run leaves that nobody interrupts"
    run = tmp_path_factory.mktemp('alone')/'run'
    assert nursery.train(run, SMALL)[:2] == (dict(ended='images'), 0)
    return what_is_left(run)

posix = pytest.mark.skipif(os.name == 'nt', reason='forks, and sends SIGKILL')

def end_after(run, lines, number):
    "A function that sends a signal when `lines` more lines of metrics are there"
    def end(pids):
        before = len(read_metrics(run))
        while len(read_metrics(run)) < before + lines: time.sleep(.01)
        send(pids, number)
    return end

def send(pids, number):
    for pid in pids: os.kill(pid, number)

def what_is_left(run):
    "Everything that must not depend on interruptions: the files of the newest checkpoint, and the trace"
    folder = newest_checkpoint(run)
    files = {p.name: p.read_bytes() for p in folder.glob('*.safetensors')}
    numbers = {k: v for k, v in json.loads((folder/'state.json').read_text()).items() if k not in ('seconds', 'cost')}
    trace = [{k: v for k, v in r.items() if k not in ('seconds', 'images_per_second')} for r in read_metrics(run)]
    return folder.name, files, numbers, trace

@posix
@pytest.mark.parametrize('kills, micro, stage, job', (
    (4, 0, 0, {}), *(pytest.param(20, *o, marks=pytest.mark.slow) for o in ((0, 0, {}), (2, 0, {}), (0, 0, dict(world=2)), (2, 2, dict(world=2))))))
def test_killed_many_times(nursery, tmp_path, kills, micro, stage, job):
    "Weights, EMA, optimiser and every loss are those of the run that was left alone"
    if stage and not find_spec('deepspeed'): pytest.skip('DeepSpeed is not installed')
    overrides, rng = [*SMALL, f'train.micro_batch={micro}', f'train.zero_stage={stage}'], random.Random(micro)
    if stage: overrides += ['train.n_images=240', 'train.checkpoint_images=40', 'train.validation_images=120'] # a checkpoint of ZeRO is slow
    _, status, seconds = nursery.train(tmp_path/'whole', overrides, **job)
    assert status == 0
    start = nursery.train(tmp_path/'start', [*overrides, 'train.n_images=8'], **job)[2] # with its two saves
    run, halves = tmp_path/'killed', 0
    half_written = lambda: any((run/'checkpoints').glob('.img-*.tmp'))
    def at_random(pids): time.sleep(rng.uniform(0, start + seconds/25)); send(pids, signal.SIGKILL)
    def while_saving(pids):
        until = time.perf_counter() + start + seconds/3
        while not half_written() and time.perf_counter() < until: pass
        send(pids, signal.SIGKILL)
    for k in range(kills):
        _, status, _ = nursery.train(run, overrides, while_saving if k % 4 == 3 else at_random, **job)
        assert status == -signal.SIGKILL, f'ended before kill {k}'
        halves += half_written()
    said, status, _ = nursery.train(run, overrides, **job)
    assert (said, status) == (dict(ended='images'), 0) and halves >= 1
    assert what_is_left(run) == what_is_left(tmp_path/'whole')

@posix
def test_stopped_in_good_order(nursery, alone, tmp_path):
    "SIGTERM and SIGINT end a run after its step, with a checkpoint of that step"
    run = tmp_path/'run'
    for number in (signal.SIGTERM, signal.SIGINT):
        said, status, _ = nursery.train(run, SMALL, end_after(run, 5, number))
        assert (said, status) == (dict(ended=number.name), 0)
        steps = [r['images_seen'] for r in read_metrics(run) if 'loss' in r]
        assert newest_checkpoint(run).name == f'img-{steps[-1]:08d}' # nothing is lost
    nursery.train(run, SMALL)
    assert what_is_left(run) == alone

@pytest.mark.slow
@posix
def test_no_room(nursery, alone, tmp_path):
    "A save that does not fit ends the run in one sentence, and leaves the checkpoints before it"
    run = tmp_path/'run'
    nursery.train(run, SMALL, end_after(run, 5, signal.SIGTERM))
    before = {p: p.read_bytes() for p in (run/'checkpoints').rglob('*') if p.is_file()}
    said, status, _ = nursery.train(run, SMALL, limit=20_000)
    assert status == 0 and 'cannot be written' in said['error'] and said['error'].startswith('InputError'), said
    assert {p: p.read_bytes() for p in (run/'checkpoints').rglob('*') if p.is_file()} == before
    nursery.train(run, SMALL)
    assert what_is_left(run) == alone

@posix
def test_a_hundred_damages(nursery, tmp_path):
    "A checkpoint that is not as it was written is never loaded"
    nursery.train(tmp_path, [*SMALL, 'train.n_images=64'])
    good, newest = checkpoint_folders(tmp_path)
    whole, rng = {p: p.read_bytes() for p in newest.iterdir()}, random.Random(0)
    for k in range(100):
        path = rng.choice(sorted(whole))
        data, at = bytearray(whole[path]), rng.randrange(len(whole[path]))
        match k % 4:
            case 0: path.write_bytes(data[:at]) # truncated
            case 1: data[at] ^= 1 << rng.randrange(8); path.write_bytes(data) # one bit
            case 2: path.unlink()
            case 3: path.write_bytes(data[:at] + bytes(len(data) - at)) # zeros, as after a power cut
        said, changed = [], not path.is_file() or path.read_bytes() != whole[path]
        assert newest_checkpoint(tmp_path, said.append) == (good if changed else newest), (k, path.name)
        assert said == [f'{newest.name} is damaged and is skipped']*changed
        path.write_bytes(whole[path])
    assert newest_checkpoint(tmp_path) == newest

@pytest.mark.slow
@posix
def test_the_command_is_asked_to_end(tmp_path):
    "`t2i train` saves and exits with 130 on SIGTERM, and a second process on the same run is refused"
    words = [sys.executable, '-m', 't2i_nb', 'train', 'demo', '--run-dir', str(tmp_path/'run'), '--set', *SMALL, 'train.n_images=800000']
    first = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not read_metrics(tmp_path/'run'): time.sleep(.1); assert first.poll() is None
    second = subprocess.run(words, capture_output=True, text=True)
    assert second.returncode == 2 and 'another process is writing' in second.stderr
    first.send_signal(signal.SIGTERM)
    begun, (_, said) = time.perf_counter(), first.communicate(timeout=60)
    assert first.returncode == 130 and 'SIGTERM: stopped and saved after' in said, said
    assert time.perf_counter() - begun < 10 and not (tmp_path/'run'/'pipeline').exists()

@pytest.mark.slow
def test_a_budget_in_minutes(tmp_path):
    "A run that is out of time is validated, saved and drawn from like one that is done"
    from t2i_nb.__main__ import main
    words = ['train', 'demo', '--run-dir', str(tmp_path), '--set', *SMALL, 'train.n_images=800000', 'train.max_minutes=0.05', 'train.checkpoint_images=400000']
    assert main([*words, 'train.checkpoint_minutes=0.01']) == 0
    rows = read_metrics(tmp_path)
    assert 3 <= max(r.get('seconds', 0) for r in rows) < 30 and 'validation_loss' in rows[-1]
    assert newest_checkpoint(tmp_path).name == f"img-{rows[-1]['images_seen']:08d}" and len(checkpoint_folders(tmp_path)) in (2, 3) # two and the best
    assert main(['sample', str(tmp_path), 'a red flower', '--out', str(tmp_path/'a.png'), '--num-inference-steps', '2']) == 0

@pytest.mark.slow
@posix
def test_a_budget_in_dollars(nursery, tmp_path):
    "All attempts are paid from one budget, what a kill cost is in the log, and the run ends in time with a whole checkpoint"
    dear = [*SMALL, 'train.n_images=800000', 'train.checkpoint_images=80', 'train.validation_images=80', 'train.dollars_per_hour=36000']
    assert nursery.train(tmp_path, [*dear, 'train.max_dollars=9e9'], end_after(tmp_path, 25, signal.SIGKILL))[1] == -signal.SIGKILL
    spent = cost_summary(tmp_path)
    assert spent['dollars'] > 0 and spent['attempts'] == 1
    budget = [*dear, f"train.max_dollars={spent['dollars'] + 20}"]
    assert nursery.train(tmp_path, budget)[0] == dict(ended='dollars')
    bill, newest = cost_summary(tmp_path), newest_checkpoint(tmp_path)
    assert bill['dollars'] > spent['dollars'] and bill['attempts'] == 2 and 0 <= bill['images_lost'] <= spent['images']
    assert newest.name == f"img-{bill['images']:08d}" and json.loads((newest/'state.json').read_text())['cost']['attempts'] in (1, 2) # 1 where even the start used it up
    assert nursery.train(tmp_path, budget)[0] == dict(ended='dollars') and newest_checkpoint(tmp_path) == newest # nothing is left to spend
    assert [o['images_from'] % 80 for o in read_cost(tmp_path)['attempts'][:2]] == [0, 0]

@pytest.mark.slow
@posix
def test_patience(nursery, tmp_path):
    "A run that gets no better ends, and its best checkpoint outlives newer ones"
    still = [*SMALL, 'train.lr=0', 'train.validation_images=80', 'train.patience=2', 'train.keep_checkpoints=1']
    assert nursery.train(tmp_path, still)[0] == dict(ended='patience')
    assert [p.name for p in checkpoint_folders(tmp_path)] == ['img-00000080', 'img-00000240']

@posix
@pytest.mark.parametrize('first, then, stage', ((2, 1, 0), *(pytest.param(*o, marks=pytest.mark.slow) for o in ((1, 2, 0), (2, 1, 2), (1, 2, 2)))))
def test_another_number_of_processes(nursery, tmp_path, first, then, stage):
    "A run goes on with another number of processes: the same draws, and losses that differ by the order of summation"
    if stage and not find_spec('deepspeed'): pytest.skip('DeepSpeed is not installed')
    longer, world = [*SMALL, 'train.n_images=640', 'train.checkpoint_images=160', f'train.zero_stage={stage}'], lambda n: dict(world=n) if n > 1 else {}
    draws = lambda name: {tuple(json.loads(l)) for p in tmp_path.glob(f'{name}.draws.*') for l in p.read_text().splitlines()}
    assert nursery.train(tmp_path/'alone', longer, draws=str(tmp_path/'alone.draws'))[0] == dict(ended='images')
    run, job = tmp_path/'run', dict(draws=str(tmp_path/'run.draws'))
    assert nursery.train(run, longer, end_after(run, 10, signal.SIGTERM), **world(first), **job)[0] == dict(ended='SIGTERM')
    switch = newest_checkpoint(run).name
    assert nursery.train(run, longer, **world(then), **job)[0] == dict(ended='images')
    assert draws('alone') == draws('run') and len(draws('run')) == 640
    losses = [[(r['images_seen'], r['loss']) for r in read_metrics(tmp_path/name) if 'loss' in r] for name in ('alone', 'run')]
    assert [n for n, _ in losses[0]] == [n for n, _ in losses[1]]
    assert 8*50 + int(switch[4:]) <= 640
    assert max(abs(a - b)/a for (n, a), (_, b) in zip(*losses) if n <= int(switch[4:]) + 400) < 1e-5

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='limits the address space')
def test_memory_runs_out(nursery, tmp_path):
    "The step is taken in smaller micro-batches, and is the same step; where the recipe names one, a sentence says which fits"
    large = [*SMALL, 'train.global_batch=512', 'train.n_images=1536', 'train.validation_images=0', 'train.checkpoint_images=0']
    for name, job in (('enough', {}), ('little', dict(memory=150_000_000))):
        said = nursery.train(tmp_path/name, large, **job)[0]
        assert said.get('ended') == 'images', said
    assert any('memory ran out: goes on in micro-batches of' in line for line in said['heard']), said
    traces = [[r['loss'] for r in read_metrics(tmp_path/name)] for name in ('enough', 'little')]
    assert len(traces[0]) == 3 and max(abs(a - b)/a for a, b in zip(*traces)) < 1e-5
    said = nursery.train(tmp_path/'named', [*large, 'train.micro_batch=512'], memory=150_000_000)[0]
    assert 'memory does not suffice for a micro-batch of 512; use train.micro_batch=256' in said['error'], said

@pytest.mark.slow
@posix
def test_torchrun(tmp_path):
    "Two processes of the command: one speaks, one pipeline is left; a batch that cannot be shared is refused"
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', '-m', 't2i_nb', 'train', 'demo']
    words = ['--run-dir', str(tmp_path/'run'), '--set', *SMALL, 'train.n_images=48', 'train.validation_images=24', 'sample.num_inference_steps=2',
             f"train.zero_stage={2*bool(find_spec('deepspeed'))}"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    said = done.stdout.splitlines()
    if version('torch').startswith('2.10'): said = [l for l in said if l and '[Gloo]' not in l and 'peer ranks' not in l] # the oldest greets
    assert done.returncode == 0 and said[0].startswith('images seen') and done.stdout.count('images seen') == 1, done.stdout + done.stderr
    assert (tmp_path/'run'/'pipeline'/'model_index.json').is_file() and newest_checkpoint(tmp_path/'run').name == 'img-00000048'
    odd = subprocess.run([*launch, '--run-dir', str(tmp_path/'odd'), '--set', *SMALL, 'train.global_batch=9'], capture_output=True, text=True)
    assert odd.returncode and 't2i: train.global_batch 9 cannot be shared by 2 processes' in odd.stderr

@pytest.mark.slow
@posix
def test_torchrun_is_asked_to_end(tmp_path):
    "SIGTERM to the launcher reaches its processes, and they save the step that they are in"
    words = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', '-m', 't2i_nb', 'train', 'demo',
             '--run-dir', str(tmp_path/'run'), '--set', *SMALL, 'train.n_images=800000', 'train.checkpoint_images=400000']
    launcher = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while len(read_metrics(tmp_path/'run')) < 3: time.sleep(.1); assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)[1]
    assert 'SIGTERM: stopped and saved after' in said, said
    steps = [r['images_seen'] for r in read_metrics(tmp_path/'run') if 'loss' in r]
    assert newest_checkpoint(tmp_path/'run').name == f'img-{steps[-1]:08d}' # nothing is lost

@pytest.mark.slow
def test_from_run_to_run(tmp_path):
    "A second run begins with the weights of the first; both are tracked, reported and compared, and a stopped one is drawn with"
    from t2i_nb.__main__ import main
    short, first, second = [*SMALL, 'train.n_images=48', 'train.validation_images=24', 'sample.num_inference_steps=2'], tmp_path/'first', tmp_path/'second'
    assert main(['train', 'demo', '--run-dir', str(first), '--set', *short]) == 0
    assert main(['train', 'demo', '--run-dir', str(second), '--set', *short, f'train.init_from={first}', 'train.lr=0', 'train.ema_decay=0']) == 0
    name = 'pipeline/unet/diffusion_pytorch_model.safetensors'
    assert (first/name).read_bytes() == (second/name).read_bytes() # nothing was learned, so what was taken is left
    shutil.rmtree(first/'pipeline')
    assert main(['pipeline', str(first)]) == 0 and (first/name).read_bytes() == (second/name).read_bytes()
    assert main(['compare', str(first), str(second), '--out', str(tmp_path/'compare.png')]) == 0 and (tmp_path/'compare.png').is_file()
    assert main(['report', str(second)]) == 0 and (second/'flight.png').is_file() and (second/'progress.gif').is_file()
    if not find_spec('tensorboard'): return
    assert main(['track', str(first), '--to', 'tensorboard']) == 0 and any((first/'tensorboard').iterdir())

def test_validation_images_are_not_mirrored():
    from t2i_nb.recipe import load_components, prepare_data
    cfg = apply_overrides(recipe(), ['data.n_images=4', 'data.flip=true'])
    models = load_components(cfg)
    assert [len(prepare_data(cfg, models, split).flips) for split in ('train', 'validation')] == [2, 0]
