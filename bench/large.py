"""How long an image of 256 pixels takes on a CPU with a UNet of 150 M parameters, in plain diffusers and by our exported folder, where the time goes, and how much memory each holds.

    python bench/large.py
    python bench/large.py --width 16 --layers-per-block 1 --vae-width 32 --text-width 32 --text-layers 1 --size 64 --steps 2 4 --out /tmp/large.json

The model is a stock UNet2DConditionModel on latents of 4 x 32 x 32 that attends to 77 states of 768 numbers, a CLIP text encoder of Stable Diffusion's size, and two
decoders: an AutoencoderKL of Stable Diffusion's size (rows *_sd_*) and AutoencoderTiny as it comes (rows *_small_*). All weights are random: an image costs the same
and shows nothing. It is built and exported first, into --work (kept, and used again if it is there) or a folder that is removed at the end.

For each decoder, with guidance (two passes a step) and without (guidance 1), two processes load once and take turns: plain diffusers (`StableDiffusionPipeline` in
torch eager, which batches the two passes) and ours (the exported generate.py, which runs them side by side). Each draws one small image that does not count, then
--repetitions images of batch 1 for each of --steps, from the same noise; text encoder, UNet and decoder are timed inside. The fastest image counts, and the fastest
step and decoding (other processes can only slow one down); medians stand beside them. peak_mb is the most that a process held, loading included, drawing_mb the most while it drew,
load_s the seconds until that small image was there. An image that would end after --seconds is not drawn: its seconds are a product of those of the shorter
image, and its `note` says so. Nothing else should run meanwhile; ten minutes. Writes bench/results/large.json after every image."""
import argparse, datetime, json, os, shutil, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
root = Path(__file__).resolve().parents[1]
PROMPT, SEED, SCALE = 'a large red flower with five round petals on a blue background', 0, 3.
DECODERS, GUIDED, WAYS = ('sd', 'small'), ('guided', 'unguided'), ('ours', 'theirs')

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--width', type=int, default=120, help='channels of the first level of the UNet')
    p.add_argument('--layers-per-block', type=int, default=2)
    p.add_argument('--vae-width', type=int, default=128, help="channels of the first level of the larger decoder; Stable Diffusion's are 128")
    p.add_argument('--text-width', type=int, default=768)
    p.add_argument('--text-layers', type=int, default=12)
    p.add_argument('--size', type=int, default=256, help='pixels, 8 times the latents')
    p.add_argument('--steps', type=int, nargs='+', default=[10, 30])
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--repetitions', type=int, default=2)
    p.add_argument('--seconds', type=float, default=480, help='after which no further image is begun')
    p.add_argument('--work', type=Path, help='where to build the model')
    p.add_argument('--out', type=Path, default=root/'bench'/'results'/'large.json')
    p.add_argument('--build', action='store_true', help=argparse.SUPPRESS)
    p.add_argument('--serve', nargs=2, metavar=('WAY', 'DECODER'), help=argparse.SUPPRESS)
    return p.parse_args()

# ---- the model, built and exported once ----

def make_pipeline(a):
    "Random weights between the shipped tokenizer and a scheduler for flow, and the smaller decoder"
    import diffusers, torch, transformers
    from t2i_nb.captions import load_text_encoder
    from t2i_nb.cost import SD_VAE
    from t2i_nb.pipeline import build_pipeline
    from t2i_nb.recipe import Components
    from t2i_nb.unet import UNetConfig, build_unet
    from t2i_nb.objective import Objective, ObjectiveConfig
    torch.manual_seed(SEED)
    tokenizer, tokens = load_text_encoder()[0], 77
    tokenizer.model_max_length = tokens
    special = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=a.text_width, intermediate_size=4*a.text_width, num_hidden_layers=a.text_layers,
                                                                  num_attention_heads=max(1, a.text_width//64), max_position_embeddings=tokens, **special)).eval()
    unet = build_unet(UNetConfig(width=a.width, layers_per_block=a.layers_per_block), a.size//8, 4, a.text_width).eval()
    vae = diffusers.AutoencoderKL.from_config(SD_VAE | dict(block_out_channels=[a.vae_width*k for k in (1, 2, 4, 4)])).eval()
    return build_pipeline(unet, Components(tokenizer, text, vae), Objective(ObjectiveConfig())), diffusers.AutoencoderTiny().eval()

def work_of(modules):
    "Floating-point operations of one decoding, by decoder"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    found = {}
    for name, (vae, side) in modules.items():
        with torch.device('meta'), torch.no_grad():
            meta, z = type(vae).from_config(vae.config), torch.empty(1, 4, side, side)
            with FlopCounterMode(display=False) as counter: meta.decode(z)
        found[name] = counter.get_total_flops()
    return found

def build(a):
    "The pipeline in diffusers' layout, and an exported folder for each decoder that shares the other graphs"
    sys.path.insert(0, str(root))
    import numpy as np, torch
    from t2i_nb import onnx_export as e
    from t2i_nb.unet import count_flops, count_parameters
    torch.set_num_threads(a.threads)
    start = time.perf_counter()
    pipe, small = make_pipeline(a)
    pipe.save_pretrained(a.work/'pipeline')
    small.save_pretrained(a.work/'small')
    facts = dict(unet_parameters=count_parameters(pipe.unet), text_parameters=count_parameters(pipe.text_encoder), gflop_pass=count_flops(pipe.unet, 77)/1e9,
                 decoder_parameters={k: sum(count_parameters(m) for m in (v.decoder, getattr(v, 'post_quant_conv', None)) if m is not None) for k, v in (('sd', pipe.vae), ('small', small))},
                 gflop_decoding={k: v/1e9 for k, v in work_of(dict(sd=(pipe.vae, a.size//8), small=(small, a.size//8))).items()})
    modules, errors = e.graph_modules(pipe, encoder=False), {}
    for name in modules:
        e.write_graph(a.work/'sd'/e.graph_file(name), *modules[name])
        print('graph', name, round(time.perf_counter() - start), flush=True)
    for decoder in DECODERS:
        folder = a.work/decoder if decoder == 'sd' else a.work/'small_onnx'
        if decoder == 'small':
            pipe.vae = small
            for name in ('text_encoder', 'context', 'step'): link(a.work/'sd'/e.graph_file(name), folder/e.graph_file(name))
            e.write_graph(folder/e.graph_file('vae_decoder'), *e.vae_modules(small, torch.export.Dim('batch', min=1, max=4096))['vae_decoder'])
        e.write_layout(pipe, folder)
        e.write_reference(pipe, folder, modules['context'][0])
        runtime = e.load_runtime(folder)
        e.write_manifest(folder, precision='float32', pipeline='', t2i_nb=version('t2i_nb'), defaults=dict(num_inference_steps=10, guidance_scale=SCALE, sampler='dpmpp_2m'),
                         latents=e.describe_latents(pipe), reference_prompt=e.REFERENCE, modules={k: dict(file=e.graph_file(k), threshold=1e-4) for k in modules})
        answers = runtime.reference_answers(runtime.OnnxPipeline(folder, threads=a.threads, check=False))
        with np.load(folder/'reference.npz') as wanted: errors[decoder] = {k: float(abs(v - wanted[k]).max()) for k, v in answers.items()}
    facts |= dict(max_abs_error=errors, export_seconds=round(time.perf_counter() - start, 1), graphs_mb={p.relative_to(a.work).as_posix(): p.stat().st_size/1e6 for p in sorted(a.work.rglob('*.onnx'))})
    (a.work/'facts.json').write_text(json.dumps(facts))

def link(old, new):
    "The same file in another folder"
    new.parent.mkdir(parents=True, exist_ok=True)
    os.link(old, new)

# ---- one way, in a process of its own: questions on stdin, answers on stdout ----

def memory(name):
    "MB that this process holds, or held at most"
    lines = [l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith(name)] if Path('/proc/self/status').is_file() else []
    return int(lines[0].split()[1])/1000 if lines else None

def forget_peak():
    "From here on, the peak is that of what follows"
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: return False
    return True

def timed(function, into):
    "A function that notes its seconds"
    def run(*args, **kwargs):
        start = time.perf_counter()
        try: return function(*args, **kwargs)
        finally: into.append(time.perf_counter() - start)
    return run

def make_ours(a, decoder, notes):
    folder = a.work/('sd' if decoder == 'sd' else 'small_onnx')
    sys.path.insert(0, str(folder))
    import generate as g
    pipe = g.OnnxPipeline(folder, threads=a.threads, check=False)
    run, context = pipe.run, g.context
    pipe.run = lambda name, rows, **how: timed(run, notes['unet' if name == 'step' else 'vae'])(name, rows, **how)
    g.context = timed(context, notes['text'])
    return lambda q: g.generate(pipe, [PROMPT], [SEED], num_inference_steps=q['steps'], guidance_scale=q['scale'], height=q['size'], width=q['size'])[0]

def make_theirs(a, decoder, notes):
    import diffusers, torch, transformers
    torch.set_num_threads(a.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    other = {} if decoder == 'sd' else dict(vae=diffusers.AutoencoderTiny.from_pretrained(a.work/'small'))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(a.work/'pipeline', safety_checker=None, **other)
    pipe.set_progress_bar_config(disable=True)
    for module, name, part in ((pipe.text_encoder, 'forward', 'text'), (pipe.unet, 'forward', 'unet'), (pipe.vae, 'decode', 'vae')):
        setattr(module, name, timed(getattr(module, name), notes[part]))
    return lambda q: pipe([PROMPT], num_inference_steps=q['steps'], guidance_scale=q['scale'], height=q['size'], width=q['size'],
                          generator=[torch.Generator('cpu').manual_seed(SEED)]).images[0]

def serve(a):
    way, decoder = a.serve
    notes, start = dict(text=[], unet=[], vae=[]), time.perf_counter()
    draw = (make_ours if way == 'ours' else make_theirs)(a, decoder, notes)
    print(json.dumps(dict(loaded=time.perf_counter() - start)), flush=True)
    for line in sys.stdin:
        q = json.loads(line)
        for v in notes.values(): v.clear()
        if q['steps'] > 1: kept, fresh = memory('VmHWM'), forget_peak()
        start = time.perf_counter()
        image = draw(q)
        seconds = time.perf_counter() - start
        found = dict(seconds=seconds, split={k: sum(v) for k, v in notes.items()}, passes=list(notes['unet']))
        if q['steps'] > 1: found |= dict(drawing_mb=memory('VmHWM') if fresh else None, peak_mb=max(kept or 0, memory('VmHWM') or 0))
        found['split']['other'] = seconds - sum(found['split'].values())
        if q.get('image'): image.save(q['image'])
        print(json.dumps(found), flush=True)

class Way:
    "A process that answers questions"
    def __init__(self, args, *words):
        env = os.environ | dict(OMP_NUM_THREADS=str(args.threads), CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', DIFFUSERS_VERBOSITY='error')
        own = ['--width', args.width, '--layers-per-block', args.layers_per_block, '--vae-width', args.vae_width, '--text-width', args.text_width, '--text-layers', args.text_layers,
               '--size', args.size, '--threads', args.threads, '--work', args.work]
        self.process = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, *map(str, own), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    def read(self):
        while line := self.process.stdout.readline():
            try: found = json.loads(line)
            except ValueError: print('   ', line.rstrip(), flush=True) # something else was printed
            else: return found
        sys.exit(f'a way ended: {self.process.args}')
    def ask(self, q):
        self.process.stdin.write(json.dumps(q) + '\n')
        self.process.stdin.flush()
        return self.read()
    def close(self):
        self.process.stdin.close()
        return self.process.wait()

# ---- the rows ----

def product(short, steps, more):
    "What an image of more steps takes, told by a shorter one"
    split = short['split'] | dict(unet=short['split']['unet']/steps*more)
    return dict(seconds=sum(split.values()), split=split, passes=[], peak_mb=short['peak_mb'], drawing_mb=short['drawing_mb'], ready=short['ready'])

def similarity(a, b):
    "PSNR of two images in dB"
    import numpy as np
    from PIL import Image
    x, y = (np.asarray(Image.open(p).convert('RGB'), float) for p in (a, b))
    return float(10*np.log10(255**2/max(((x - y)**2).mean(), 1e-4)))

def faster(a, b):
    "Two answers to one question: the faster one, with the passes and the memory of both"
    if not a: return b | dict(all_seconds=[b['seconds']], decodings=[b['split']['vae']])
    return min(a, b, key=lambda v: v['seconds']) | dict(passes=a['passes'] + b['passes'], peak_mb=max(a['peak_mb'], b['peak_mb']), drawing_mb=max(a['drawing_mb'] or 0, b['drawing_mb'] or 0),
                                                        all_seconds=[*a['all_seconds'], b['seconds']], decodings=[*a['decodings'], b['split']['vae']])

def row(name, ours, theirs, unit, **more):
    return dict(name=f'large_{name}', part=f'large_{name}', ours=ours, theirs=theirs, ratio=theirs/ours, unit=unit, better='lower', against='diffusers, torch eager', **more)

def rows_of(answers, args):
    "Everything that the answers say; what is missing of one way is not in it"
    rows, both = [], lambda *key: tuple(answers.get((w, *key)) for w in WAYS)
    for decoder in DECODERS:
        for guided in GUIDED:
            for steps in args.steps:
                ours, theirs = both(decoder, guided, steps)
                note = None
                if not (ours and theirs):
                    first = both(decoder, guided, args.steps[0])
                    if not all(first): continue
                    ours, theirs = (v or product(f, args.steps[0], steps) for v, f in zip((ours, theirs), first))
                    note = 'product, not drawn: ' + ' and '.join(w for w in WAYS if (w, decoder, guided, steps) not in answers) + ' from the shorter image'
                rows.append(row(f'{decoder}_{steps}_{guided}', ours['seconds'], theirs['seconds'], 's', split=dict(ours=ours['split'], theirs=theirs['split']), load_s=dict(ours=ours['ready'], theirs=theirs['ready']),
                                all_seconds=dict(ours=ours.get('all_seconds'), theirs=theirs.get('all_seconds')), note=note))
            drawn = [both(decoder, guided, s) for s in args.steps]
            drawn = [d for d in drawn if all(d)]
            if not drawn: continue
            for kind in ('peak_mb', 'drawing_mb'):
                if all(v[kind] for d in drawn for v in d): rows.append(row(f'{decoder}_{guided}_{kind[:-3]}_memory', *(max(d[i][kind] for d in drawn) for i in (0, 1)), 'MB'))
    for guided in GUIDED: # a step with guidance is two passes
        times = [[t for (w, _, g, _), v in answers.items() if w == way and g == guided for t in v['passes']] for way in WAYS]
        if all(times): rows.append(row(f'unet_step_{guided}', *(1000*min(t) for t in times), 'ms', medians=[1000*statistics.median(t) for t in times], n=[len(t) for t in times], passes=2 if guided == 'guided' else 1))
    for decoder in DECODERS:
        times = [[t for (w, d, *_), v in answers.items() if w == way and d == decoder for t in v['decodings']] for way in WAYS]
        if all(times): rows.append(row(f'decoding_{decoder}', *(1000*min(t) for t in times), 'ms', medians=[1000*statistics.median(t) for t in times], n=[len(t) for t in times]))
    return rows

def cheapest(rows, args):
    "Few steps and the small decoder by ours, against many steps and the large one by theirs"
    few, *_, many = sorted(args.steps)
    named = {r['name']: r for r in rows}
    a, b = (named.get(f'large_{d}_{s}_guided') for d, s in (('small', few), ('sd', many)))
    if not (a and b): return []
    return [row('cheapest', a['ours'], b['theirs'], 's', note=f'ours: {few} steps and the small decoder; theirs: {many} steps and the large one; the weights are random, so nothing is said of quality')]

def write(answers, args, facts, begun, psnr):
    "All rows so far"
    rows = rows_of(answers, args)
    rows += cheapest(rows, args)
    if psnr: rows.append(dict(name='large_parity', part='large_parity', ours=min(psnr.values()), theirs=45., ratio=min(psnr.values())/45, unit='dB', better='higher', images=psnr,
                              against='a limit of 45 dB', note='PSNR between images of both ways with the larger decoder, the worst; 88.1 means that no pixel differs; theirs is the limit that was set, no measurement'))
    common = dict(device=f'{os.cpu_count()} CPU cores', threads=args.threads, precision='fp32', date=str(datetime.date.today()), seconds=round(time.perf_counter() - begun), size=args.size,
                  guidance_scale=SCALE, repetitions=args.repetitions, versions={k: version(k) for k in ('torch', 'diffusers', 'transformers', 'onnxruntime')}, **facts)
    partial = args.out.with_name('.' + args.out.name)
    partial.write_text(json.dumps([r | common for r in rows], indent=1))
    os.replace(partial, args.out)
    return rows

def measure(args, begun):
    "Ask all questions, in turns"
    facts = json.loads((args.work/'facts.json').read_text()) | dict(load_before=list(os.getloadavg()))
    answers, psnr, rows, left = {}, {}, [], lambda: args.seconds - (time.perf_counter() - begun)
    for i, guided in enumerate(GUIDED):
        for j, decoder in enumerate(DECODERS):
            if left() < 0: continue
            scale, until = (SCALE, 1.)[i], args.seconds*(1 - (2*i + j + 1)/4) # a repetition leaves time for what comes after
            ways, ready = {}, {}
            for w in WAYS: # one loads after the other
                ways[w] = Way(args, '--serve', w, decoder)
                ready[w] = ways[w].read()['loaded'] + ways[w].ask(dict(steps=1, scale=scale, size=64))['seconds']
            for k, steps in enumerate(args.steps*args.repetitions):
                if k >= len(args.steps) and left() < until: continue
                images = {w: args.work/f'{w}_{decoder}_{guided}_{steps}.png' for w in WAYS}
                for w in WAYS[::-1 if k % 2 else 1]:
                    first = answers.get((w, decoder, guided, args.steps[0]))
                    if left() < (product(first, args.steps[0], steps)['seconds'] if first else 0): continue
                    v = ways[w].ask(dict(steps=steps, scale=scale, size=args.size, image=str(images[w]))) | dict(ready=ready[w])
                    answers[w, decoder, guided, steps] = faster(answers.get((w, decoder, guided, steps)), v)
                    print(f"{time.perf_counter() - begun:5.0f} s  {w} {decoder} {guided} {steps} steps: {v['seconds']:.2f} s,", {a: round(b, 2) for a, b in v['split'].items()}, f"{v['peak_mb']:.0f} MB", flush=True)
                    if decoder == 'sd' and all(p.is_file() for p in images.values()): psnr[f'{decoder}_{guided}_{steps}'] = similarity(*images.values())
                    rows = write(answers, args, facts, begun, psnr)
            for w in ways.values(): w.close()
    return rows

def main():
    args = parse()
    if args.build: return build(args)
    if args.serve: return serve(args)
    begun, keep = time.perf_counter(), args.work is not None
    args.work = (args.work or Path(tempfile.mkdtemp(prefix='large-'))).resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        if not (args.work/'facts.json').is_file():
            builder = Way(args, '--build')
            for line in builder.process.stdout: print('   ', line.rstrip(), flush=True)
            if builder.close(): sys.exit('the model could not be built')
        for p in args.work.glob('*.png'): p.unlink()
        for r in measure(args, begun): print(f"{r['ratio']:6.2f}x  {r['name']}: {r['ours']:.4g} against {r['theirs']:.4g} {r['unit']}{'  (' + r['note'] + ')' if r.get('note') else ''}")
    finally:
        if not keep: shutil.rmtree(args.work)

if __name__ == '__main__': main()
