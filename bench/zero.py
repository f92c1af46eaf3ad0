"""What each of two processes holds at ZeRO stages 0, 1 and 2, beside the formula: the network of the recipe `flowers128`, one image.

    python bench/zero.py

Needs DeepSpeed. Counts the bytes of all tensors that are alive in a process (each storage once): between the two micro-batches of a
step and after its last backward pass, of which the greater is stated, and after the step. Activations are gone by then, and the EMA, which every rank holds besides, is
left out on both sides. Writes bench/results/zero.json."""
import argparse, datetime, gc, json, os, subprocess, sys, warnings
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--recipe', default='flowers128')
    p.add_argument('--stage', type=int, help='(a worker of this stage)')
    return p.parse_args()

def alive():
    "Bytes of all tensors of this process"
    import torch
    gc.collect()
    warnings.simplefilter('ignore') # some objects warn when they are looked at
    tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.layout == torch.strided}.values())

def worker(recipe, stage):
    import torch
    from dataclasses import replace
    from t2i_nb.core import find_recipe, load_config
    from t2i_nb.engine import EngineConfig, join_ranks, make_engine
    from t2i_nb.recipe import RunConfig
    from t2i_nb.unet import build_unet
    torch.set_num_threads(1)
    cfg, ranks = load_config(find_recipe(recipe), RunConfig), join_ranks()
    size, width = 16, 768
    before = alive()
    unet = build_unet(cfg.unet, size, 4, width, 0).train()
    engine = make_engine(replace(EngineConfig(zero_stage=stage, device='cpu'), global_batch=4, micro_batch=1), unet, torch.float32, ranks)
    seen = []
    def part(k):
        seen.append(alive() - before)
        x, states = torch.randn(1, 4, size, size), torch.randn(1, 8, width)
        return (unet(x, torch.tensor([500.]), states).sample - x).square().mean()/4
    if stage: # at the end of the last backward pass
        step = engine.zero.step
        engine.zero.step = lambda *a, **k: (seen.append(alive() - before), step(*a, **k))[1]
    else:
        step = engine.optimizer.step
        engine.optimizer.step = lambda *a, **k: (seen.append(alive() - before), step(*a, **k))[1]
    for _ in range(2): engine.step(part, range(2*ranks.rank, 2*ranks.rank + 2)) # the moments are there from the second on
    numbers = dict(weights=sum(p.numel() for p in unet.parameters()), held=max(seen[-2:]), after_step=alive() - before)
    if ranks.is_main: Path(os.environ['T2I_ZERO_OUT']).write_text(json.dumps(numbers))

def main():
    args = parse()
    if args.stage is not None: return worker(args.recipe, args.stage)
    import deepspeed, tempfile, torch
    from t2i_nb.engine import zero_bytes
    from t2i_nb.evaluation import describe_device
    rows = []
    for stage in (0, 1, 2):
        out = Path(tempfile.mkdtemp())/'out.json'
        launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', __file__]
        subprocess.run([*launch, '--recipe', args.recipe, '--stage', str(stage)], check=True, env={**os.environ, 'T2I_ZERO_OUT': str(out), 'OMP_NUM_THREADS': '1'})
        r = json.loads(out.read_text())
        n = r['weights']
        formula = sum(zero_bytes(n, stage, 2).values())
        rows.append(dict(name=f'bytes held by each of two processes, ZeRO stage {stage}', stage=stage, recipe=args.recipe, weights=n, held=r['held'],
                         formula=formula, gradients=r['held'] - r['after_step'], after_step=r['after_step'], ours=r['held'],
                         theirs=rows[0]['held'] if rows else r['held'], ratio=(rows[0]['held'] if rows else r['held'])/r['held'], unit='bytes',
                         better='lower', device=describe_device('cpu'), versions=dict(torch=torch.__version__, deepspeed=deepspeed.__version__),
                         date=str(datetime.date.today())))
        print(rows[-1], flush=True)
    (root/'bench'/'results'/'zero.json').write_text(json.dumps(rows, indent=1))

if __name__ == '__main__': main()
