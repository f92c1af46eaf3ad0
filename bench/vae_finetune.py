"""Fine-tune the shipped VAE on photographs, and prove that a model trained afterwards uses the new weights.

    python bench/vae_finetune.py --run-dir runs/vae_finetune
    python bench/vae_finetune.py --run-dir runs/vae_finetune_128 --size 128 --start runs/vae_finetune/vae --n-images 6000 --lr 7e-4

Needs the test data (`tests/conftest.py` says where it is looked for): `flowers12`, 720 photographs to train on, 240 to score it on,
without those that are near duplicates of training photographs. The test photographs are read at the end only; nothing is chosen
by them. Resumable: the same command goes on. The second command goes on at 128 pixels, for `bench/photographs.py`. Writes
bench/results/vae_finetune.json (or vae_finetune_128.json), and in the run directory the fine-tuned VAE and images before and after."""
import argparse, datetime, json, sys
from dataclasses import replace
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests'), str(root/'bench')]

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/vae_finetune'))
    p.add_argument('--n-images', type=int, default=24_000, help='images to train on in all')
    p.add_argument('--size', type=int, default=64, help='pixels along each side')
    p.add_argument('--lr', type=float, default=1.5e-3)
    p.add_argument('--start', default='tiny', help='VAE to fine-tune')
    p.add_argument('--views', type=int, default=8, help='crops of each photograph, every second one mirrored')
    p.add_argument('--feature-weight', type=float, default=0., help='of the distance between EfficientNet-lite0 maps')
    p.add_argument('--threads', type=int, default=0, help='0 leaves the choice to torch')
    return p.parse_args()

def check_use(
    folder, # the fine-tuned VAE
    start,  # what it was fine-tuned from
    data,   # train.parquet
    size,   # pixels along each side
    run_dir # gets two runs
):          # hashes, all of which a test can repeat
    "Two steps of training with each VAE: what lies in pipeline/vae, and which latents were cached"
    from t2i_nb.commands import train
    from t2i_nb.core import weights_digest
    from t2i_nb.vae import VAEConfig, load_vae
    out = dict(fine_tuned=weights_digest(load_vae(VAEConfig(str(folder)))), start=weights_digest(load_vae(VAEConfig(start))))
    for name, vae in (('fine_tuned', str(folder)), ('start', start)):
        run = run_dir/f'use-{name}'
        train('folder', run, [f'data.source={data}', f'data.size={size}', f'vae.name={vae}', 'text.encoder=tiny', 'text.max_length=0', 'unet.width=16',
                              'unet.attention_size=8', 'train.n_images=16', 'train.global_batch=8', 'train.warmup_images=8', 'train.log_images=8',
                              'train.validation_images=16', 'train.checkpoint_images=16', 'sample.num_inference_steps=2'])
        out[f'pipeline_{name}'] = weights_digest(load_vae(VAEConfig(str(run/'pipeline'/'vae'))))
        out[f'cache_{name}'] = sorted(p.stem for p in (run/'cache').glob('latents-*'))
    return out

def main():
    args = parse()
    import diffusers, torch
    if args.threads: torch.set_num_threads(args.threads)
    import conftest
    from t2i_nb.core import image_grid
    from t2i_nb.data import DataConfig
    from t2i_nb.evaluation import describe_device
    from t2i_nb.scan import load_usable, without_near_copies
    from t2i_nb.vae import VAEConfig, load_vae, round_trip
    from t2i_nb.vae_train import VAETrainConfig, make_vae
    flowers, run = conftest.data_dir/'flowers12', args.run_dir
    run.mkdir(parents=True, exist_ok=True)
    one = DataConfig(source=str(flowers/'train.parquet'), size=args.size, validation_fraction=0., crop='random')
    parts = [load_usable(replace(one, seed=i), memo=run/'images.json') for i in range(args.views)]
    pixels = torch.cat([((d.batch(range(len(d)), flip=i % 2 == 1) + 1)*127.5).round().byte() for i, d in enumerate(parts)])
    recipe = VAETrainConfig(args.n_images, lr=args.lr, kl_weight=5e-4, kl_warmup=.25, feature_weight=args.feature_weight)
    states = []
    def report(state):
        states.append({k: v for k, v in state.items() if k != 'ema'})
        print(json.dumps(states[-1]), flush=True)
    start = load_vae(VAEConfig(args.start))
    made = make_vae(run/'vae', VAEConfig(args.start), recipe, pixels, report=report)
    log = run/'log.json'
    known = json.loads(log.read_text()) if log.is_file() else []
    states = known + [s for s in states if s['images_seen'] > max([o['images_seen'] for o in known], default=0)]
    log.write_text(json.dumps(states))

    given, whole = (load_usable(DataConfig(source=str(flowers/f'{k}.parquet'), size=128), 'test') for k in ('test', 'train'))
    test = without_near_copies(given, whole)
    test.cfg = replace(test.cfg, size=args.size)
    images, tuned = test.batch(range(len(test))), load_vae(VAEConfig(str(run/'vae')))
    before, after = (round_trip(v, images.split(60)) for v in (start, tuned))
    some = images[::30]
    with torch.no_grad(): image_grid(torch.cat([some, *(v.decode(v.encode(some).latent_dist.mean).sample for v in (start, tuned))])).save(run/'grid.png')
    used = check_use(run/'vae', args.start, flowers/'train.parquet', args.size, run)
    assert used['fine_tuned'] == used['pipeline_fine_tuned'] != used['start'] == used['pipeline_start'], used
    assert used['cache_fine_tuned'] and not set(used['cache_fine_tuned']) & set(used['cache_start']), used
    units = dict(psnr=('dB', 'higher'), ssim=('SSIM', 'higher'), mse=('squared error, values in [-1, 1]', 'lower'), kl=('nats per image', 'neither'))
    facts = dict(n_images=args.n_images, size=args.size, test_photographs=len(test), near_copies=len(given) - len(test), training_photographs=len(parts[0]), views=args.views, training=made, seconds=made['seconds'])
    rows = [dict(name=f'{k} of test photographs at {args.size} pixels, fine-tuned against {"as shipped" if args.start == "tiny" else "before"}', ours=after[k], theirs=before[k],
                 ratio=before[k]/after[k] if k in ('mse', 'kl') else after[k]/before[k], unit=unit, better=better, device=describe_device('cpu'),
                 versions=dict(torch=torch.__version__, diffusers=diffusers.__version__), date=str(datetime.date.today()),
                 threads=torch.get_num_threads(), **facts) for k, (unit, better) in units.items()]
    rows[0] |= dict(psnr_gain=after['psnr'] - before['psnr'], curve=[{k: s[k] for k in ('images_seen', 'mse', 'kl', 'lr', 'beta')} for s in states], used=used)
    out = root/'bench'/'results'/f'vae_finetune{"" if args.size == 64 else f"_{args.size}"}.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    for r in rows: print(f"{r['name']}: {r['theirs']:.4f} -> {r['ours']:.4f} {r['unit']}")
    print(json.dumps(used, indent=1))

if __name__ == '__main__': main()
