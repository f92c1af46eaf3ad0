"""Does a text-to-latent prior save UNet evaluations? Adherence from noise and from the prior, at equal numbers of them.

    python bench/prior.py --run-dir runs/demo --work-dir runs/prior

--run-dir is a finished run of the recipe `demo`; it is only read. The prior is trained on the recipe's own latents. How
many steps to leave out is chosen on prompts of another purpose and of seen triples; the table is scored on held-out
triples. Every image set is drawn once and remembered in --work-dir, so the same command goes on. Writes bench/results/prior.json.

What words are worth on photographs is measured besides: nats per latent number, of the photographs in `flowers12` (see
tests/conftest.py) through the VAE that bench/vae_finetune.py left in --photographs-vae, with captions that name the species."""
import argparse, datetime, json, sys, time
from pathlib import Path
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests')]
EVALUATIONS = (2, 4, 6, 12)
STEPS = {'from noise': lambda n: n, 'one step left out': lambda n: n + 1, 'from 2/3': lambda n: 3*n//2, 'from 1/2': lambda n: 2*n} # n are done

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--run-dir', type=Path, default=Path('runs/demo'))
    p.add_argument('--work-dir', type=Path, default=Path('runs/prior'))
    p.add_argument('--n-images', type=int, default=200_000, help='images to train the prior on')
    p.add_argument('--n-scored', type=int, default=256, help='images a point')
    p.add_argument('--n-chosen', type=int, default=64, help='images a point while a start is chosen')
    p.add_argument('--n-open', type=int, default=192, help='images for what prompts leave open')
    p.add_argument('--photographs-vae', type=Path, default=Path('runs/vae_finetune/vae'), help='fine-tuned VAE; photographs are left out without it')
    p.add_argument('--threads', type=int, default=0, help='0 leaves the choice to torch')
    return p.parse_args()

def on_photographs(
    folder # fine-tuned VAE
):         # nats per number of the test photographs: standard normal, without text, with text
    "What a caption says about the latents of a photograph"
    import conftest
    from t2i_nb.captions import TextConfig, build_text_cache, load_text_encoder
    from t2i_nb.data import DataConfig
    from t2i_nb.prior import PriorConfig, prior_report, train_prior
    from t2i_nb.sources import load_dataset
    from t2i_nb.vae import VAEConfig, build_latent_cache, load_vae
    vae, (tokenizer, text_encoder) = load_vae(VAEConfig(str(folder))), load_text_encoder(TextConfig('minilm', 16))
    def cached(split):
        dataset = load_dataset(DataConfig(source=str(conftest.data_dir/'flowers12'/f'{split}.parquet'), size=64), 'test')
        texts = build_text_cache(dataset.captions, tokenizer, text_encoder)
        return build_latent_cache(dataset, vae)['mean'], texts.states, texts.rows(dataset.captions)
    for state in train_prior(*cached('train'), PriorConfig(128, 20_000, weight_decay=.1)): pass
    return prior_report(state.prior, *cached('test'))

def main():
    args = parse()
    import diffusers, torch
    if args.threads: torch.set_num_threads(args.threads)
    from t2i_nb.core import image_grid, load_config, to_pil
    from t2i_nb.classifier import fresh_drawings, load_classifier, read_attributes
    from t2i_nb.evaluation import adherence, describe_device, kid, load_feature_network, open_entropy, open_prompts, score_prompts
    from t2i_nb.prior import PriorConfig, load_prior, made_for, prior_report, sample_prior, save_prior, train_prior
    from t2i_nb.captions import encode_prompts
    from t2i_nb.sampling import draw, make_generators
    from t2i_nb.pipeline import load_pipeline
    from t2i_nb.recipe import RunConfig, load_components, prepare_data
    from t2i_nb.vae import decode_latents
    work, cfg = args.work_dir, load_config(args.run_dir/'config.yaml', RunConfig)
    work.mkdir(parents=True, exist_ok=True)
    models, pipeline, classifier = load_components(cfg), load_pipeline(args.run_dir), load_classifier()
    if not (work/'prior'/'config.json').is_file():
        data, start, curve = prepare_data(cfg, models, cache=work/'cache'), time.perf_counter(), []
        for state in train_prior(data.mean[:], data.states[:], data.rows[:, 0], PriorConfig(n_images=args.n_images), every=200):
            curve.append((state.images_seen, state.nll))
            print(state.images_seen, round(state.nll, 4), flush=True)
        state.prior.made_for = made_for(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder)
        save_prior(state.prior, work/'prior')
        nll = {s: prior_report(state.prior, *(lambda d: (d.mean, d.states, d.rows[:, 0]))(prepare_data(cfg, models, s))) for s in ('validation', 'held_out')}
        (work/'prior'/'report.json').write_text(json.dumps(dict(seconds=time.perf_counter() - start, curve=curve, nll=nll)))
    prior, report = load_prior(work/'prior'), json.loads((work/'prior'/'report.json').read_text())
    network = load_feature_network('classifier')
    real = {held_out: network(fresh_drawings(512, held_out, 1)[1]) for held_out in (False, True)}
    def score(wanted, x, held_out):
        read, distance = adherence(wanted, read_attributes(classifier, x)), kid(network(x), real[held_out])
        return dict(adherence=read['mean'], std_error=read['std_error'], all_six=read['all_six'], per_attribute=read['per_attribute'],
                    kid=distance['mean'], kid_error=distance['std_error'])
    known_file = work/'points.json'
    known = json.loads(known_file.read_text()) if known_file.is_file() else {}
    def remember(key, compute):
        if key not in known:
            known[key] = compute()
            known_file.write_text(json.dumps(known, indent=1))
            print(key, json.dumps(known[key])[:150], flush=True)
        return known[key]
    def images(prompts, seeds, start, n):
        steps, passes = STEPS[start](n), []
        extra = {} if steps == n else dict(prior=prior, start_level=n/steps)
        hook = pipeline.unet.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[1].item()/1000))
        x = torch.cat([draw(pipeline, prompts[i:i + 64], make_generators(seeds[i:i + 64]), steps, cfg.sample.guidance_scale,
                            sampler=cfg.sample.sampler, **extra) for i in range(0, len(prompts), 64)])
        hook.remove()
        assert len(passes) == n*-(-len(prompts)//64), (len(passes), n)
        return x.clamp(-1, 1), dict(num_inference_steps=steps, begins_at=passes[0])
    def point(start, n, purpose, held_out, count):
        prompts, wanted, seeds = score_prompts(count, held_out, purpose=purpose)
        def compute():
            x, how = images(prompts, seeds, start, n)
            return score(wanted, x, held_out) | how
        return remember(f'{purpose}, {start}, {n}, {count}', compute)
    def variety(start, n):
        prompts, named, seeds = open_prompts(args.n_open)
        return remember(f'open, {start}, {n}, {args.n_open}', lambda: open_entropy(named, read_attributes(classifier, images(prompts, seeds, start, n)[0])))

    starts = [k for k in STEPS if k != 'from noise']
    chosen = {n: {k: point(k, n, 'prior choice', False, args.n_chosen) for k in STEPS} for n in EVALUATIONS}
    best = max(starts, key=lambda k: sum(chosen[n][k]['adherence'] for n in EVALUATIONS))
    prompts, wanted, seeds = score_prompts(args.n_scored)
    def guesses():
        texts = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, prompts)
        z = dict(mean=sample_prior(prior, texts), sample=sample_prior(prior, texts, make_generators(seeds)))
        return {k: score(wanted, decode_latents(pipeline.vae, v).clamp(-1, 1), True) for k, v in z.items()}
    alone = remember('prior alone', guesses)
    rows = []
    for measure, unit, better in (('adherence', 'share of attributes', 'higher'), ('kid', 'KID through the classifier', 'lower')):
        for n in EVALUATIONS:
            noise = point('from noise', n, 'test', True, args.n_scored)
            for k in starts:
                ours = point(k, n, 'test', True, args.n_scored)
                a, b = ours[measure], noise[measure]
                rows.append(dict(name=f'{measure} on held-out triples after {n} evaluations, prior with {k} against noise', ours=a, theirs=b,
                                 ratio=a/b if better == 'higher' else b/a, unit=unit, better=better, measure=measure, evaluations=n, start=k,
                                 chosen=k == best, prior=ours, noise=noise))
    for n in (EVALUATIONS[0], EVALUATIONS[-1]):
        ours, noise = (variety(k, n) for k in (best, 'from noise'))
        a, b = (min(e['per_attribute'].values()) for e in (ours, noise))
        rows.append(dict(name=f'open entropy after {n} evaluations, prior with {best} against noise', ours=a, theirs=b, ratio=a/b,
                         unit='share of the entropy of free attributes, the lowest', better='higher', measure='open entropy', evaluations=n, start=best,
                         chosen=True, prior=ours, noise=noise))
    facts = dict(device=describe_device('cpu'), versions=dict(torch=torch.__version__, diffusers=diffusers.__version__), date=str(datetime.date.today()),
                 threads=torch.get_num_threads(), n_scored=args.n_scored, n_open=args.n_open, guidance_scale=cfg.sample.guidance_scale, sampler=cfg.sample.sampler)
    rows = [r | facts for r in rows]
    rows[0] |= dict(training=report | dict(n_images=prior.cfg.n_images, hidden=prior.cfg.hidden), alone=alone,
                    chosen_on={str(n): row for n, row in chosen.items()}, n_chosen=args.n_chosen)
    if (args.photographs_vae/'config.json').is_file(): rows[0] |= dict(photographs=remember('photographs', lambda: on_photographs(args.photographs_vae)))
    show = prompts[:6]
    grids = [images(show, seeds[:6], k, EVALUATIONS[0])[0] for k in STEPS]
    texts = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, show)
    image_grid(to_pil(torch.cat([decode_latents(pipeline.vae, sample_prior(prior, texts)), *grids])), 6).save(work/'grid.png')
    out = root/'bench'/'results'/'prior.json'
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1))
    for r in rows: print(f"{r['name']}: {r['ours']:.3f} against {r['theirs']:.3f}")

if __name__ == '__main__': main()
