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
from t2i_nb.cache import Rows, fill, key_array, open_rows, read_folder, row_key, shard_path

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
posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL')

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
@pytest.mark.parametrize('kills', [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed(whole, tmp_path, kills):
    rng, logs, kept = random.Random(0), [], set()
    for attempt in range(kills):
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
    while not encoded_batches(tmp_path/'1.log') and not list(tmp_path.glob('cache/*.lock')): time.sleep(.01)
    second = start(tmp_path/'cache', tmp_path/'2.log')
    while len(list(tmp_path.glob('cache/*.safetensors'))) < 25: time.sleep(.01)
    time.sleep(.3)
    assert second.poll() is None # waits for the block that it has not
    first.kill(), first.wait()
    assert finish(second) == n
    assert files(tmp_path/'cache') == files(whole)

def test_a_lock_is_waited_for(tmp_path):
    "A block that another process holds is made when it lets go, and what a killed one left is removed"
    import filelock, threading
    path = shard_path(tmp_path, key_array(keys[:40]))
    for left in ('.part', '.lock'): path.with_suffix(left).write_bytes(b'left')
    stale = shard_path(tmp_path, key_array(keys[5:45])) # of a block that is cut elsewhere now
    for left in ('.part', '.lock'): stale.with_suffix(left).write_bytes(b'left')
    lock, made, rounds = filelock.FileLock(path.with_suffix('.lock'), thread_local=False), [], []
    def progress(batches): rounds.append(batches); return batches
    lock.acquire()
    thread = threading.Thread(target=lambda: made.append(fill(tmp_path, keys[:80], lambda at: dict(a=at[:, None].astype('f4')), rows_per_shard=40, progress=progress)))
    thread.start()
    while not list(tmp_path.glob('*.safetensors')): time.sleep(.01)
    time.sleep(.3)
    assert thread.is_alive() and not path.is_file()
    lock.release()
    thread.join()
    assert made == [80] and len(rounds) == 1 # it waits, and does not look again and again
    assert sorted(tmp_path.iterdir()) == sorted([path, shard_path(tmp_path, key_array(keys[40:80]))])

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

def test_a_shard_appears_by_renaming(tmp_path, monkeypatch):
    def refuse(part, path): raise OSError('no renaming')
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(InputError, match='cannot write .*: no renaming'): fill(tmp_path, keys[:5], lambda at: dict(a=at[:, None].astype('f4')))
    assert list(tmp_path.iterdir()) == []

def test_progress(tmp_path):
    seen = []
    def bar(batches):
        for b in batches: yield b
        seen.append(list(batches)) # only a bar that is read to its end gets here
    make = lambda at: dict(a=at[:, None].astype('f4'))
    fill(tmp_path, keys[:100], make, batch=8, rows_per_shard=40, progress=bar)
    fill(tmp_path, keys[:110], make, batch=8, rows_per_shard=40, progress=bar)
    assert [len(s) for s in seen] == [5 + 5 + 3, 2]

@pytest.mark.parametrize('n', [10**5, pytest.param(10**6, marks=pytest.mark.slow)])
def test_many_keys(tmp_path, n):
    "In the order in which they were stored, and in another one"
    wanted = np.random.default_rng(0).integers(0, 256, (n, 16), dtype=np.uint8)
    fill(tmp_path, wanted, lambda at: dict(a=at[:, None].astype('i4')), batch=2**16, rows_per_shard=2**14)
    order = np.random.default_rng(1).permutation(n)
    for at in (slice(None), order):
        rows = open_rows(tmp_path, wanted[at])
        assert np.array_equal(rows.take('a', slice(0, 1000)).ravel(), np.arange(n)[at][:1000])
        assert np.array_equal(rows.take('a', slice(None)).ravel(), np.arange(n)[at])

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

def test_keys():
    with pytest.raises(InputError, match='a key has 3 bytes'): key_array([b'abc'])
    with pytest.raises(InputError, match='prints its address'): row_key(object())
    assert len({row_key('ab', 'c'), row_key('a', 'bc'), row_key(1), row_key('1'), row_key(b'1')}) == 5
    assert row_key(np.arange(10**4)) != row_key(np.r_[:5000, 4999, 5001:10**4]) # both print with an ellipsis

def test_keys_that_end_in_zeros_are_different(tmp_path):
    alike = [b'8 bytes.' + bytes(8), b'8 bytes.' + b'1' + bytes(7), b'8 bytes.' + b'2' + bytes(7), bytes(16)]
    fill(tmp_path, alike, lambda at: dict(a=at[:, None].astype('f4')), rows_per_shard=2)
    assert open_rows(tmp_path, alike[::-1]).take('a', slice(None)).ravel().tolist() == [3, 2, 1, 0]

@pytest.mark.parametrize('rows, expected', [(dict(mean=np.full((2, 3), np.inf, 'f2')), "'mean' of row 1 does not fit into float16"), (dict(mean=np.zeros((2, 3), 'f4')), 'holds mean float16'),
                                        (dict(keys=np.zeros(2)), 'none of them called keys'), (dict(mean=np.zeros((1, 3), 'f2')), 'for 2 rows'), ({}, 'at least one array')])
def test_rows_that_do_not_belong(tmp_path, rows, expected):
    fill(tmp_path, keys[:1], lambda at: dict(mean=np.zeros((1, 3), 'f2')))
    with pytest.raises(InputError, match=expected): fill(tmp_path, keys[:3], lambda at: rows)

def test_rows_in_any_order_and_number(whole):
    rows, rng = open_rows(whole, keys), np.random.default_rng(0)
    for at in (np.arange(n)[::-1], rng.integers(0, n, 3000), np.zeros(5, int), np.r_[0:40, 0:40, 5:60], [], [-1]):
        at = np.asarray(at, int)
        assert np.array_equal(rows.take('mean', at).reshape(len(at), 64), np.sin(np.arange(64)*(at % n)[:, None]).astype('f2').reshape(len(at), 64))
    with pytest.raises(IndexError): rows.take('mean', [n])
    assert len(open_rows(whole, [])) == 0 and rows.take('std', []).shape == (0, 4) and isinstance(rows, Rows)
