"""How long it takes until images follow their prompts: our recipe `demo` against diffusers' own script `train_text_to_image.py`.

    python bench/time_to_adherence.py --script train_text_to_image.py --commit 58eb52c0803ea9af3abec60841c2a093bdf1f951

--script, --commit and --extra-path are as for bench/train.py, which makes the frozen parts, the new UNet and the images that the script gets, and the stand-in
for torchvision. The goal is --goal, the share of attributes of 256 held-out prompts that the shipped reader finds in the images.

Ours: `t2i train demo` for each of --lengths, each a run of its own with its own schedule, shortest first, until one reaches the goal. Its seconds are those of the
whole process: drawing the flowers, encoding them once, training, validation, checkpoints and the pipeline.

The script: noise prediction, uniform timesteps, no EMA, a constant rate, batches as large as ours. Each of --rates is trained for --first images; the rate whose
images follow 256 seen prompts best goes on from its checkpoint until its seconds are --times those of ours, or the goal is reached, and is scored at every
--every images. Its seconds are those of its steps alone.

Both are drawn with DPM-Solver++, ours with the 12 steps of its recipe and the script's with 25, and with the guidance of 1, 1.25, 1.5, 2 and 3 that follows seen
prompts best: nothing but adherence is asked for here.

Seconds are processor seconds of one thread; other processes lengthen them by up to a fifth. What is measured is remembered in --work-dir, so the same command
goes on. Writes bench/results/time_to_adherence.json. About two hours of one core."""
import argparse, datetime, hashlib, json, os, shutil, subprocess, sys, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'bench')]
from train import accelerate_version, follow_script, make_part
SCALES, STEPS, BATCH = (1., 1.25, 1.5, 2., 3.), 25, 16

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--script', type=Path, required=True)
    p.add_argument('--commit', required=True)
    p.add_argument('--extra-path', type=Path)
    p.add_argument('--goal', type=float, default=.85)
    p.add_argument('--lengths', type=int, nargs='+', default=[4_000, 6_000, 8_000, 10_000, 12_000], help='of ours, in images')
    p.add_argument('--rates', nargs='+', default=['1e-4', '3e-4', '1e-3'])
    p.add_argument('--first', type=int, default=16_000, help='images after which a rate is chosen')
    p.add_argument('--every', type=int, default=16_000, help='images between scores')
    p.add_argument('--times', type=float, default=10., help="how many times our seconds the script gets")
    p.add_argument('--n-scored', type=int, default=256)
    p.add_argument('--n-seen', type=int, default=64, help='seen prompts that choose the guidance of later checkpoints')
    p.add_argument('--work-dir', type=Path, default=Path('runs/time_to_adherence'))
    p.add_argument('--out', type=Path, default=root/'bench'/'results'/'time_to_adherence.json')
    p.add_argument('--train', nargs=2, help=argparse.SUPPRESS)
    p.set_defaults(threads=1)
    return p.parse_args()

def remember(args, key, compute):
    "What is known under `key`, in a file of its own"
    file = args.work_dir/'points'/f'{key}.json'
    if not file.is_file():
        known = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1))
        print(key, json.dumps(known)[:160], flush=True)
    return json.loads(file.read_text())

def follow(pipeline, n_scored, scales, steps, n_seen):
    "Adherence to held-out prompts with the guidance that follows seen prompts best"
    import torch
    from t2i_nb.classifier import load_classifier, read_attributes
    from t2i_nb.evaluation import adherence, score_prompts
    from t2i_nb.sampling import draw, make_generators
    def score(scale, held_out, purpose, n):
        prompts, asked, seeds = score_prompts(n, held_out, purpose=purpose)
        x = [draw(pipeline, prompts[i:i + 16], make_generators(seeds[i:i + 16]), steps, scale, sampler='dpmpp_2m') for i in range(0, n, 16)]
        found = adherence(asked, read_attributes(load_classifier(), torch.cat(x).clamp(-1, 1)))
        return {k: found[k] for k in ('mean', 'std_error', 'all_six')}
    seen = {s: score(s, False, 'validation', n_seen)['mean'] for s in scales}
    best = max(seen, key=seen.get)
    return score(best, True, 'test', n_scored) | dict(guidance_scale=best, seen=seen[best])

def train_ours(args, length):
    "A whole run of ours in a process of its own, and its score"
    run = args.work_dir/'ours'/str(length)
    words = [sys.executable, __file__, '--script', args.script, '--commit', args.commit, '--train', run, length]
    done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    from t2i_nb.core import load_config
    from t2i_nb.pipeline import load_pipeline
    from t2i_nb.recipe import RunConfig
    cfg = load_config(run/'config.yaml', RunConfig)
    return json.loads(done.stdout.splitlines()[-1]) | follow(load_pipeline(run), args.n_scored, SCALES, cfg.sample.num_inference_steps, args.n_seen)

def train_here(run, length):
    "`t2i train demo` in this process, timed"
    import torch
    from t2i_nb.commands import train
    torch.set_num_threads(1)
    shutil.rmtree(run, ignore_errors=True) # a half of a run would look cheap
    begun = time.process_time()
    train('demo', Path(run), [f'train.n_images={length}', 'train.device=cpu', 'train.precision=float32'])
    print(json.dumps(dict(seconds=time.process_time() - begun)))

def run_script(args, rate, images):
    "Train with the script up to so many images, from its newest checkpoint; processor seconds of its steps"
    marks, _ = follow_script(args, args.script, args.work_dir/'tiny', 64, BATCH, images//BATCH, args.work_dir/'script'/rate, '--learning_rate', rate,
                             '--lr_scheduler', 'constant', '--checkpointing_steps', args.every//BATCH, '--resume_from_checkpoint', 'latest')
    (a, (_, first)), (b, (_, last)) = min(marks.items()), max(marks.items())
    return dict(seconds_per_image=(last - first)/(b - a)/BATCH, steps=b - a)

def score_script(args, rate, images):
    "The score of a checkpoint of the script"
    import diffusers
    folder, unet = args.work_dir/'tiny'/'models', args.work_dir/'script'/rate/f'checkpoint-{images//BATCH}'/'unet'
    unet = diffusers.UNet2DConditionModel.from_pretrained(unet, low_cpu_mem_usage=False)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, unet=unet, safety_checker=None, feature_extractor=None, low_cpu_mem_usage=False)
    return follow(pipeline, args.n_scored, SCALES, STEPS, args.n_scored if images == args.first else args.n_seen)

def measure_ours(args):
    "The runs of ours until one reaches the goal"
    found = []
    for length in sorted(args.lengths):
        found.append(remember(args, f'ours-{length}', lambda: train_ours(args, length)) | dict(images=length))
        if found[-1]['mean'] >= args.goal: return found
    sys.exit(f'no length of ours reaches {args.goal}: {found}')

def measure_script(args, allowed):
    "What each rate reaches at first, and what the best does until the goal or until it has had `allowed` seconds"
    def train(rate, n): return remember(args, f'script-{rate}-{n}', lambda: run_script(args, rate, n))
    def score(rate, n): return remember(args, f'score-{rate}-{n}', lambda: score_script(args, rate, n))
    speed = lambda rate: train(rate, args.first)['seconds_per_image']
    first = {r: (train(r, args.first), score(r, args.first))[1] for r in args.rates}
    best = max(first, key=lambda r: first[r]['seen'])
    curve, n = [first[best] | dict(images=args.first, seconds=args.first*speed(best))], args.first
    while curve[-1]['mean'] < args.goal and curve[-1]['seconds'] < allowed:
        n += args.every
        seconds = curve[-1]['seconds'] + args.every*train(best, n)['seconds_per_image']
        curve.append(score(best, n) | dict(images=n, seconds=seconds))
    return first, best, curve

def main():
    args = parse()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.train: return train_here(*args.train)
    import diffusers, torch, transformers
    torch.set_num_threads(1)
    for kind in (diffusers, transformers): kind.utils.logging.disable_progress_bar(); kind.utils.logging.set_verbosity_error()
    from t2i_nb.evaluation import describe_device
    made = remember(args, 'made', lambda: make_part('tiny', args.work_dir/'tiny'))
    ours = measure_ours(args)
    first, best, curve = measure_script(args, args.times*ours[-1]['seconds'])
    reached, mine, last = curve[-1]['mean'] >= args.goal, ours[-1], curve[-1]
    row = dict(name=f'processor seconds until {args.goal:g} of the attributes of held-out prompts are right', ours=mine['seconds'], theirs=last['seconds'],
               ratio=last['seconds']/mine['seconds'], unit='CPU s', better='lower', part='time_to_adherence', target=10, against='train_text_to_image.py of diffusers',
               reached=reached, note=f"the script {'reached' if reached else 'had not reached'} the goal then, so the ratio is {'measured' if reached else 'a lower bound'}",
               our_runs=ours, first=first, rate=best, curve=curve, batch=BATCH, script_steps=STEPS, scales=SCALES, n_scored=args.n_scored, threads=1, precision='fp32',
               device=describe_device('cpu'), date=str(datetime.date.today()), script_commit=args.commit, script_sha256=hashlib.sha256(args.script.read_bytes()).hexdigest(),
               stand_ins=['torchvision.transforms'], versions=dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__,
               accelerate=accelerate_version(args)), **{k: made[k] for k in ('unet_parameters', 'vae_parameters', 'text_encoder_parameters', 'images')})
    args.out.write_text(json.dumps([row], indent=1))
    print(json.dumps({k: v for k, v in row.items() if k not in ('versions', 'scales')}, indent=1))

if __name__ == '__main__': main()
