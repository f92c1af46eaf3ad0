"What the page 00d_cache cannot show: real processes that are killed, that share a folder, and that read while others write"
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pytest
from t2i_nb.core import InputError
from t2i_nb.cache import fill, open_rows, read_folder, row_key, shard_path

# A writer: rows are a function of their number, and each call of `make` leaves a line with its positions in a log of its own
writer = '''
import os, sys, time
import numpy as np
from t2i_nb.cache import fill, row_key
folder, log, n, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
def make(at):
    time.sleep(pause)
    with open(log, 'a') as f: f.write(' '.join(map(str, at)) + '\\n')
    return dict(mean=np.sin(np.arange(64)*at[:, None]).astype('f2').reshape(-1, 4, 4, 4), std=np.full((len(at), 4), at[0]/n, 'f2'))
print('ready', flush=True)
print(fill(folder, [row_key('test', i) for i in range(n)], make, batch=8, rows_per_shard=40), flush=True)
'''
n = 1010 # 25 blocks of 40 and one of 10
keys = [row_key('test', i) for i in range(n)]
posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL; a dead owner is known by its heartbeat there')

def start(folder, log, pause=.001):
    return subprocess.Popen([sys.executable, '-c', writer, str(folder), str(log), str(n), str(pause)], stdout=subprocess.PIPE, text=True)

def finish(process):
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return int(out.split()[-1])

def encoded_batches(log): return Path(log).read_text().splitlines() if Path(log).exists() else []

def encoded(*logs): return [int(i) for log in logs for batch in encoded_batches(log) for i in batch.split()]

def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}

def split(shard): return [shard.tobytes()[i:i + 16] for i in range(0, 16*len(shard), 16)] # numpy would drop zero bytes at the end

def keys_in(folder): return [k for _, shard, _ in read_folder(folder) for k in split(shard)]

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted build"
    folder = tmp_path_factory.mktemp('whole')
    assert finish(start(folder/'cache', folder/'log')) == n
    assert encoded(folder/'log') == list(range(n))
    return folder/'cache'

@posix
def test_killed_and_resumed(whole, tmp_path):
    rng, logs, kept = random.Random(0), [], set()
    for attempt in range(10):
        logs.append(tmp_path/f'{attempt}.log')
        process = start(tmp_path/'cache', logs[-1], .004)
        batches = rng.randrange(16) # five make a block; a busy machine needs longer for them, so it is they that are counted
        while len(encoded_batches(logs[-1])) < batches: time.sleep(.001); assert process.poll() is None
        time.sleep(rng.uniform(0, .01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not kept & set(encoded(logs[-1])), 'a row that a shard held was encoded again'
        val = set(keys_in(tmp_path/'cache'))
        kept = {i for i, k in enumerate(keys) if k in val}
    made = finish(start(tmp_path/'cache', tmp_path/'last.log'))
    assert 0 < len(kept) < n and made == n - len(kept) == len(encoded(tmp_path/'last.log'))
    assert files(tmp_path/'cache') == files(whole) # and so nothing else is left

@pytest.mark.parametrize('workers', [2, 3])
def test_sharing(whole, tmp_path, workers):
    logs = [tmp_path/f'{i}.log' for i in range(workers)]
    made = [finish(p) for p in [start(tmp_path/'cache', log, .02) for log in logs]]
    assert sum(made) == n and min(made) >= 40, made
    assert sorted(encoded(*logs)) == list(range(n)) # each row once
    assert files(tmp_path/'cache') == files(whole)

@posix
def test_survivor_takes_over(whole, tmp_path):
    first = start(tmp_path/'cache', tmp_path/'1.log', 60) # it hangs in its first block
    while not list(tmp_path.glob('cache/*.claim')): time.sleep(.01)
    second = start(tmp_path/'cache', tmp_path/'2.log')
    while len(list(tmp_path.glob('cache/*.safetensors'))) < 25: time.sleep(.01)
    time.sleep(.3)
    assert second.poll() is None # waits for the block that it has not
    first.kill(), first.wait()
    assert finish(second) == n
    assert files(tmp_path/'cache') == files(whole)

def test_other_machine(whole, tmp_path, monkeypatch):
    "A claim whose heartbeat goes on is waited for; when it stops, it is taken over"
    import threading
    import t2i_nb.cache as cache
    monkeypatch.setattr(cache, 'stale_seconds', .5)
    monkeypatch.setattr(cache, 'poll_seconds', .02)
    claim = shard_path(tmp_path, cache.key_array(keys[:40])).with_suffix('.claim')
    claim.write_text('elsewhere\n1')
    begun, make = time.monotonic(), lambda at: dict(a=at[:, None].astype('f4'))
    def beat():
        while time.monotonic() - begun < 1.5: os.utime(claim); time.sleep(.05)
    thread = threading.Thread(target=beat)
    thread.start()
    assert fill(tmp_path, keys[:80], make, rows_per_shard=40) == 80
    assert time.monotonic() - begun > 1.9 and len(list(tmp_path.iterdir())) == 2
    thread.join()

def test_reader_while_writing(whole, tmp_path):
    writing, seen, begun = start(tmp_path/'cache', tmp_path/'log', .01), set(), time.monotonic()
    while writing.poll() is None and time.monotonic() - begun < 60:
        val = read_folder(tmp_path/'cache')
        if val:
            some = val[len(seen) % len(val)][1]
            rows = open_rows(tmp_path/'cache', some.view(np.uint8).reshape(-1, 16))
            at = [keys.index(k) for k in split(some)]
            assert np.array_equal(rows.take('mean', slice(None)).reshape(len(at), 64), np.sin(np.arange(64)*np.array(at)[:, None]).astype('f2'))
            seen.add(len(val))
        time.sleep(.01)
    assert finish(writing) == n and len(seen) > 5
    assert np.array_equal(open_rows(whole, keys).take('mean', slice(None)), open_rows(tmp_path/'cache', keys).take('mean', slice(None)))

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b[:4], lambda b: b'\xff'*8 + b[8:], lambda b: b[:9] + b'\xff'*20 + b[29:],
                                    lambda b: b + b'x', lambda b: b[:-16] + bytes(16)], ids=['half', 'empty', 'start', 'length', 'header', 'longer', 'keys'])
def test_damaged(whole, tmp_path, caplog, damage):
    for name, data in files(whole).items(): (tmp_path/name).write_bytes(data)
    victim = shard_path(tmp_path, np.frombuffer(b''.join(keys[80:120]), 'S16'))
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(InputError, match=f'40 of {n} rows are not in'): open_rows(tmp_path, keys)
    process = start(tmp_path, tmp_path.with_suffix('.log'))
    assert finish(process) == 40 and encoded(tmp_path.with_suffix('.log')) == list(range(80, 120))
    assert [victim.name in m for m in caplog.messages] == [True]
    assert files(tmp_path) == files(whole)

def test_interrupted_by_ctrl_c(tmp_path):
    def make(at): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fill(tmp_path, keys, make)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.skipif(os.name == 'nt' or not hasattr(os, 'fork'), reason='limits the size of files as POSIX does')
def test_full_disk(tmp_path):
    code = writer.replace('print(fill(', 'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
                          'resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\nprint(fill(').replace("with open(log, 'a')", "with open(os.devnull, 'a')")
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'cache'), 'none', str(n), '0'], capture_output=True, text=True)
    assert 'InputError: cannot write' in done.stderr and 'free space or use another folder' in done.stderr
    assert list((tmp_path/'cache').iterdir()) == []

def test_progress(tmp_path):
    seen = []
    def bar(batches):
        for b in batches: yield b
        seen.append(list(batches)) # only a bar that is read to its end gets here
    make = lambda at: dict(a=at[:, None].astype('f4'))
    fill(tmp_path, keys[:100], make, batch=8, rows_per_shard=40, progress=bar)
    fill(tmp_path, keys[:110], make, batch=8, rows_per_shard=40, progress=bar)
    assert [len(s) for s in seen] == [5 + 5 + 3, 2]

def test_a_million_keys(tmp_path):
    "Looking up keys takes arrays, not objects"
    wanted = np.random.default_rng(0).integers(0, 256, (10**6, 16), dtype=np.uint8)
    fill(tmp_path, wanted, lambda at: dict(a=at[:, None].astype('i4')), batch=2**16, rows_per_shard=2**16)
    order = np.random.default_rng(1).permutation(10**6)
    for at in (slice(None), order):
        rows = open_rows(tmp_path, wanted[at])
        assert np.array_equal(rows.take('a', slice(0, 1000)).ravel(), np.arange(10**6)[at][:1000])
        assert np.array_equal(rows.take('a', slice(None)).ravel(), np.arange(10**6)[at])

def test_not_a_folder(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot make the folder'): fill(tmp_path/'file', keys, None)
    with pytest.raises(InputError, match='are not in'): open_rows(tmp_path/'none', keys)

def test_workers_map_for_themselves(whole):
    import pickle
    rows = open_rows(whole, keys)
    rows.take('mean', [0])
    copy = pickle.loads(pickle.dumps(rows))
    assert np.array_equal(copy.take('std', [5, 900]), rows.take('std', [5, 900])) and len(pickle.dumps(rows)) < 20_000

def test_few_files_are_open(tmp_path):
    if not Path('/proc/self/fd').exists(): pytest.skip('counts open files in /proc')
    fill(tmp_path, keys, lambda at: dict(a=at[:, None].astype('f4')), rows_per_shard=4)
    rows, before = open_rows(tmp_path, keys), len(os.listdir('/proc/self/fd'))
    assert rows.take('a', slice(None)).ravel().tolist() == list(range(n))
    assert len(os.listdir('/proc/self/fd')) - before <= 128 and rows.opened.cache_info().currsize == 128

def test_no_torch():
    code = ("import sys, tempfile, numpy as np; from t2i_nb.cache import *; f = tempfile.mkdtemp(); k = [row_key(1)]\n"
            "fill(f, k, lambda at: dict(a=np.ones((1, 2)))); open_rows(f, k).take('a', [0]); assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], check=True)
    subprocess.run([sys.executable, '-c', "import sys, t2i_nb.cache; assert not {'numpy', 'torch', 'safetensors'} & set(sys.modules)"], check=True)
