"""The row store of t2i_nb.cache against one safetensors file loaded whole and against torch.save of one dict.

    python bench/cache.py                     10 thousand and 1 million rows of 256 bytes; two minutes, 0.8 GB of disk at a time

Each way writes the same rows, and each measurement runs in a process of its own, so that memory and start-up are its own. All files are
in the operating system's cache when they are read. The reference writes are forced onto the disk too. Times are of the processor, so that
other work on the machine does not count. Rows go to bench/results/cache.json."""
import argparse, datetime, json, os, platform, shutil, subprocess, sys, tempfile, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))
shape = (4, 4, 4) # a row: mean and std, 128 bytes each

def columns(start, n):
    "n rows of two fp16 arrays: cheap to make, and different"
    import numpy as np
    bits = np.arange(start, start + n, dtype='u4')[:, None]*np.arange(1, 128, 2, dtype='u4')
    mean = (bits.astype('u2') & 0x3fff).view('f2').reshape(n, *shape) # no inf, no nan
    return dict(mean=mean, std=mean[:, ::-1].copy())

def keys_of(n):
    import numpy as np
    return np.random.default_rng(0).integers(0, 256, (n, 16), dtype=np.uint8)

def memory():
    "Resident memory of this process in MB: all of it, and what no file backs"
    try: lines = dict(l.split(':', 1) for l in Path('/proc/self/status').read_text().splitlines())
    except OSError: return None, None
    return tuple(int(lines[k].split()[0])/1024 for k in ('VmRSS', 'RssAnon'))

def synced(path):
    with open(path, 'r+b') as f: os.fsync(f.fileno())

class Shards:
    def write(self, folder, n, extra=0):
        from t2i_nb.cache import fill
        whole = columns(0, n) if not extra else None
        make = (lambda at: {k: v[at] for k, v in whole.items()}) if whole else (lambda at: columns(int(at[0]), len(at)))
        begun = time.process_time()
        fill(folder/'shards', keys_of(n + extra), make, batch=256, rows_per_shard=8192) # files of 2 MB
        return time.process_time() - begun
    def add(self, folder, n): return self.write(folder, n, 1)
    def open(self, folder, keys):
        from t2i_nb.cache import open_rows
        return open_rows(folder/'shards', keys)
    def read(self, opened, at): return opened.take('mean', at), opened.take('std', at)

class Single:
    "One safetensors file"
    name = 'one.safetensors'
    def save(self, rows, path):
        from safetensors.torch import save_file
        save_file(rows, path)
    def load(self, path):
        from safetensors.torch import load_file
        return load_file(path)
    def write(self, folder, n):
        import torch
        rows = {k: torch.from_numpy(v) for k, v in columns(0, n).items()}
        begun = time.process_time()
        self.save(rows, folder/self.name)
        synced(folder/self.name)
        return time.process_time() - begun
    def add(self, folder, n):
        import torch
        begun = time.process_time()
        rows, one = self.load(folder/self.name), columns(n, 1)
        self.save({k: torch.cat([v, torch.from_numpy(one[k])]) for k, v in rows.items()}, folder/'grown')
        synced(folder/'grown')
        os.replace(folder/'grown', folder/self.name)
        return time.process_time() - begun
    def open(self, folder, keys): return self.load(folder/self.name)
    def read(self, opened, at): return opened['mean'][at], opened['std'][at]

class Dict(Single):
    "One dict in torch.save"
    name = 'one.pt'
    def save(self, rows, path):
        import torch
        torch.save(rows, path)
    def load(self, path):
        import torch
        return torch.load(path)

ways = dict(ours=Shards(), safetensors=Single(), torch=Dict())

def one(way, task, folder, n):
    "One measurement, in this process; prints JSON"
    import numpy as np
    import torch # all ways start from the same imports
    import safetensors.torch, t2i_nb.cache # noqa: F401
    w, folder = ways[way], Path(folder)
    if task != 'read': return dict(seconds=getattr(w, task)(folder, n))
    picks = np.random.default_rng(1).integers(0, n, (1000, 64))
    keys, before = keys_of(n), memory()
    begun = time.process_time()
    opened = w.open(folder, keys)
    first = w.read(opened, picks[0])
    start_up, begun = time.process_time() - begun, time.process_time()
    for at in picks: w.read(opened, at)
    seconds, after = time.process_time() - begun, memory()
    assert np.array_equal(np.asarray(first[0]), np.concatenate([columns(int(i), 1)['mean'] for i in picks[0]]))
    return dict(start_up=start_up, rows_per_second=picks.size/seconds, total_mb=after[0] and after[0] - before[0], own_mb=after[1] and after[1] - before[1])

def measure(way, task, folder, n):
    done = subprocess.run([sys.executable, __file__, '--one', way, task, str(folder), str(n)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, nargs='+', default=[10_000, 1_000_000])
    p.add_argument('--folder', help='where to write; a temporary folder by default')
    p.add_argument('--out', type=Path, default=root/'bench'/'results'/'cache.json')
    p.add_argument('--one', nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one: return print(json.dumps(one(*args.one[:3], int(args.one[3]))))
    import numpy, safetensors, torch
    common = dict(device=f'{os.cpu_count()} CPU cores', versions=dict(python=platform.python_version(), numpy=numpy.__version__,
                  safetensors=safetensors.__version__, torch=torch.__version__), date=str(datetime.date.today()))
    rows, label = [], dict(safetensors='one safetensors file', torch='torch.save of one dict')
    for n in args.rows:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try: found = {way: {task: measure(way, task, folder, n) for task in ('write', 'read', 'add')} for way in ways}
        finally: shutil.rmtree(folder)
        take = lambda way: {'start to the first 64 rows': (found[way]['read']['start_up']*1e3, 'ms', 'lower'),
                            'memory after 64,000 random rows': (found[way]['read']['total_mb'], 'MB', 'lower'),
                            'memory not backed by a file': (found[way]['read']['own_mb'], 'MB', 'lower'),
                            'one row more': (found[way]['add']['seconds']*1e3, 'ms', 'lower'),
                            'random rows, batches of 64': (found[way]['read']['rows_per_second'], 'rows/s', 'higher'),
                            'write': (n/found[way]['write']['seconds'], 'rows/s', 'higher')}
        for name, (ours, unit, better) in take('ours').items():
            for way in label:
                theirs = take(way)[name][0]
                if ours is None or theirs is None: continue # no /proc
                rows.append(dict(name=f'{name}: {n:,} rows, against {label[way]}', ours=ours, theirs=theirs,
                                 ratio=ours/theirs if better == 'higher' else theirs/ours, unit=unit, better=better, n=n, against=way, task=name, **common))
    args.out.write_text(json.dumps(rows, indent=1))
    for r in rows: print(f"{r['ratio']:9.3g}x  {r['name']}: {r['ours']:,.1f} against {r['theirs']:,.1f} {r['unit']}")

if __name__ == '__main__': main()
