"""Is a model of emoji a better beginning for photographs of flowers than noise? How many images a warm start saves.

    python bench/warm_start.py --run-dir runs/warm_start

The recipe is that of bench/photographs.py: 128 pixels, the small pretrained VAE, MiniLM. A model is first trained on --emoji images of emoji ("a 3D render
of a sunflower"), then models are trained on photographs: cold ones from noise, warm ones from the emoji model's averaged weights (`train.init_from`), each a run
of its own length with its own schedule, and all with the same settings and seed. They are judged by KID (EfficientNet-lite0) between 240 of their images and
the test photographs that repeat no training photograph. The emoji's own images are not counted: one model serves many warm starts; the row names them. Needs
what bench/photographs.py needs. What is measured is remembered, so the same command goes on; about 40 minutes of one core. Writes bench/results/warm_start.json."""
import argparse, datetime, json, shutil, sys
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'bench'), str(root/'tests')]

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/warm_start'))
    p.add_argument('--emoji', type=int, default=6_000, help='images that the emoji model sees')
    p.add_argument('--cold', type=int, nargs='+', default=[6_000], help='images of the cold runs; the longest is the goal')
    p.add_argument('--warm', type=int, nargs='+', default=[3_000, 4_000], help='images of the warm runs')
    p.add_argument('--threads', type=int, default=0, help='0 leaves the choice to torch')
    return p.parse_args()

def overrides(data, vae, n, *more):
    "What differs from the recipe `folder`; without grids in between"
    from photographs import recipe
    return [*recipe(data, vae, n), f'train.checkpoint_images={n}', f'train.validation_images={n}', 'train.keep_checkpoints=1', *more]

def score(run, network, test):
    "KID of 240 images of a run, with its standard error, and its validation loss"
    import diffusers
    from t2i_nb.run import run_config
    from t2i_nb.evaluation import evaluate_generator
    from t2i_nb.sampling import sample_images
    from t2i_nb.pipeline import build_pipeline
    from t2i_nb.checkpoint import read_metrics
    from t2i_nb.recipe import load_components
    from t2i_nb.objective import Objective
    file = run/'score.json'
    if not file.is_file():
        whole = run_config(run) # diffusers cannot load the patched VAE by its name
        unet = diffusers.UNet2DConditionModel.from_pretrained(run/'pipeline'/'unet', low_cpu_mem_usage=False)
        pipeline, cfg = build_pipeline(unet.eval(), load_components(whole), Objective(whole.objective)), whole.sample
        def generate(prompts, seeds): return sample_images(pipeline, prompts, seeds, cfg.num_inference_steps, cfg.guidance_scale)
        kid = evaluate_generator(generate, 240, test, features='efficientnet-lite0').kid
        losses = [m['validation_loss'] for m in read_metrics(run) if 'validation_loss' in m]
        file.write_text(json.dumps(dict(kid=kid['mean'], kid_error=kid['std_error'], validation_loss=losses[-1])))
    return json.loads(file.read_text())

def main():
    args = parse()
    import torch
    if args.threads: torch.set_num_threads(args.threads)
    import conftest, taef2
    from t2i_nb.commands import train
    from t2i_nb.data import DataConfig
    from t2i_nb.evaluation import describe_device, load_feature_network
    from t2i_nb.scan import load_usable, without_near_copies
    flowers, emoji = conftest.data_dir/'flowers12', conftest.data_dir/'fluent_emoji'/'emoji_fluent3d_128_noflags_nosymbols.parquet'
    training = load_usable(DataConfig(source=str(flowers/'train.parquet'), size=128))
    test = without_near_copies(load_usable(DataConfig(source=str(flowers/'test.parquet'), size=128), 'test'), training)
    vae = args.run_dir/'vae'
    taef2.save_taef2(conftest.data_dir/'taef2_vae', vae, training.batch(range(256)).split(32))
    network, beginning = load_feature_network('efficientnet-lite0'), args.run_dir/f'emoji-{args.emoji}'
    train('folder', beginning, overrides(flowers, vae, args.emoji, f'data.source={emoji}', 'text.max_length=32'))
    points = []
    cache = args.run_dir/f'cold-{args.cold[0]}'/'cache' # of latents and text embeddings, which do not depend on the beginning
    for kind, n in [*(('cold', n) for n in args.cold), *(('warm', n) for n in args.warm)]:
        run = args.run_dir/(f'{kind}-{n}' if kind == 'cold' else f'{kind}-{n}-of-{args.emoji}')
        if cache.is_dir() and not (run/'cache').is_dir(): shutil.copytree(cache, run/'cache')
        train('folder', run, overrides(flowers, vae, n, *([f'train.init_from={beginning}'] if kind == 'warm' else [])))
        points.append(dict(start=kind, images=n, **score(run, network, test)))
        print(points[-1], flush=True)
    goal = next(p for p in points if p['images'] == max(args.cold) and p['start'] == 'cold')
    there = [p for p in points if p['start'] == 'warm' and p['kid'] <= goal['kid']]
    first = min(there, key=lambda p: p['images'], default=None)
    row = dict(name=f"images until a warm start reaches the KID of {goal['images']:,} from noise", ours=first and first['images'], theirs=goal['images'],
               ratio=first and goal['images']/first['images'], unit='images', better='lower', target=2, goal=goal, points=points, emoji_images=args.emoji,
               test_photographs=len(test), device=describe_device('cpu'), versions=dict(torch=torch.__version__), date=str(datetime.date.today()), threads=torch.get_num_threads(),
               note=None if first else 'no warm run of these lengths reached it')
    (root/'bench'/'results'/'warm_start.json').write_text(json.dumps([row], indent=1))
    print(json.dumps(row, indent=1))

if __name__ == '__main__': main()
