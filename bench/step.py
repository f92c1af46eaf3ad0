"""Where the time of one training step goes, how much of it is arithmetic, and what checkpoints cost: the recipe `demo` on this CPU.

    python bench/step.py

One thread computes the recipe's micro-batches one after the other, so that the operations of torch's profiler add up; then the same
step as a run takes it (micro-batches side by side) is compared with the speed of large matrix products (`engine.probe`, MFU). A save is
timed five times and set against the time between two. Writes bench/results/step.json."""
import argparse, datetime, json, statistics, sys, tempfile, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))
KINDS = {'convolutions': ('conv',), 'matrix products': ('::mm', 'addmm', 'bmm', 'linear', 'matmul'), 'attention': ('scaled_dot_product',),
         'normalisation': ('group_norm', 'layer_norm', 'native_norm'), 'AdamW': ('_fused_adamw',),
         'EMA, clipping': ('_foreach', 'linalg_vector_norm', 'lerp')}

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=8)
    return p.parse_args()

def main():
    args = parse()
    import torch
    from t2i_nb.core import apply_overrides, find_recipe, load_config
    from t2i_nb.evaluation import describe_device
    from t2i_nb.recipe import RunConfig, TrainingData
    from t2i_nb.train import make_trainer, train_step, update_ema
    from t2i_nb.engine import Ranks
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), ['train.device=cpu', 'train.precision=float32'])
    t, draw = cfg.train, torch.Generator().manual_seed(0)
    def noise(*shape): return torch.randn(shape, generator=draw).half()
    images = TrainingData(noise(512, 8, 8, 8), noise(512, 8, 8, 8).abs()/4, torch.arange(1, 513)[:, None], noise(513, 28, 128))
    run = Path(tempfile.mkdtemp())
    for folder in ('checkpoints', 'samples'): (run/folder).mkdir()
    trainer = make_trainer(cfg, run, object(), images, images, Ranks())
    engine, state = trainer.engine, trainer.state
    def step(k):
        train_step(engine, trainer.objective, images, t, k*t.global_batch)
        update_ema(state.ema, state.unet, t.ema_decay, 1)
    pool, threads = engine.pool, torch.get_num_threads()
    engine.pool = None
    torch.set_num_threads(1)
    for k in range(2): step(k)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for k in range(args.steps): step(k)
        wall = time.perf_counter() - start
    share, everything = dict.fromkeys([*KINDS, 'all else'], 0.), 0.
    for event in profile.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), 'all else')
        share[kind] += event.self_cpu_time_total
        everything += event.self_cpu_time_total
    share = {k: v/everything for k, v in share.items()}
    engine.pool = pool
    torch.set_num_threads(threads)
    saves = []
    for _ in range(5):
        start = time.perf_counter()
        trainer.save()
        saves.append(time.perf_counter() - start)
    probes = [trainer.predict() for _ in range(3)]
    best = max(probes, key=lambda p: p.mfu)
    between = t.checkpoint_images/best.images_per_second
    row = dict(name='training speed of the recipe demo, against large matrix products alone', ours=best.images_per_second, theirs=best.attainable,
               ratio=best.mfu, unit='images/s', better='higher', device=describe_device('cpu'),
               versions=dict(torch=torch.__version__), date=str(datetime.date.today()), threads=threads, share=share, profiled_seconds=wall/args.steps,
               mfu=[p.mfu for p in probes], flops=best.flops, gflops_per_second=best.flops*best.images_per_second/1e9,
               save_seconds=statistics.median(saves), seconds_between_saves=between, save_share=statistics.median(saves)/between)
    (root/'bench'/'results'/'step.json').write_text(json.dumps([row], indent=1))
    print(json.dumps(row, indent=1))

if __name__ == '__main__': main()
