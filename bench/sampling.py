"""How long an image takes on a CPU: ours on ONNX Runtime against plain diffusers, torch eager, torch.compile and Optimum, side by side.

    python bench/sampling.py --run-dir runs/demo --optimum-python ../optimum_env/bin/python
    python bench/sampling.py --run-dir runs/demo --what modules end_to_end --rounds 1 --repetitions 3

--run-dir is a finished run of the recipe `demo` with an exported onnx/ folder (`t2i export runs/demo`); it is only read. --optimum-python is the Python of an
environment of its own (`pip install torch==2.13.0 "optimum-onnx[onnxruntime]"`), because Optimum needs an older transformers; without it those rows are left out.
Parts, any of which --what selects:

modules     one pass of the text encoder, the UNet and the VAE decoder at batches 1 and 8, with --threads threads
end_to_end  prompt to image at equal steps and guidance (batches 1 and 4; 64, 128 and 256 pixels), and our cheapest setting against diffusers' 50 steps
start       from the start of a process to the image on disk: the exported generate.py, and plain diffusers
precisions  the folder exported again with fewer bits: its size, how far its images are from torch's, and how long they take beside float32
scores      adherence and KID (by the attribute classifier's features and by EfficientNet-lite0's) of the candidates for the cheapest setting and of diffusers' 50 steps, on the
            same prompts and seeds

Each way is a process of its own that loads once and answers questions; the ways take turns, forwards and backwards, and of each question the fastest of
--repetitions counts in a round (other processes can only slow a repetition down). A ratio is taken in each round, the median counts. Plain diffusers is
`StableDiffusionPipeline` as its documentation has it, with the scheduler that the run ships: the stock flow scheduler fails in that pipeline, and a step costs
the same. Writes bench/results/sampling.json; rows of parts that were not asked for stay."""
import argparse, datetime, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
PROMPT, SEED = 'a large red flower with five round petals on a blue background', 0
# (steps, sampler, low, high): what might be the cheapest setting; guidance acts between the noise levels low and high
CANDIDATES = [(4, 'euler_a', 0., 1.), (4, 'dpmpp_2m', 0., 1.), (4, 'euler', 0., 1.), (4, 'euler', .4, 1.), (3, 'euler', 0., 1.), (3, 'euler', .4, 1.), (3, 'euler_a', 0., 1.), (2, 'euler', 0., 1.)]
PARTS = ['modules', 'end_to_end', 'start', 'precisions', 'scores']
TARGETS = dict(sample_equal_steps=4, sample_equal_steps_optimum=1.5, sample_cheapest=20, unet_pass_b1=3.5, unet_pass_b8=2)

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/demo'))
    p.add_argument('--onnx', type=Path, help='exported folder; onnx/ of the run if not given')
    p.add_argument('--optimum-python', type=Path)
    p.add_argument('--what', nargs='+', choices=PARTS, default=PARTS)
    p.add_argument('--steps', type=int, nargs='+', default=[12, 50], help='of equal steps')
    p.add_argument('--sizes', type=int, nargs='*', default=[128, 256], help='pixels, beside 64')
    p.add_argument('--cheapest', nargs=4, default=None, metavar=('STEPS', 'SAMPLER', 'LOW', 'HIGH'), help='our cheapest setting; what the scores say if not given')
    p.add_argument('--guidance-scale', type=float, default=1.25)
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--repetitions', type=int, default=5)
    p.add_argument('--n-scored', type=int, default=256)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--no-compile', action='store_true', help='leaves torch.compile out')
    p.add_argument('--out', type=Path, default=root/'bench'/'results'/'sampling.json')
    p.add_argument('--serve', help=argparse.SUPPRESS)
    return p.parse_args()

# ---- one way, in a process of its own: questions on stdin, seconds on stdout ----

def best(function, repetitions):
    "Seconds of the fastest of some repetitions, after one that is not counted"
    times = []
    for i in range(repetitions + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])

def make_ours(a):
    import numpy as np
    sys.path.insert(0, str(a.onnx))
    import generate as g
    pipe = g.OnnxPipeline(a.onnx, threads=a.threads)
    def question(q):
        if q['ask'] == 'text': return lambda: g.encode(pipe, PROMPT)
        if q['ask'] == 'unet':
            rows = [g.context(pipe, PROMPT, [500.])[0] | dict(sample=g.randn(i, (1, 8, 8, 8))) for i in range(q['batch'])]
            return lambda: pipe.run('step', rows, together=True)
        if q['ask'] == 'vae':
            z = np.concatenate([g.randn(i, (1, 8, 8, 8)) for i in range(q['batch'])])
            return lambda: g.decode(pipe, z)
        low, high = q.get('interval', (0., 1.))
        return lambda: g.generate(pipe, [PROMPT]*q['batch'], list(range(q['batch'])), num_inference_steps=q['steps'], guidance_scale=a.guidance_scale,
                                  sampler=q.get('sampler', 'dpmpp_2m'), guidance_interval=(low, high), height=q['size'], width=q['size'])
    return question

def torch_questions(a, text, unet, vae, pipe):
    "What the three ways with torch have in common; the whole image is the pipeline's own call"
    import torch
    def question(q):
        b = q.get('batch', 1)
        g = lambda: [torch.Generator('cpu').manual_seed(i) for i in range(b)]
        x, states, t = torch.randn(b, 8, 8, 8), torch.randn(b, a.tokens, 128), torch.tensor(500)
        ids = torch.ones(1, a.tokens, dtype=torch.int64)
        if q['ask'] == 'text': return lambda: text(ids)
        if q['ask'] == 'unet': return lambda: unet(x, t, encoder_hidden_states=states)
        if q['ask'] == 'vae': return lambda: vae(x)
        return lambda: pipe([PROMPT]*b, num_inference_steps=q['steps'], guidance_scale=a.guidance_scale, generator=g(), height=q['size'], width=q['size'])
    def run(q):
        f = question(q)
        def inside():
            with torch.no_grad(): return f()
        return inside
    return run

def make_torch(a, compiled=False, ours=False):
    import diffusers, torch
    torch.set_num_threads(a.threads)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(a.run_dir/'pipeline', safety_checker=None, low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    a.tokens = pipe.tokenizer.model_max_length
    if compiled: pipe.unet, pipe.vae.decoder = torch.compile(pipe.unet, dynamic=False), torch.compile(pipe.vae.decoder, dynamic=False)
    call = pipe
    if ours: # the library's own sampling with torch
        from t2i_nb.sampling import sample_images
        call = lambda prompts, num_inference_steps, guidance_scale, generator, height, width: sample_images(
            pipe, prompts, list(range(len(prompts))), num_inference_steps, guidance_scale, height=height, width=width)
    return torch_questions(a, pipe.text_encoder, pipe.unet, pipe.vae.decode, call)

def make_optimum(a):
    import onnxruntime, torch
    from optimum.onnxruntime import ORTStableDiffusionPipeline
    torch.set_num_threads(a.threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = a.threads
    pipe = ORTStableDiffusionPipeline.from_pretrained(a.onnx, session_options=options)
    pipe.set_progress_bar_config(disable=True)
    a.tokens = pipe.tokenizer.model_max_length
    return torch_questions(a, pipe.text_encoder, pipe.unet, pipe.vae_decoder, pipe)

WAYS = dict(ours=make_ours, diffusers=make_torch, torch=lambda a: make_torch(a, ours=True), compiled=lambda a: make_torch(a, True), optimum=make_optimum)

def peak_memory():
    "The most that a process held, in MB"
    lines = [l for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('VmHWM')] if Path('/proc/self/status').is_file() else []
    return int(lines[0].split()[1])/1000 if lines else None

def serve(a):
    if a.serve != 'optimum' and a.serve != 'ours': sys.path.insert(0, str(root))
    question = WAYS[a.serve](a)
    print(json.dumps('ready'), flush=True)
    for line in sys.stdin:
        q = json.loads(line)
        print(json.dumps(dict(seconds=best(question(q), q['repetitions']), peak_mb=peak_memory())), flush=True)

class Way:
    "A process that answers questions"
    def __init__(self, name, args):
        python = str(args.optimum_python) if name == 'optimum' else sys.executable
        env = os.environ | dict(OMP_NUM_THREADS=str(args.threads), CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', DIFFUSERS_VERBOSITY='error')
        words = [python, '-W', 'ignore', __file__, '--serve', name, '--run-dir', args.run_dir, '--onnx', args.onnx, '--threads', args.threads, '--guidance-scale', args.guidance_scale]
        self.process = subprocess.Popen(list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        self.read()
    def read(self):
        while line := self.process.stdout.readline():
            try: return json.loads(line)
            except ValueError: pass # something else was printed
        sys.exit(f'a way ended: {self.process.args}')
    def ask(self, q):
        self.process.stdin.write(json.dumps(q) + '\n')
        self.process.stdin.flush()
        return self.read()
    def close(self): self.process.stdin.close(), self.process.wait()

# ---- the parts ----

def compare(ways, args, questions):
    "Ask each question of each way, in turns; yields name, theirs, ours' rounds and theirs"
    for name, q, their_q, others in questions:
        others, rounds = [o for o in others if o in ways], {}
        for k in range(args.rounds):
            order = ['ours', *others][::-1 if k % 2 else 1]
            for w in order: rounds.setdefault(w, []).append(ways[w].ask((q if w == 'ours' else their_q) | dict(repetitions=args.repetitions)))
        for o in others:
            mine, theirs = ([r['seconds'] for r in rounds[w]] for w in ('ours', o))
            ratios = [b/a for a, b in zip(mine, theirs)]
            label = name if o == others[0] else f'{name}_{o}'
            yield dict(name=label, part=name, ours=1000*statistics.median(mine), theirs=1000*statistics.median(theirs), ratio=statistics.median(ratios),
                       unit='ms', better='lower', target=TARGETS.get(label), against=o, ratios=ratios, rounds=args.rounds, question=q, their_question=their_q,
                       peak_mb=dict(ours=rounds['ours'][-1]['peak_mb'], theirs=rounds[o][-1]['peak_mb']))

def module_questions():
    "(name, ours, theirs, ways): torch eager is the diffusers process, whose UNet it is"
    all_ways = ['diffusers', 'compiled', 'optimum']
    for ask in ('unet', 'vae'):
        for b in (1, 8): yield f'{ask}_pass_b{b}', *[dict(ask=ask, batch=b)]*2, all_ways
    yield 'text_pass_b1', *[dict(ask='text', batch=1)]*2, all_ways

def sample_questions(args, cheapest):
    ways = ['diffusers', 'optimum', 'torch', 'compiled']
    one = lambda steps, batch, size: dict(ask='sample', steps=steps, batch=batch, size=size)
    yield 'sample_equal_steps', *[one(args.steps[-1], 1, 64)]*2, ways
    for steps in args.steps[:-1]: yield f'sample_equal_steps_{steps}', *[one(steps, 1, 64)]*2, ways[:2]
    yield 'sample_equal_steps_b4', *[one(args.steps[0], 4, 64)]*2, ways[:2]
    for size in args.sizes: yield f'sample_equal_steps_{size}px', *[one(args.steps[0], 1, size)]*2, ways[:2]
    steps, sampler, low, high = cheapest
    yield 'sample_cheapest', one(steps, 1, 64) | dict(sampler=sampler, interval=(low, high)), one(50, 1, 64), ['diffusers']

def score(args):
    "Adherence and KID of the candidates, and of plain diffusers with 50 steps"
    sys.path.insert(0, str(root))
    import diffusers, torch
    from t2i_nb.classifier import fresh_drawings, load_classifier, read_attributes
    from t2i_nb.evaluation import adherence, kid, load_feature_network, score_prompts
    from t2i_nb.onnx_runtime import OnnxPipeline, decode, draw_latents
    torch.set_num_threads(args.threads)
    classifier, networks = load_classifier(), dict(kid=load_feature_network('classifier'), kid_photo=load_feature_network('efficientnet-lite0'))
    drawings, (prompts, wanted, seeds) = fresh_drawings(512, False, 1)[1], score_prompts(args.n_scored, False, purpose='cheapest')
    real = {k: network(drawings) for k, network in networks.items()}
    def measure(x):
        x = x.clamp(-1, 1)
        read, found = adherence(wanted, read_attributes(classifier, x)), {}
        for k, network in networks.items():
            far = kid(network(x), real[k])
            found |= {k: far['mean'], f'{k}_error': far['std_error']}
        return dict(adherence=read['mean'], std_error=read['std_error'], **found)
    pipe, parts = OnnxPipeline(args.onnx, threads=args.threads), [slice(i, i + 16) for i in range(0, args.n_scored, 16)]
    found = []
    for steps, sampler, low, high in CANDIDATES:
        z = [draw_latents(pipe, prompts[p], seeds[p], steps, args.guidance_scale, sampler=sampler, guidance_interval=(low, high)) for p in parts]
        found.append(dict(setting=[steps, sampler, low, high]) | measure(torch.cat([torch.as_tensor(decode(pipe, o)) for o in z])))
        print(found[-1], flush=True)
    plain = diffusers.StableDiffusionPipeline.from_pretrained(args.run_dir/'pipeline', safety_checker=None, low_cpu_mem_usage=False)
    plain.set_progress_bar_config(disable=True)
    x = [plain(prompts[p], num_inference_steps=50, guidance_scale=args.guidance_scale, output_type='pt',
               generator=[torch.Generator('cpu').manual_seed(s) for s in seeds[p]]).images for p in parts]
    theirs = measure(torch.cat(x)*2 - 1)
    print('diffusers, 50 steps', theirs, flush=True)
    return found, theirs

def passes(setting):
    "UNet passes of an image, two for a guided step"
    steps, sampler, low, high = setting
    levels = [1 - i/steps for i in range(steps)]
    return sum(2 if low <= t <= high else 1 for t in levels)

def choose(found, theirs):
    "The candidate with the fewest passes that is within a standard error of all three figures"
    near = lambda f, k: f[k] <= theirs[k] + theirs[f'{k}_error']
    good = [f for f in found if f['adherence'] >= theirs['adherence'] - theirs['std_error'] and near(f, 'kid') and near(f, 'kid_photo')]
    return min(good, key=lambda f: passes(f['setting'])) if good else None

def precision_rows(args):
    "What fewer bits save and cost"
    sys.path.insert(0, str(root))
    from t2i_nb.commands import export
    rows, image = [], dict(ask='sample', steps=args.steps[0], batch=1, size=64, repetitions=args.repetitions)
    with tempfile.TemporaryDirectory() as folder:
        folders = dict(float32=args.onnx, float16=Path(folder)/'float16', int8=Path(folder)/'int8')
        for precision, out in folders.items():
            if out != args.onnx: export(args.run_dir, out, precision)
        ways = {k: Way('ours', argparse.Namespace(**vars(args) | dict(onnx=out))) for k, out in folders.items()}
        seconds = {k: min(ways[k].ask(image)['seconds'] for _ in range(args.rounds)) for k in ways}
        for precision, out in folders.items():
            ways[precision].close()
            m = json.loads((out/'manifest.json').read_text())
            size = lambda path: sum(p.stat().st_size for p in path.rglob('*') if p.is_file() and '__pycache__' not in p.parts)/1e6
            rows.append(dict(name=f'precision_{precision}', part='precisions', ours=size(out), theirs=size(args.onnx), ratio=size(args.onnx)/size(out), unit='MB', better='lower',
                             against='the folder in float32', precision=precision, psnr=m['trajectory']['psnr'], time=seconds[precision]/seconds['float32'],
                             errors={k: v['max_abs_error'] for k, v in m['modules'].items()}))
    return rows

PLAIN = """import sys, torch, diffusers
p = diffusers.StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, low_cpu_mem_usage=False)
p(sys.argv[3], num_inference_steps=int(sys.argv[4]), guidance_scale=float(sys.argv[5]), generator=torch.Generator('cpu').manual_seed(0)).images[0].save(sys.argv[2])"""

def start_row(args):
    "Process start to image on disk, ours and plain diffusers in turns"
    out, ours, theirs = args.out.parent/'.start.png', [], []
    how = json.loads((args.onnx/'manifest.json').read_text())['defaults']
    plain = ['-c', PLAIN, args.run_dir/'pipeline', out, PROMPT, how['num_inference_steps'], how['guidance_scale']]
    for _ in range(args.repetitions):
        for words, times in (([args.onnx/'generate.py', PROMPT, '--out', out], ours), (plain, theirs)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    out.unlink()
    return dict(name='start_to_image', part='start_to_image', ours=min(ours), theirs=min(theirs), ratio=min(theirs)/min(ours), unit='s', better='lower',
                against='plain diffusers in a process of its own')

def main():
    args = parse()
    args.onnx = args.onnx or args.run_dir/'onnx'
    if args.serve: return serve(args)
    if not (args.onnx/'manifest.json').is_file(): sys.exit(f'{args.onnx} is no exported folder; make it with t2i export {args.run_dir}')
    import diffusers, onnxruntime, torch, transformers
    begun, load, rows = time.perf_counter(), os.getloadavg(), []
    old = json.loads(args.out.read_text()) if args.out.is_file() else []
    cheapest = args.cheapest and [int(args.cheapest[0]), args.cheapest[1], float(args.cheapest[2]), float(args.cheapest[3])]
    if 'scores' in args.what:
        found, theirs = score(args)
        chosen = choose(found, theirs) or found[0]
        cheapest = cheapest or chosen['setting']
        rows.append(dict(name='cheapest_adherence', part='cheapest_adherence', ours=chosen['adherence'], theirs=theirs['adherence'], ratio=chosen['adherence']/theirs['adherence'],
                         unit='share of attributes', better='higher', target=1, against='diffusers, 50 steps', n_scored=args.n_scored, candidates=found, plain=theirs, setting=chosen['setting']))
    cheapest = cheapest or next((r['setting'] for r in old if r['name'] == 'cheapest_adherence'), CANDIDATES[0])
    names = ['ours', 'diffusers', 'torch'] + ([] if args.no_compile else ['compiled']) + (['optimum'] if args.optimum_python else [])
    if {'modules', 'end_to_end'} & {*args.what}:
        ways = {n: Way(n, args) for n in names}
        questions = [*(module_questions() if 'modules' in args.what else ()), *(sample_questions(args, cheapest) if 'end_to_end' in args.what else ())]
        for row in compare(ways, args, questions):
            rows.append(row)
            print(f"{row['ratio']:6.2f}x  {row['name']} against {row['against']}: {row['ours']:.2f} and {row['theirs']:.2f} ms", flush=True)
        for w in ways.values(): w.close()
    if 'start' in args.what: rows.append(start_row(args))
    if 'precisions' in args.what: rows += precision_rows(args)
    facts = dict(device=f'{os.cpu_count()} CPU cores', vectors=torch.backends.cpu.get_cpu_capability(), threads=args.threads, date=str(datetime.date.today()), load_before=list(load), seconds=round(time.perf_counter() - begun),
                 guidance_scale=args.guidance_scale, repetitions=args.repetitions, manifest_pipeline=json.loads((args.onnx/'manifest.json').read_text())['pipeline'],
                 versions=dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__, onnxruntime=onnxruntime.__version__))
    parts = {r['part'] for r in rows}
    args.out.write_text(json.dumps([r for r in old if r['part'] not in parts] + [dict(precision='fp32') | r | facts for r in rows], indent=1))
    for r in rows: print(f"{r['ratio']:6.2f}x  {r['name']}: {r['ours']:.4g} against {r['theirs']:.4g} {r['unit']}")

if __name__ == '__main__': main()
