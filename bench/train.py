"""Our training loop against diffusers' own script `train_text_to_image.py`: images per second, and their ratio.

    python bench/train.py --script train_text_to_image.py --commit 58eb52c0803ea9af3abec60841c2a093bdf1f951
    python bench/train.py --script ... --commit ... --extra-path accelerate_folder --what tiny cached --rounds 1

--script is the unmodified file examples/text_to_image/train_text_to_image.py of huggingface/diffusers, --commit where it was taken
from. It needs `datasets` and `tensorboard` beside our own requirements, and `accelerate`, which may lie in a folder of its own
(`pip install --no-deps --target FOLDER accelerate`, then --extra-path FOLDER). Three parts, any of which --what selects:

tiny     the recipe `demo` as it is, and again with a batch of 32; the script gets the same UNet, VAE and text encoder, fp32
real     frozen parts of real size with random weights (CLIP ViT-L/14's text half, Stable Diffusion's VAE), 128 pixels, a UNet of
         16.7 M that attends at all three levels; real_lean, only when asked for: one as large that attends at the lowest alone
cached   the recipe `demo`, and the script patched at run time to read our caches from memory, so that only the loops differ

Every measurement is a process of its own with --threads threads, from one mark to another in the middle of a run: start-up, warm-up,
validation and checkpoints of both lie outside, and so does the making of our cache, which is reported beside. The script's steps are
timed by its own progress bar as it arrives here, ours by the states that `t2i_nb.train.train` yields. The ways take turns, forwards and
backwards; a ratio is taken in each round, the median counts. Ours keeps an average of the weights (EMA), drops captions and guards
against spikes in every step; the script runs without --use_ema, and logs to tensorboard in a temporary folder. Its images are the
same ones as PNG files.

torchvision is not needed: the script gets a stand-in for the few transforms that it uses, written here in Pillow and torch, from a
small runner that shows it to nobody else. Nothing else is replaced. What is measured is remembered in --work-dir, under a name made of
script, library, versions and settings: the same command goes on. Writes bench/results/train.json; rows of parts that were not asked
for stay. About 25 minutes on two quiet CPU cores."""
import argparse, datetime, hashlib, json, os, re, shutil, statistics, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root))

STAND_IN = '''# stands in for torchvision.transforms: what train_text_to_image.py uses of it
import random
import numpy as np, torch
from PIL import Image, ImageOps
class InterpolationMode: BICUBIC, BILINEAR, LANCZOS, NEAREST = map(Image.Resampling, (3, 2, 1, 0))
def Lambda(f): return f
def Compose(parts):
    def run(x):
        for p in parts: x = p(x)
        return x
    return run
def Resize(size, interpolation):
    def run(image):
        short = min(image.size)
        return image if short == size else image.resize([int(size*o/short) for o in image.size], interpolation)
    return run
def crop(size, share): # like torchvision, whose crops of the right size are no work
    def run(image):
        if image.size == (size, size): return image
        x, y = (round((o - size)*share()) for o in image.size)
        return image.crop((x, y, x + size, y + size))
    return run
def CenterCrop(size): return crop(size, lambda: .5)
def RandomCrop(size): return crop(size, random.random)
def RandomHorizontalFlip(): return lambda image: ImageOps.mirror(image) if random.random() < .5 else image
def ToTensor(): return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
def Normalize(mean, std): return lambda x: x.sub_(mean[0]).div_(std[0])
'''
RUNNER = '''# the stand-in goes onto the path when everything else has looked for torchvision and gone without it
import os, runpy, sys
import datasets, transformers.image_utils
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
sys.path.insert(0, os.environ['STAND_IN'])
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
PATCHES = { # each of these texts occurs once in the script
    'train_dataset = dataset["train"].with_transform(preprocess_train)': 'train_dataset = CachedPairs()',
    'pixel_values = torch.stack([example["pixel_values"] for example in examples])': 'pixel_values = torch.stack([x for x, _ in examples])',
    'input_ids = torch.stack([example["input_ids"] for example in examples])': 'input_ids = torch.stack([s for _, s in examples]).float()',
    'latents = vae.encode(batch["pixel_values"].to(weight_dtype)).latent_dist.sample()': 'latents = batch["pixel_values"]',
    'latents = latents * vae.config.scaling_factor': 'pass # the cache holds scaled latents',
    'text_encoder(batch["input_ids"], return_dict=False)[0]': 'batch["input_ids"]',
    'logger = get_logger(__name__, log_level="INFO")\n': '''logger = get_logger(__name__, log_level="INFO")
class CachedPairs:
    def __init__(self):
        from safetensors.torch import load_file
        self.all = load_file(os.environ["CACHED_PAIRS"])
    def __len__(self): return len(self.all["mean"])
    def __getitem__(self, i): return self.all["mean"][i], self.all["states"][self.all["rows"][i]]
'''}
STEPS = dict(tiny=dict(ours=(20, 200), script=(5, 40), cached=(10, 80)), real=dict(ours=(4, 24), script=(1, 4))) # warm-up, measured
TARGETS = dict(train_real_frozen=20, train_tiny_cached_script=1.3)
UNETS = dict(real=dict(attention_size=16, overrides=dict(block_out_channels=[60, 120, 240])),
             real_lean=dict(attention_size=4, overrides={}))
NAMES = dict(tiny='train_tiny', real='train_real_frozen', real_lean='train_real_frozen_lean', cached='train_tiny_cached_script')
REAL = dict(n_images=64, size=128)

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--script', type=Path, required=True, help='train_text_to_image.py of diffusers, unmodified')
    p.add_argument('--commit', required=True, help='commit of huggingface/diffusers that it was taken from; only recorded')
    p.add_argument('--extra-path', type=Path, help='folder with accelerate, if it is not installed')
    p.add_argument('--what', nargs='+', choices=NAMES, default=['tiny', 'real', 'cached'])
    p.add_argument('--batches', type=int, nargs='+', default=[16, 32], help='of tiny and cached')
    p.add_argument('--real-batches', type=int, nargs='+', default=[8, 16])
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--steps', type=float, default=1., help='multiplies the measured steps; less is for trying out')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--work-dir', type=Path, default=Path('runs/train_bench'))
    p.add_argument('--out', type=Path, default=root/'bench'/'results'/'train.json')
    p.add_argument('--one', nargs='+', help=argparse.SUPPRESS)
    return p.parse_args()

def recipe(part, folder, batch):
    "What ours trains: `demo` in fp32, or the same loop on models of real size"
    from t2i_nb.run import read_recipe
    cfg = read_recipe('demo', ['train.device=cpu', 'train.precision=float32', f'train.global_batch={batch}',
                               f'train.micro_batch={batch//2}'])
    if part == 'tiny': return cfg
    models = str(folder/'models')
    return replace(cfg, data=replace(cfg.data, size=REAL['size'], n_images=REAL['n_images']), text=replace(cfg.text, encoder=models),
                   vae=replace(cfg.vae, name=models + '/vae'), unet=replace(cfg.unet, **UNETS[part]))

def make_models(part, folder):
    "The frozen parts and a new UNet as a diffusers pipeline in fp32, with the scheduler that the script wants"
    import diffusers, torch, transformers
    from t2i_nb.captions import load_text_encoder
    from t2i_nb.core import keyed_seed
    from t2i_nb.recipe import Components, load_components
    from t2i_nb.unet import build_unet, count_parameters
    cfg = recipe(part, folder, 16)
    if part == 'tiny': models = load_components(cfg)
    else:
        tokenizer = load_text_encoder()[0]
        tokenizer.model_max_length = 77
        ids = {f'{k}_token_id': getattr(tokenizer, f'{k}_token_id') for k in ('bos', 'eos', 'pad')}
        text = transformers.CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                           num_attention_heads=12, max_position_embeddings=77, projection_dim=768, **ids)
        vae = diffusers.AutoencoderKL(down_block_types=['DownEncoderBlock2D']*4, up_block_types=['UpDecoderBlock2D']*4, layers_per_block=2,
                                      block_out_channels=(128, 256, 512, 512), latent_channels=4, sample_size=512, scaling_factor=.18215)
        models = Components(tokenizer, transformers.CLIPTextModel(text), vae)
    latents, factor = models.vae.config.latent_channels, 2**(len(models.vae.config.block_out_channels) - 1)
    side, width = cfg.data.size//factor, models.text_encoder.config.hidden_size
    unet = build_unet(cfg.unet, side, latents, width, keyed_seed(cfg.train.seed, 'weights'))
    pipeline = diffusers.StableDiffusionPipeline(
        vae=models.vae, text_encoder=models.text_encoder, tokenizer=models.tokenizer, unet=unet, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, scheduler=diffusers.DDPMScheduler(steps_offset=1, clip_sample=False))
    pipeline.to('cpu', torch.float32).save_pretrained(folder/'models')
    count = {k: count_parameters(getattr(models, k)) for k in ('text_encoder', 'vae')}
    return dict(unet_parameters=count_parameters(unet), text_encoder_parameters=count['text_encoder'], vae_parameters=count['vae'],
                tokens=models.tokenizer.model_max_length, latents=[latents, side, side])

def cpu_seconds(pid):
    "What a running process has used of the processors so far; 0 where there is no /proc"
    try: fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    except (OSError, IndexError): return 0.
    return (int(fields[11]) + int(fields[12]))/os.sysconf('SC_CLK_TCK')

def make_part(part, folder):
    "Models, images for the script, and our cache, timed; prints JSON"
    import torch
    from safetensors.torch import save_file
    from t2i_nb.run import quiet_loading
    from t2i_nb.sources import load_dataset
    from t2i_nb.recipe import load_components, prepare_data
    quiet_loading()
    facts, cfg = make_models(part, folder), recipe(part, folder, 16)
    (folder/'images').mkdir(exist_ok=True)
    dataset = load_dataset(cfg.data)
    for i in range(len(dataset)): dataset.image(i).save(folder/'images'/f'{i:05d}.png')
    lines = [json.dumps(dict(file_name=f'{i:05d}.png', text=c)) for i, c in enumerate(dataset.captions)]
    (folder/'images'/'metadata.jsonl').write_text('\n'.join(lines) + '\n')
    shutil.rmtree(folder/'cache', ignore_errors=True)
    models, begun = load_components(cfg), time.perf_counter()
    data = prepare_data(cfg, models, 'train', folder/'cache')
    seconds = time.perf_counter() - begun
    pairs = dict(mean=data.mean[:].float(), states=torch.as_tensor(data.states[:]), rows=data.rows[:, 0])
    save_file({k: v.contiguous() for k, v in pairs.items()}, folder/'pairs.safetensors')
    return facts | dict(images=len(data), cache_seconds=seconds)

def run_ours(part, folder, batch, warm, measured):
    "Seconds between two marks of `t2i_nb.train.train`"
    from t2i_nb.run import quiet_loading
    from t2i_nb.recipe import load_components, prepare_data
    from t2i_nb.train import train_steps
    quiet_loading()
    cfg = recipe(part, folder, batch)
    models = load_components(cfg)
    data = prepare_data(cfg, models, 'train', folder/'cache')
    with tempfile.TemporaryDirectory() as run_dir:
        states = train_steps(cfg, Path(run_dir), models, data, data)
        for state in states:
            if state.step == warm: begun, cpu = time.perf_counter(), time.process_time()
            if state.step == warm + measured: break
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        states.close()
        assert not state.skipped and state.loss < 10, state.loss
    return dict(seconds=seconds, cpu_seconds=cpu, loss=state.loss)

def follow_script(args, script, folder, size, batch, steps, out, *more):
    "Run the script; when each step was done, by its own progress bar ({step: (wall clock, processor seconds)}), and the end of what it said"
    with tempfile.TemporaryDirectory() as temp:
        temp, folder = Path(temp), folder.resolve()
        (temp/'path'/'torchvision').mkdir(parents=True)
        (temp/'run.py').write_text(RUNNER)
        (temp/'path'/'torchvision'/'transforms.py').write_text(STAND_IN)
        env = os.environ | dict(PYTHONPATH=str(args.extra_path.resolve()) if args.extra_path else '', STAND_IN=str(temp/'path'),
                                OMP_NUM_THREADS=str(args.threads), CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', HF_HOME=str(temp/'hf'),
                                HF_DATASETS_DISABLE_PROGRESS_BARS='1', HF_DATASETS_CACHE=str(folder/'datasets'),
                                CACHED_PAIRS=str(folder/'pairs.safetensors'))
        words = [sys.executable, temp/'run.py', script.resolve(), '--pretrained_model_name_or_path', folder/'models',
                 '--train_data_dir', folder/'images', '--image_column', 'image', '--caption_column', 'text', '--resolution', size,
                 '--train_batch_size', batch, '--seed', 0, '--max_train_steps', steps, '--output_dir', out.resolve(),
                 '--report_to', 'tensorboard', '--mixed_precision', 'no', *more]
        child = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=temp)
        marks, said = {}, b''
        while part := os.read(child.stdout.fileno(), 65536):
            now, cpu, said = time.perf_counter(), cpu_seconds(child.pid), said[-20_000:] + part
            for n in re.findall(rb'Steps:[^\r\n]*?\| *(\d+)/\d+ \[', said[-len(part) - 200:]): marks.setdefault(int(n), (now, cpu))
        if child.wait() or steps not in marks: sys.exit(f"the script failed\n{said.decode(errors='replace')[-6000:]}")
        return marks, said

def run_script(args, folder, size, batch, warm, measured, cached):
    "Seconds of the script between two marks"
    with tempfile.TemporaryDirectory() as temp:
        script, text = args.script, args.script.read_text()
        if cached:
            for old, new in PATCHES.items():
                assert text.count(old) == 1, f'the script has {text.count(old)} times: {old}'
                text = text.replace(old, new)
            script = Path(temp)/'cached.py'
            script.write_text(text)
        marks, said = follow_script(args, script, folder, size, batch, warm + measured, Path(temp)/'out')
        (a, cpu_a), (b, cpu_b) = marks[warm], marks[warm + measured]
        return dict(seconds=b - a, cpu_seconds=cpu_b - cpu_a, loss=float(re.findall(rb'step_loss=([\d.]+)', said)[-1]))

def in_process(args, *words):
    "One of our own measurements, in a process of its own"
    argv = [sys.executable, __file__, '--script', args.script, '--commit', args.commit, '--one', *words]
    env = os.environ | dict(OMP_NUM_THREADS=str(args.threads))
    done = subprocess.run(list(map(str, argv)), stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])

def one(task, part, folder, *numbers):
    import torch
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    folder.mkdir(parents=True, exist_ok=True)
    return make_part(part, folder) if task == 'make' else run_ours(part, folder, *map(int, numbers))

def accelerate_version(args):
    from importlib.metadata import distributions
    path = [*([str(args.extra_path)] if args.extra_path else []), *sys.path]
    found = [d.version for d in distributions(name='accelerate', path=path)]
    return found[0] if found else sys.exit('accelerate is missing; see --extra-path')

def main():
    args = parse()
    if args.one: return print(json.dumps(one(args.one[0], args.one[1], Path(args.one[2]), *args.one[3:])))
    import datasets, diffusers, torch, transformers
    from t2i_nb.evaluation import describe_device
    versions = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__,
                    accelerate=accelerate_version(args), datasets=datasets.__version__)
    digest = hashlib.blake2b(json.dumps(versions).encode() + STAND_IN.encode() + json.dumps(PATCHES).encode(), digest_size=6)
    for file in (args.script, *sorted((root/'t2i_nb').glob('*.py')), root/'t2i_nb'/'recipes'/'demo.yaml'): digest.update(file.read_bytes())
    known_file = args.work_dir/f'points-{digest.hexdigest()}.json'
    args.work_dir.mkdir(parents=True, exist_ok=True)
    known = json.loads(known_file.read_text()) if known_file.is_file() else {}
    def remember(key, compute):
        if key not in known:
            begun, load = time.perf_counter(), os.getloadavg()[0]
            known[key] = compute()
            known_file.write_text(json.dumps(known, indent=1))
            print(f'{key}: {json.dumps(known[key])}, {time.perf_counter() - begun:.0f} s in all, load before {load:.2f}', flush=True)
        return known[key]
    begun, load, rows = time.perf_counter(), os.getloadavg(), []
    note = 'ours with EMA, caption dropout and guard, the script without; '
    for part in dict.fromkeys('tiny' if w == 'cached' else w for w in args.what):
        tiny, folder = part == 'tiny', args.work_dir/part
        base, kind, size = (16, 'tiny', 64) if tiny else (8, 'real', REAL['size'])
        ways = ['ours', *(way for way, what in (('script', part), ('cached', 'cached' if tiny else '')) if what in args.what)]
        if not (folder/'pairs.safetensors').is_file(): known.pop(f'{part}, {args.threads} threads', None)
        made = remember(f'{part}, {args.threads} threads', lambda: in_process(args, 'make', part, folder))
        each = made['cache_seconds']/made['images'] # seconds of caching per image
        for batch in args.batches if tiny else args.real_batches:
            steps = {w: (STEPS[kind][w][0], max(2, round(STEPS[kind][w][1]*args.steps*base/batch))) for w in ways}
            def speed(way, k):
                def compute():
                    if way == 'ours': return in_process(args, 'ours', part, folder, batch, *steps[way])
                    return run_script(args, folder, size, batch, *steps[way], way == 'cached')
                key = f'{part}, {way}, batch {batch}, {steps[way][1]} steps, {args.threads} threads, round {k}'
                done = remember(key, compute)
                shares[way].append(done['cpu_seconds']/done['seconds']/args.threads)
                return batch*steps[way][1]/done['seconds']
            speeds, shares = {way: [] for way in ways}, {way: [] for way in ways}
            for k in range(args.rounds):
                for way in ways[::-1 if k % 2 else 1]: speeds[way].append(speed(way, k))
            for way in ways[1:]:
                name = NAMES['cached' if way == 'cached' else part]
                ours, theirs = (statistics.median(speeds[w]) for w in ('ours', way))
                ratios = [a/b for a, b in zip(speeds['ours'], speeds[way])]
                row = dict(name=f'{name}, batch {batch}', ours=ours, theirs=theirs, ratio=statistics.median(ratios), unit='images/s',
                           better='higher', part=name, target=TARGETS.get(name), ratios=ratios, ours_rounds=speeds['ours'],
                           theirs_rounds=speeds[way], rounds=args.rounds, batch=batch, size=size,
                           measured_steps={w: steps[w][1] for w in ('ours', way)}, stand_ins=['torchvision.transforms'],
                           cpu_share=dict(ours=shares['ours'], theirs=shares[way])) # of all threads; much less than 1 tells of company
                if way == 'cached': row |= dict(note=note + 'both read cached latents and text embeddings', patches=len(PATCHES))
                else: # epochs over the cached images, the making of the cache included
                    back, epochs = each/(1/theirs - 1/ours), (1, 10, 100)
                    row |= dict(note=note + 'it encodes images and captions in every step, ours reads them from its cache',
                                images=made['images'], cache_seconds=made['cache_seconds'], cache_paid_back_after_epochs=back,
                                cache_paid_back_after_images=round(back*made['images']),
                                ours_with_cache={f'{e} epochs': e/(each + e/ours) for e in epochs},
                                ratio_with_cache={f'{e} epochs': e/(each + e/ours)/theirs for e in epochs})
                rows.append(row | {k: v for k, v in made.items() if k not in row})
    facts = dict(device=describe_device('cpu'), threads=args.threads, precision='fp32', versions=versions, date=str(datetime.date.today()),
                 script_commit=args.commit, script_sha256=hashlib.sha256(args.script.read_bytes()).hexdigest(), load_before=list(load),
                 seconds=round(time.perf_counter() - begun))
    rows, parts = [r | facts for r in rows], {r['part'] for r in rows}
    old = json.loads(args.out.read_text()) if args.out.is_file() else []
    rows = [r for r in old if r['part'] not in parts] + rows
    args.out.write_text(json.dumps(rows, indent=1))
    for r in rows:
        print(f"{r['ratio']:6.2f}x ({min(r['ratios']):.2f} to {max(r['ratios']):.2f})  {r['name']}: {r['ours']:.2f} against "
              f"{r['theirs']:.2f} images/s")

if __name__ == '__main__': main()
