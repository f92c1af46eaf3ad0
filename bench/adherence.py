"""How adherence grows with training, and how much it depends on the seed.

    python bench/adherence.py --n-images 4000 8000 20000 40000 80000 --seeds 0
    python bench/adherence.py --n-images 20000 --seeds 0 1 2

Every length is a run of the recipe `demo` of its own, with its own schedule, scored on the same prompts of held-out triples.
Runs lie under --run-dir and are resumed, not repeated; each call collects all that are done into bench/results/adherence.json."""
import argparse, datetime, json
from pathlib import Path
root = Path(__file__).resolve().parents[1]

def collect(folder):
    "All finished runs as rows, shortest first"
    rows = []
    for path in folder.glob('*/evaluation.json'):
        e, run = json.loads(path.read_text()), json.loads((path.parent/'run.json').read_text())
        a = e['adherence']
        rows.append(dict(name=f"adherence on held-out triples, {run['n_images']} images, seed {run['seed']}", ours=a['held_out'],
                         theirs=a['chance']['mean'], ratio=a['held_out']/a['chance']['mean'], unit='share of attributes', better='higher',
                         **run, std_error=a['std_error'], per_attribute=a['per_attribute'], all_six=a['all_six'],
                         open_entropy=e['open_entropy']['per_attribute'],
                         guidance_scale=e['guidance_scale'], n_scored=e['n_images'], device=e['device'], versions=e['versions'],
                         date=str(datetime.date.fromtimestamp(path.stat().st_mtime))))
    return sorted(rows, key=lambda r: (r['n_images'], r['seed']))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/adherence'))
    p.add_argument('--n-images', type=int, nargs='*', default=[], help='lengths of training, in images')
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--threads', type=int, default=0, help='0 leaves the choice to torch')
    args = p.parse_args()
    import torch
    if args.threads: torch.set_num_threads(args.threads)
    from t2i_nb.commands import train
    from t2i_nb.evaluation import evaluate_run
    for seed in args.seeds:
        for n in args.n_images:
            run = args.run_dir/f'{n}-{seed}'
            if (run/'evaluation.json').is_file(): continue
            done = train('demo', run, [f'train.n_images={n}', f'train.seed={seed}'])
            (run/'run.json').write_text(json.dumps(dict(n_images=n, seed=seed, seconds=done['seconds'], threads=torch.get_num_threads())))
            evaluate_run(run, n_training=0)
    rows = collect(args.run_dir)
    out = root/'bench'/'results'/'adherence.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    for r in rows: print(f"{r['n_images']:>7} images, seed {r['seed']}: {r['ours']:.3f} ± {r['std_error']:.3f} "
                         f"in {r['seconds']:.0f} s on {r['threads']} threads, worst {min(r['per_attribute'].values()):.3f}, "
                         f"open entropy {min(r['open_entropy'].values()):.3f}")

if __name__ == '__main__': main()
