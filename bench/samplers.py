"""How good are the samplers at equal numbers of UNet evaluations, and does a seed mean one image in whatever batch it is drawn?

    python bench/samplers.py --run-dir runs/demo --work-dir runs/samplers

--run-dir is a finished run of the recipe `demo`; it is only read. Every setting is scored on the same prompts of seen triples and the same seeds: adherence
by the shipped attribute classifier, and KID through the classifier to fresh drawings. DDPM with all of its 1000 steps is the reference; it is scored on fewer images, because
it costs as much as all others together. Seconds are processor time an image, of one thread. The seed contract is measured on latents: prompts drawn alone,
in threes and in eights, in order and shuffled, and by plain diffusers from `torch.Generator('cpu').manual_seed(seed)`. Every point is remembered in
--work-dir, so the same command goes on. Writes bench/results/samplers.json."""
import argparse, datetime, json, random, sys, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root)]
STEPS = (4, 8, 16, 30)

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/demo'))
    p.add_argument('--work-dir', type=Path, default=Path('runs/samplers'))
    p.add_argument('--n-scored', type=int, default=64, help='images a setting')
    p.add_argument('--n-reference', type=int, default=32, help='images of DDPM with 1000 steps; 0 leaves it out')
    p.add_argument('--n-prompts', type=int, default=50, help='prompts of the seed contract')
    p.add_argument('--threads', type=int, default=1)
    return p.parse_args()

def main():
    args = parse()
    import diffusers, torch, transformers
    torch.set_num_threads(args.threads)
    for package in (diffusers, transformers):
        package.utils.logging.disable_progress_bar()
        package.utils.logging.set_verbosity_error()
    from t2i_nb.captions import encode_prompts
    from t2i_nb.core import load_config
    from t2i_nb.classifier import fresh_drawings, load_classifier, read_attributes
    from t2i_nb.evaluation import adherence, describe_device, kid, load_feature_network, score_prompts
    from t2i_nb.sampling import denoise, draw, initial_noise, latent_shape, make_generators, make_scheduler
    from t2i_nb.pipeline import load_pipeline
    from t2i_nb.objective import SAMPLERS
    from t2i_nb.recipe import RunConfig
    from t2i_nb.vae import decode_latents, psnr
    work, cfg = args.work_dir, load_config(args.run_dir/'config.yaml', RunConfig)
    work.mkdir(parents=True, exist_ok=True)
    pipeline, classifier, network = load_pipeline(args.run_dir), load_classifier(), load_feature_network('classifier')
    real, w = network(fresh_drawings(512, False, 1)[1]), cfg.sample.guidance_scale
    known_file = work/'points.json'
    known = json.loads(known_file.read_text()) if known_file.is_file() else {}
    def remember(key, compute):
        if key not in known:
            known[key] = compute()
            known_file.write_text(json.dumps(known, indent=1))
            print(key, json.dumps(known[key])[:150], flush=True)
        return known[key]
    def point(sampler, n, count, scale=w):
        prompts, attributes, seeds = score_prompts(count, False, purpose='samplers')
        def compute():
            passes, start = [], time.process_time()
            hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
            x = torch.cat([draw(pipeline, prompts[i:i + 8], make_generators(seeds[i:i + 8]), n, scale, sampler=sampler) for i in range(0, count, 8)]).clamp(-1, 1)
            hook.remove()
            seconds = (time.process_time() - start)/count
            read, far = adherence(attributes, read_attributes(classifier, x)), kid(network(x), real)
            return dict(adherence=read['mean'], std_error=read['std_error'], all_six=read['all_six'], kid=far['mean'], kid_error=far['std_error'],
                        evaluations=sum(passes)/count, seconds=seconds)
        return remember(f'{sampler}, {n}, {count}, {scale:g}', compute)

    def latents(order, size, sampler):
        prompts, _, seeds = score_prompts(args.n_prompts, False, purpose='seed contract')
        out = {}
        for i in range(0, len(order), size):
            part = order[i:i + size]
            generators = make_generators([seeds[j] for j in part])
            states, null = (encode_prompts(pipeline.tokenizer, pipeline.text_encoder, t) for t in ([prompts[j] for j in part], ['']))
            x = denoise(pipeline.unet.eval(), make_scheduler(pipeline.scheduler, sampler), initial_noise(generators, latent_shape(pipeline)), states,
                        null.expand(len(part), -1, -1), cfg.sample.num_inference_steps, w, generators=generators)
            out |= dict(zip(part, x))
        return torch.stack([out[j] for j in sorted(out)])
    def pixels(z): return torch.cat([decode_latents(pipeline.vae, o[None]) for o in z]).clamp(-1, 1)
    def contract(sampler):
        order = list(range(args.n_prompts))
        mixed = random.Random(0).sample(order, len(order))
        def compute():
            alone = latents(order, 1, sampler)
            shown, found = pixels(alone), []
            for size in (1, 3, 8):
                for name, o in (('in order', order), ('shuffled', mixed)):
                    z = latents(o, size, sampler)
                    found.append(dict(batch=size, order=name, equal=sum(torch.equal(a, b) for a, b in zip(z, alone)), worst=(z - alone).abs().max().item(),
                                      worst_psnr=min(psnr(pixels(z), shown).min().item(), 200.)))
            return found
        return remember(f'contract, {sampler}, {args.n_prompts}', compute)
    def plain():
        def compute():
            theirs = diffusers.StableDiffusionPipeline.from_pretrained(args.run_dir/'pipeline', safety_checker=None, low_cpu_mem_usage=False)
            theirs.set_progress_bar_config(disable=True)
            prompts, _, seeds = score_prompts(args.n_prompts, False, purpose='seed contract')
            z = torch.cat([theirs(p, num_inference_steps=cfg.sample.num_inference_steps, guidance_scale=w, output_type='latent',
                                  generator=torch.Generator('cpu').manual_seed(s)).images for p, s in zip(prompts, seeds)])
            ours = latents(list(range(args.n_prompts)), 1, 'dpmpp_2m')
            return dict(equal=sum(torch.equal(a, b) for a, b in zip(z, ours)), worst=(z - ours).abs().max().item(),
                        worst_psnr=min(psnr(pixels(z), pixels(ours)).min().item(), 200.))
        return remember(f'plain diffusers, {args.n_prompts}', compute)

    contracts = {s: contract(s) for s in ('dpmpp_2m', 'euler_a')}
    same = plain()
    settings = [(s, n) for n in STEPS for s in SAMPLERS] + [('ddim', 50)]
    scores = {(s, n): point(s, n, args.n_scored) for s, n in settings}
    if args.n_reference: scores['ddpm', 1000] = point('ddpm', 1000, args.n_reference)
    reference, rows = scores.get(('ddpm', 1000)) or scores['ddim', 50], []
    for (s, n), ours in scores.items():
        rows.append(dict(name=f"adherence of {s} with {n} steps against {'ddpm with 1000' if args.n_reference else 'ddim with 50'}", ours=ours['adherence'],
                         theirs=reference['adherence'], ratio=ours['adherence']/reference['adherence'], unit='share of attributes', better='higher',
                         measure='quality', sampler=s, steps=n, n_scored=args.n_reference if n == 1000 else args.n_scored, point=ours))
    for s, found in contracts.items():
        worst = max(o['worst'] for o in found)
        rows.append(dict(name=f'seed contract of {s}: worst latents over batches and orders, against 1e-4', ours=worst, theirs=1e-4, ratio=1e-4/max(worst, 1e-12),
                         unit='largest difference', better='lower', measure='seed contract', sampler=s, steps=cfg.sample.num_inference_steps, found=found,
                         noise=SAMPLERS[s].adds_noise, n_prompts=args.n_prompts))
    rows.append(dict(name='seed contract: worst latents against plain diffusers, against 1e-4', ours=same['worst'], theirs=1e-4, ratio=1e-4/max(same['worst'], 1e-12),
                     unit='largest difference', better='lower', measure='plain diffusers', sampler='dpmpp_2m', steps=cfg.sample.num_inference_steps, found=same,
                     n_prompts=args.n_prompts))
    facts = dict(device=describe_device('cpu'), versions=dict(torch=torch.__version__, diffusers=diffusers.__version__), date=str(datetime.date.today()),
                 threads=torch.get_num_threads(), guidance_scale=w)
    out = root/'bench'/'results'/'samplers.json'
    out.write_text(json.dumps([r | facts for r in rows], indent=1))
    for r in rows: print(f"{r['name']}: {r['ours']:.3g} against {r['theirs']:.3g}")

if __name__ == '__main__': main()
