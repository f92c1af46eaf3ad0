"""What following a run costs its training: the same steps without a tracker, and with an MLflow server that is killed and comes back.

    python bench/tracking.py

Linux, at least two cores: the training has one to itself, the server another, so that only what the follower takes from the training is
measured. In the middle third of a run the server is dead. Machines change their speed
by more than a follower takes, so the processor time of its thread is stated too. At a run's end the server must have every line of metrics.jsonl. Needs mlflow and
psutil. Writes bench/results/tracking.json."""
import argparse, datetime, json, os, signal, socket, statistics, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--n-images', type=int, default=2400)
    p.add_argument('--run', help='(train this run)')
    p.add_argument('--track', nargs='*', default=[])
    return p.parse_args()

def train_one(run, n_images, track):
    "A training of the recipe `demo` on drawn numbers, a line of metrics every step; prints its seconds"
    os.sched_setaffinity(0, {0})
    import torch
    import t2i_nb.tracking as tracking
    from t2i_nb.core import apply_overrides, find_recipe, load_config
    from t2i_nb.recipe import Components, RunConfig, TrainingData
    from t2i_nb.train import train_steps
    torch.set_num_threads(1)
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), [f'train.n_images={n_images}', 'train.device=cpu', 'train.precision=float32',
        'train.micro_batch=0', 'train.log_images=16', 'train.validation_images=800', 'train.checkpoint_images=800'])
    draw = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(shape, generator=draw).half()
    images = TrainingData(noise(512, 8, 8, 8), noise(512, 8, 8, 8).abs()/4, torch.arange(1, 513)[:, None], noise(513, 28, 128))
    work, took = tracking.keep_sending, [0.]
    def timed(*given):
        try: work(*given)
        finally: took[0] = time.thread_time()
    tracking.keep_sending = timed
    with tracking.follow(run, track, lambda text: print(text, file=sys.stderr)):
        for state in train_steps(cfg, Path(run), Components(None, None, None), images, images): pass
    print(state.seconds, took[0])

class Server:
    "`mlflow server` on another core"
    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); self.port = s.getsockname()[1]
    def start(self):
        words = [sys.executable, '-m', 'mlflow', 'server', '--backend-store-uri', f'sqlite:///{self.folder}/mlflow.db', '--artifacts-destination',
                 f'{self.folder}/artifacts', '--host', '127.0.0.1', '--port', str(self.port), '--workers', '1']
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                                        env=os.environ | dict(MLFLOW_DISABLE_TELEMETRY='true', MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false'),
                                        preexec_fn=lambda: os.sched_setaffinity(0, {1}))
    def wait(self):
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try: return urllib.request.urlopen(f'http://127.0.0.1:{self.port}/health', timeout=2)
            except OSError: time.sleep(.3)
    def kill(self): os.killpg(self.process.pid, signal.SIGKILL); self.process.wait()

def main():
    args = parse()
    if args.run: return train_one(args.run, args.n_images, args.track)
    os.sched_setaffinity(0, {1})
    import mlflow, torch
    from t2i_nb.evaluation import describe_device
    from t2i_nb.checkpoint import read_metrics
    box = Path(tempfile.mkdtemp())
    server, seconds, own, complete = Server(box), {'without': [], 'with': []}, [], []
    server.start(); server.wait()
    env = {**os.environ, 'MLFLOW_TRACKING_URI': f'http://127.0.0.1:{server.port}'}
    for k in range(args.rounds):
        for name in ('without', 'with') if k % 2 == 0 else ('with', 'without'):
            run = box/f'{name}-{k}'
            words = [sys.executable, __file__, '--run', str(run), '--n-images', str(args.n_images), *(['--track', 'mlflow'] if name == 'with' else [])]
            child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
            if name == 'with':
                lines = lambda: len(read_metrics(run))
                while lines() < args.n_images//48 and child.poll() is None: time.sleep(1)
                server.kill()
                while lines() < args.n_images//24 and child.poll() is None: time.sleep(1)
                server.start()
            took, follower = map(float, child.communicate()[0].split()[-2:])
            seconds[name].append(took)
            if name == 'with':
                own.append(follower)
                subprocess.run([sys.executable, '-m', 't2i_nb', 'track', str(run), '--to', 'mlflow'], cwd=root, env=env, check=True, capture_output=True)
                client = mlflow.MlflowClient(env['MLFLOW_TRACKING_URI'])
                noted = json.loads((run/'tracking.json').read_text())
                there = [m.step for m in client.get_metric_history(noted['mlflow']['run_id'], 'loss')]
                complete.append(there == [r['images_seen'] for r in read_metrics(run) if 'loss' in r])
            print(name, seconds[name][-1], complete, flush=True)
    server.kill()
    ratio = statistics.median(b/a for a, b in zip(seconds['without'], seconds['with']))
    row = dict(name='training time followed by MLflow, its server dead in the middle third, against none', ours=statistics.median(seconds['with']),
               theirs=statistics.median(seconds['without']), ratio=1/ratio, unit='s', better='lower', device=describe_device('cpu'),
               versions=dict(torch=torch.__version__, mlflow=mlflow.__version__), date=str(datetime.date.today()), rounds=seconds,
               follower_cpu_seconds=own, follower_share=statistics.median(f/s for f, s in zip(own, seconds['with'])), longer_by=ratio - 1, all_metrics_arrived=complete)
    (root/'bench'/'results'/'tracking.json').write_text(json.dumps([row], indent=1))
    print(json.dumps(row, indent=1))

if __name__ == '__main__': main()
