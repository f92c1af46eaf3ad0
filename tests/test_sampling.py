"One seed, one image: in any batch and order, in plain diffusers, after a kill, and drawn again from the file alone."
import json, os, random, shutil, signal, subprocess, sys, time
import pytest
from t2i_nb.captions import build_text_cache, encode_prompts
from t2i_nb.__main__ import main
from t2i_nb.core import InputError, apply_overrides, find_recipe, load_config
from t2i_nb.evaluation import clipped_share, score_prompts
from t2i_nb.provenance import draw_folder, pipeline_digest, provenance, read_prompts, read_provenance, draw_again, save_drawn
from t2i_nb.objective import PREDICTION_TYPES, SAMPLERS, Objective, ObjectiveConfig, Sampler
from t2i_nb.recipe import RunConfig, check_run, load_components, open_run

HOW = dict(num_inference_steps=3, guidance_scale=2.)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of the recipe `demo` with a narrow network that was never trained, and its pipeline"
    from t2i_nb.pipeline import save_pipeline
    from t2i_nb.unet import build_unet
    from t2i_nb.objective import Objective
    folder = tmp_path_factory.mktemp('sampling')/'run'
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), ['unet.width=16', 'unet.overrides={}', 'unet.layers_per_block=1',
                                                                         'sample.num_inference_steps=3', 'sample.guidance_scale=2'])
    open_run(cfg, folder)
    models = load_components(cfg)
    side = cfg.data.size//2**(len(models.vae.config.block_out_channels) - 1)
    unet = build_unet(cfg.unet, side, models.vae.config.latent_channels, models.text_encoder.config.hidden_size)
    save_pipeline(folder/'pipeline', unet, models, Objective(cfg.objective))
    return folder

@pytest.fixture(scope='module')
def pipeline(run):
    from t2i_nb.pipeline import load_pipeline
    return load_pipeline(run)

def latents(pipeline, prompts, seeds, order, batch, sampler):
    "The latents of each prompt, drawn in `order` and in batches"
    import torch
    from t2i_nb.sampling import denoise, initial_noise, latent_shape, make_generators, make_scheduler
    out = {}
    for i in range(0, len(order), batch):
        part = order[i:i + batch]
        generators = make_generators([seeds[j] for j in part])
        states, null = (encode_prompts(pipeline.tokenizer, pipeline.text_encoder, t) for t in ([prompts[j] for j in part], ['']))
        x = denoise(pipeline.unet.eval(), make_scheduler(pipeline.scheduler, sampler), initial_noise(generators, latent_shape(pipeline)), states,
                    null.expand(len(part), -1, -1), 3, 2., generators=generators)
        out |= dict(zip(part, x))
    return torch.stack([out[j] for j in sorted(out)])

QUICK = ('dpmpp_2m', 'euler_a') # one that adds no noise, one that does

@pytest.mark.parametrize('sampler', [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SAMPLERS])
def test_a_seed_means_one_image(pipeline, sampler):
    import torch
    prompts, _, seeds = score_prompts(12)
    order = list(range(12))
    alone = latents(pipeline, prompts, seeds, order, 1, sampler)
    for batch in (1, 3, 8):
        for o in (order, random.Random(0).sample(order, 12)):
            z = latents(pipeline, prompts, seeds, o, batch, sampler)
            if batch == 1: assert torch.equal(z, alone)
            assert (z - alone).abs().max() <= 1e-4
    other = latents(pipeline, prompts, [s + 1 for s in seeds], order, 8, sampler)
    assert (other - alone).abs().mean() > .1

@pytest.mark.parametrize('sampler', ('dpmpp_2m', 'unipc', 'euler_a'))
def test_plain_diffusers_draws_the_same(run, pipeline, sampler):
    "With the generator that its users pass, step noise and all"
    import diffusers, torch
    from t2i_nb.sampling import make_scheduler
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(run/'pipeline', safety_checker=None, low_cpu_mem_usage=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = make_scheduler(pipeline.scheduler, sampler)
    prompts, _, seeds = score_prompts(3)
    ours = latents(pipeline, prompts, seeds, [0, 1, 2], 1, sampler)
    for p, s, z in zip(prompts, seeds, ours):
        x = theirs(p, num_inference_steps=3, guidance_scale=2., generator=torch.Generator('cpu').manual_seed(s), output_type='latent').images[0]
        assert (x - z).abs().max() <= 1e-4

def test_guidance_1_is_one_pass_and_the_conditional_prediction(pipeline):
    "Known defect k"
    import torch
    from t2i_nb.sampling import denoise, initial_noise, latent_shape, make_generators, make_scheduler
    states, null = (encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [t]) for t in ('a red flower', ''))
    noise, seen = initial_noise(make_generators([0]), latent_shape(pipeline)), []
    def unet(x, t, s):
        seen.append(len(x))
        return pipeline.unet(x, t, s)
    draw = lambda w, n: denoise(unet, make_scheduler(pipeline.scheduler, 'euler'), noise, states, n, 3, w)
    assert torch.equal(draw(1., null), draw(1., null*float('nan'))) and seen == [1]*6
    draw(2., null)
    assert seen[6:] == [2]*3

def test_text_is_the_same_in_training_and_in_sampling(pipeline, tmp_path, monkeypatch):
    "Known defect j: padding, length and mask, in what the network is given"
    import diffusers
    from t2i_nb.recipe import prepare_data
    from t2i_nb.train import train_steps
    words, encoder = pipeline.tokenizer, pipeline.text_encoder
    captions = ['a red flower', 'a small white flower with eight pointed petals and a black centre at night']
    cache = build_text_cache(captions, words, encoder)
    states = encode_prompts(words, encoder, captions)
    assert states.shape[1] == words.model_max_length
    kept = cache.states[cache.rows(captions)].float()
    assert kept.shape == states.shape and (kept - states).abs().max() < 2e-2
    given, forward = [], diffusers.UNet2DConditionModel.forward
    def watched(self, sample_images, timestep, encoder_hidden_states, *args, **kwargs):
        given.append((encoder_hidden_states.shape[1:], [a for a in args if a is not None], {k for k, v in kwargs.items() if v is not None}))
        return forward(self, sample_images, timestep, encoder_hidden_states, *args, **kwargs)
    monkeypatch.setattr(diffusers.UNet2DConditionModel, 'forward', watched)
    from t2i_nb.sampling import sample_images
    sample_images(pipeline, captions, [0, 1], **HOW)
    drawn = list(given)
    given.clear()
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), [
        'unet.width=16', 'unet.overrides={}', 'data.n_images=32', 'train.n_images=8', 'train.global_batch=4', 'train.micro_batch=4',
        'train.log_images=4', 'train.validation_images=8', 'train.checkpoint_images=8', 'train.warmup_images=4'])
    models = load_components(cfg)
    data = prepare_data(cfg, models)
    for _ in train_steps(cfg, tmp_path/'run', models, data, data): pass
    assert len(given) >= 2 and all(not args and not kwargs for _, args, kwargs in drawn + given)
    assert {tuple(shape) for shape, *_ in drawn + given} == {(words.model_max_length, encoder.config.hidden_size)}

def test_images_have_the_size_of_training(run, tmp_path, capsys):
    "Known defect b: or a sentence says why not"
    from PIL import Image
    out = tmp_path/'a.png'
    assert main(['sample', str(run), 'a red flower', '--out', str(out)]) == 0 and Image.open(out).size == (64, 64)
    assert main(['sample', str(run), 'a red flower', '--out', str(out), '--size', '96x64']) == 0 and Image.open(out).size == (96, 64)
    assert 'at another size than it was trained at' in capsys.readouterr().err
    assert main(['sample', str(run), 'a red flower', '--out', str(out), '--size', '70x64']) == 2
    assert 'width 70 is not a multiple of 16' in capsys.readouterr().err

def test_values_of_pixels_fit_the_file(pipeline):
    "Known defect l, as far as an untrained network goes: what the VAE makes of unit variance is not clipped; t2i eval looks at a trained one"
    import torch
    from t2i_nb.sampling import initial_noise, latent_shape, make_generators
    from t2i_nb.vae import decode_latents
    z = initial_noise(make_generators(range(8)), latent_shape(pipeline))
    assert clipped_share(decode_latents(pipeline.vae, z)) < .1 < clipped_share(decode_latents(pipeline.vae, z/.18215))
    assert torch.isfinite(z).all()

def test_cancel_within_a_step(pipeline):
    from t2i_nb.sampling import Cancelled, sample_images
    for answer, error in ((True, Cancelled), (ValueError('mine'), ValueError)):
        steps = []
        def callback(i, t, x):
            steps.append(i)
            if len(steps) < 2: return None
            if answer is True: return True
            raise answer
        with pytest.raises(error): sample_images(pipeline, ['a red flower']*3, range(3), 8, callback=callback)
        assert steps == [0, 1]

# Samplers --------------------------------------------------------------------------------------------------------------------------

KINDS = {p: ObjectiveConfig(p) for p in PREDICTION_TYPES} | {'v, zero terminal SNR': ObjectiveConfig('v_prediction', zero_terminal_snr=True)}

def follow(cfg, sampler, steps=10, **start):
    "A network that knows the image: how far the inputs' noise leaves the path, and how far the end is from the image"
    import torch
    from types import SimpleNamespace
    from t2i_nb.sampling import denoise, make_generators, make_scheduler
    generators = make_generators([0])
    x0, noise = torch.randn(2, 1, 4, 32, 32, generator=generators[0])
    objective, eps, off = Objective(cfg), [noise] if start else [], []
    def oracle(xt, timestep, embeddings):
        t = (timestep[None] + .5)/1000
        alpha, sigma = objective.alpha_sigma(t)
        eps.append((xt - alpha*x0)/sigma)
        off.append(abs(eps[-1].std().item() - 1) if SAMPLERS[sampler].adds_noise else (sigma*(eps[-1] - eps[0])).abs().max().item())
        return SimpleNamespace(sample=objective.target(x0, eps[-1], t))
    if start: start |= dict(start=x0)
    x = denoise(oracle, make_scheduler(objective.noise_scheduler(), sampler), noise, None, None, steps, 1., generators=generators, **start)
    return max(off), (x - x0).abs().max().item()

@pytest.mark.parametrize('sampler', SAMPLERS)
def test_every_sampler_keeps_to_the_path_of_every_target(sampler):
    "From noise, and from half-way at any level; noise that is added keeps its amount"
    for kind, cfg in KINDS.items():
        for start in ({}, *(dict(start_level=t) for t in (1., .7, .25))):
            off, end = follow(cfg, sampler, **start)
            assert off < (.05 if SAMPLERS[sampler].adds_noise else 1/127) and end < 1/127, (kind, start, off, end)

def test_levels_and_steps_that_do_not_exist():
    import torch
    from t2i_nb.sampling import make_scheduler, set_steps
    for level, words in ((.05, 'use more steps'), (1.2, 'at most 1'), (0., 'above 0')):
        with pytest.raises(InputError, match=words): follow(ObjectiveConfig(), 'euler', start_level=level)
    whole = make_scheduler(Objective(ObjectiveConfig('epsilon')).noise_scheduler(), 'ddpm')
    set_steps(whole, 1000)
    assert torch.equal(whole.timesteps, torch.arange(999, -1, -1)) # DDPM as it was published
    with pytest.raises(InputError, match='more than the 1000 timesteps'): set_steps(whole, 1001)
    with pytest.raises(InputError, match="did you mean 'euler'"): make_scheduler(whole, 'eular')

def test_a_new_sampler_is_one_entry(run, pipeline, monkeypatch, tmp_path):
    from t2i_nb.sampling import sample_images
    sde = dict(algorithm_type='sde-dpmsolver++', solver_order=2)
    entry = Sampler('DPM++ 2M SDE', 'DPMSolverMultistepScheduler', spacing='linspace', options=sde, flow_options=sde, adds_noise=True)
    cfg = load_config(find_recipe('demo'), RunConfig)
    new = apply_overrides(cfg, ['sample.sampler=dpmpp_2m_sde'])
    with pytest.raises(InputError, match='there is no sampler'): check_run(new)
    monkeypatch.setitem(SAMPLERS, 'dpmpp_2m_sde', entry)
    check_run(new)
    assert all(max(follow(c, 'dpmpp_2m_sde')) < .05 for c in KINDS.values())
    how = HOW | dict(sampler='dpmpp_2m_sde')
    file = save_drawn(sample_images(pipeline, ['a red flower'], [3], **how), tmp_path/'a.png', provenance(['a red flower'], [3], pipeline_digest(run), **how))
    assert 'Sampler: DPM++ 2M SDE' in file.read_bytes().decode('latin-1') and draw_again(file, pipeline).same

def test_importing_sampling_is_cheap():
    code = "import sys, t2i_nb.sampling, t2i_nb.recipe; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'

def test_guide():
    import torch
    from t2i_nb.sampling import guide
    cond, uncond = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(guide(cond, uncond, 1.), cond, atol=1e-6) and torch.allclose(guide(cond, uncond, 0.), uncond, atol=1e-6)
    assert abs(guide(cond, uncond, 5., 1.).std() - cond.std()) < 1e-5

def test_guidance_interval_saves_passes(pipeline):
    from t2i_nb.sampling import draw, make_generators
    sizes = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for how in (dict(guidance_scale=1.), dict(guidance_scale=3.), dict(guidance_scale=3., guidance_interval=(.2, .9))):
        draw(pipeline, ['a red flower']*2, make_generators(range(2)), 8, **how)
    hook.remove()
    assert sizes[:8] == [2]*8 and sizes[8:16] == [4]*8 and sizes[16] == 2 and sum(sizes[16:]) < 32

def test_image_to_image_is_that_of_diffusers(pipeline):
    "Both begin with the same image, encoded with the same draws, at half of the noise"
    from diffusers import StableDiffusionImg2ImgPipeline
    from t2i_nb.sampling import draw, make_generators
    from t2i_nb.vae import psnr
    prompts = ['a red flower', 'a blue flower']
    start = draw(pipeline, prompts, make_generators([1, 2]), 4).clamp(-1, 1)
    theirs = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs = theirs(prompts, image=(start + 1)/2, strength=.5, num_inference_steps=16, guidance_scale=3., generator=make_generators([5, 6]), output_type='pt')
    ours = draw(pipeline, prompts, make_generators([5, 6]), start=start, start_level=.5)
    assert psnr(ours.clamp(-1, 1), theirs.images*2 - 1).min() > 50
    with pytest.raises(InputError, match='not from both'): draw(pipeline, prompts, make_generators([5, 6]), start=start, prior=object())
    with pytest.raises(InputError, match='use an image of the size'): draw(pipeline, prompts, make_generators([5, 6]), start=start[:, :, :32, :32])

def test_a_prior_at_level_1_changes_nothing_and_keeps_the_seed(pipeline):
    import torch
    from t2i_nb.prior import PriorConfig, made_for, train_prior
    from t2i_nb.sampling import draw, latent_shape, make_generators
    cache = build_text_cache(['a red flower', 'a blue flower'], pipeline.tokenizer, pipeline.text_encoder)
    latents = torch.randn(64, *latent_shape(pipeline), generator=torch.Generator().manual_seed(0))
    for state in train_prior(latents, cache.states, cache.rows(['a red flower', 'a blue flower']*32), PriorConfig(16, 128)): pass
    prior = state.prior
    prior.made_for = made_for(pipeline.vae, pipeline.tokenizer, pipeline.text_encoder)
    noise, whole, late = (draw(pipeline, ['a red flower'], make_generators([3]), 4, 1., **how) for how in ({}, dict(prior=prior), dict(prior=prior, start_level=.5)))
    assert (noise - whole).abs().max() < 2e-2 < (noise - late).abs().max() # one timestep of the start is left at level 1

def test_classes_are_found_by_name():
    from types import SimpleNamespace
    from t2i_nb.sampling import class_labels
    two = SimpleNamespace(config=dict(class_names=['rose', 'tea rose']))
    assert class_labels(two, ['a photo of a Rose', 'one tea rose', 'a prose text', '']).tolist() == [0, 1, 2, 2]
    assert class_labels(SimpleNamespace(config={}), ['a rose']) is None

def test_sizes_that_cannot_work(pipeline):
    from t2i_nb.sampling import latent_shape, sample_images
    assert latent_shape(pipeline) == (8, 8, 8) and latent_shape(pipeline, 96, 64) == (8, 12, 8)
    with pytest.raises(InputError, match='height 70 is not a multiple of 16; use 64'): latent_shape(pipeline, 70)
    with pytest.raises(InputError, match='give one seed per prompt'): sample_images(pipeline, ['a', 'b'], [0])

def test_pixel_pipelines_and_others(tmp_path):
    "A model without a VAE is saved, loaded and called as diffusers' are; other pipelines are refused"
    from t2i_nb.pipeline import load_pipeline, save_pipeline
    from t2i_nb.sampling import make_generators, sample_images
    from t2i_nb.unet import build_unet
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), ['vae.name=', 'data.size=16', 'unet.width=16', 'unet.overrides={}'])
    models = load_components(cfg)
    save_pipeline(tmp_path/'pipeline', build_unet(cfg.unet, 16, 3, models.text_encoder.config.hidden_size), models, Objective(cfg.objective))
    pixels = load_pipeline(tmp_path)
    def generators(): return make_generators([0, 1])
    assert pixels(['a', 'b'], 3, generator=generators()).images == sample_images(pixels, ['a', 'b'], [0, 1], 3)
    pt = pixels(['a', 'b'], 3, generator=generators(), output_type='pt').images
    assert pt.shape == (2, 3, 16, 16) and 0 <= pt.min() and pt.max() <= 1 and pixels('a', 3).images[0].size == (16, 16)
    with pytest.raises(InputError, match='give one per prompt'): pixels(['a', 'b'], 3, generator=make_generators([0]))
    with pytest.raises(InputError, match='use pil or pt'): pixels('a', 3, output_type='latent')
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'model_index.json').write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match='holds a FluxPipeline'): load_pipeline(tmp_path/'other')
    with pytest.raises(InputError, match='holds no pipeline'): load_pipeline(tmp_path/'absent')

def test_previews_show_the_colours_of_the_pixels(pipeline):
    import torch
    from t2i_nb.data import image_to_tensor
    from t2i_nb.sampling import draw, make_generators, make_preview
    latents = []
    finished = draw(pipeline, ['']*4, make_generators(range(4)), 3, 1., callback=lambda i, t, x: latents.append(x))
    small = torch.nn.functional.adaptive_avg_pool2d(finished.clamp(-1, 1), 8)
    near = torch.stack([image_to_tensor(p, 8) for p in make_preview(pipeline)(latents[-1])])
    assert (near - small).square().mean()/small.var() < .5

# What images say ---------------------------------------------------------------------------------------------------------------

def rewrite(path, out, image=None, **facts):
    "Change what an image shows or says, as an editor would"
    from PIL import Image, PngImagePlugin
    before, chunks = read_provenance(path), PngImagePlugin.PngInfo()
    chunks.add_text('t2i', json.dumps(before | facts))
    with Image.open(path) as old: (image or old).save(out, pnginfo=chunks)
    return out

@pytest.mark.parametrize('n', (12, pytest.param(100, marks=pytest.mark.slow)))
def test_images_are_drawn_again(run, pipeline, tmp_path, n):
    from PIL import Image
    from t2i_nb.sampling import sample_images
    prompts, _, seeds = score_prompts(n)
    table = tmp_path/'prompts.csv'
    table.write_text('prompt,seed\n' + ''.join(f'"{p}",{s}\n' for p, s in zip(prompts, seeds)))
    images, digest = read_prompts(table), pipeline_digest(run)
    facts = lambda ps: provenance([p['prompt'] for p in ps], [p['seed'] for p in ps], digest, [p['negative_prompt'] for p in ps], **HOW)
    assert draw_folder(lambda *a, **k: sample_images(pipeline, *a, **k, **HOW), images, tmp_path/'many', facts) == n
    files = sorted((tmp_path/'many').glob('*.png'))
    found = [draw_again(f, pipeline) for f in files]
    assert len(found) == n and all(o.same for o in found), [o.verdict for o in found if not o.same]
    assert max(o.worst for o in found) <= 2
    text = Image.open(files[0]).text['parameters']
    assert text.splitlines()[0] == prompts[0] and f'Steps: 3, Sampler: DPM++ 2M, CFG scale: 2, Seed: {seeds[0]}, Size: 64x64' in text
    shown = Image.open(files[0]).convert('RGB')
    shown.putpixel((3, 3), (0, 255, 0))
    one = read_provenance(files[0])
    for facts, image, words in ((dict(seed=one['seed'] + 1), None, 'what it says was changed'), (dict(prompt='a blue flower'), None, 'what it says was changed'),
                                (dict(guidance_scale=2.5), None, 'what it says was changed'), ({}, shown, 'its pixels were changed')):
        verdict = draw_again(rewrite(files[0], tmp_path/'changed.png', image, **facts), pipeline)
        assert not verdict.same and words in verdict.verdict

def test_another_checkpoint_is_noticed(run, pipeline, tmp_path, capsys):
    import safetensors.torch
    from t2i_nb.sampling import sample_images
    image = save_drawn(sample_images(pipeline, ['a red flower', 'a blue flower'], [3, 4], **HOW), tmp_path/'grid.png',
                         provenance(['a red flower', 'a blue flower'], [3, 4], pipeline_digest(run), **HOW))
    assert main(['sample', str(run), '--recreate', str(image), '--out', str(tmp_path/'again.png')]) == 0
    assert 'matches' in capsys.readouterr().out and (tmp_path/'again.png').is_file()
    shutil.copytree(run, tmp_path/'other')
    weights = tmp_path/'other'/'pipeline'/'unet'/'diffusion_pytorch_model.safetensors'
    safetensors.torch.save_file({k: v*1.01 for k, v in safetensors.torch.load_file(weights).items()}, weights, metadata=dict(format='pt'))
    assert main(['sample', str(tmp_path/'other'), '--recreate', str(image)]) == 2
    assert 'does not match: it was drawn with another checkpoint' in capsys.readouterr().err
    shutil.copy(image, tmp_path/'cut.png')
    (tmp_path/'cut.png').write_bytes(image.read_bytes()[:200])
    assert main(['sample', str(run), '--recreate', str(tmp_path/'cut.png')]) == 2
    assert main(['sample', str(run), '--recreate', str(tmp_path/'absent.png')]) == 2
    assert 'Traceback' not in capsys.readouterr().err

@pytest.mark.parametrize('facts', (dict(num_inference_steps='x'), dict(sampler='nine'), dict(seed=None), dict(images=3), dict(guidance_interval=5)))
def test_damaged_chunks_are_a_sentence(run, pipeline, tmp_path, facts, capsys):
    from t2i_nb.sampling import sample_images
    image = save_drawn(sample_images(pipeline, ['a red flower'], [3], **HOW), tmp_path/'a.png', provenance(['a red flower'], [3], pipeline_digest(run), **HOW))
    assert main(['sample', str(run), '--recreate', str(rewrite(image, tmp_path/'b.png', **facts))]) == 2
    assert 'Traceback' not in capsys.readouterr().err

def test_a_digest_names_the_weights_alone(run, tmp_path):
    from t2i_nb.provenance import pipeline_digest
    digest = pipeline_digest(run)
    assert digest == pipeline_digest(run/'pipeline') and len(digest) == 16
    shutil.copytree(run/'pipeline', tmp_path/'moved')
    assert pipeline_digest(tmp_path/'moved') == digest
    index = tmp_path/'moved'/'model_index.json'
    index.write_text(index.read_text().replace('_diffusers_version', '_other_version')) # a note of versions
    scheduler = tmp_path/'moved'/'scheduler'/'scheduler_config.json'
    settings = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(settings | dict(_diffusers_version='9')))
    assert pipeline_digest(tmp_path/'moved') == digest
    scheduler.write_text(json.dumps(settings | dict(num_train_timesteps=10)))
    assert pipeline_digest(tmp_path/'moved') != digest
    scheduler.write_text(json.dumps(settings))
    weights = tmp_path/'moved'/'unet'/'diffusion_pytorch_model.safetensors'
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert pipeline_digest(tmp_path/'moved') != digest
    with pytest.raises(InputError, match='holds no weights'): pipeline_digest(tmp_path/'nowhere')

def test_only_known_settings_are_recorded():
    facts = provenance(['a', 'b'], [1, 2], 'x', ['', 'c'], guidance_interval=(.2, .9))
    assert facts['images'] == [dict(prompt='a', negative_prompt='', seed=1), dict(prompt='b', negative_prompt='c', seed=2)]
    assert facts['guidance_interval'] == [.2, .9] and facts['num_inference_steps'] == 16
    with pytest.raises(InputError, match="did you mean 'sampler'"): provenance(['a'], [1], 'x', smapler='euler')

def test_a_folder_holds_one_setting(run, pipeline, tmp_path):
    from t2i_nb.sampling import sample_images
    (tmp_path/'p.csv').write_text('prompt\na red flower\n')
    images = read_prompts(tmp_path/'p.csv', per_prompt=2)
    def facts(ps, **how): return provenance([p['prompt'] for p in ps], [p['seed'] for p in ps], pipeline_digest(run), [p['negative_prompt'] for p in ps], **HOW | how)
    def generate(*args, **kwargs): return sample_images(pipeline, *args, **kwargs, **HOW)
    assert [draw_folder(generate, images, tmp_path/'many', facts) for _ in range(2)] == [2, 0]
    (tmp_path/'many'/images[1]['name']).unlink()
    assert draw_folder(generate, images, tmp_path/'many', facts) == 1
    with pytest.raises(InputError, match='was drawn with another guidance_scale'): draw_folder(generate, images, tmp_path/'many', lambda ps: facts(ps, guidance_scale=9.))

# Tables of prompts -----------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_killed_table_goes_on(run, tmp_path):
    "SIGKILL leaves whole images with their captions; the same command draws the others, and the folder is a source"
    from PIL import Image
    from t2i_nb.data import DataConfig
    from t2i_nb.sources import load_dataset
    (tmp_path/'prompts.csv').write_text('prompt,negative_prompt\n"a red flower, in a meadow",\na blue flower,a red flower\n')
    code = 'import sys; from t2i_nb.__main__ import main; sys.exit(main(sys.argv[1:]))'
    words = [sys.executable, '-c', code, 'sample', str(run), '--prompts', 'prompts.csv', '--per-prompt', '12', '--batch', '2', '--out', 'many']
    env = os.environ | dict(OMP_NUM_THREADS='1', IN_TEST='1')
    process = subprocess.Popen(words, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    count = lambda: len(list((tmp_path/'many').glob('*.png')))
    deadline = time.monotonic() + 300
    while count() < 4 and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {f.name: f.read_bytes() for f in (tmp_path/'many').glob('*.png')}
    assert len(before) >= 4
    for name in before: Image.open(tmp_path/'many'/name).load()
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {f.name: f.read_bytes() for f in (tmp_path/'many').glob('*.png')}
    assert len(after) == 24 and all(after[k] == v for k, v in before.items()) and f'drawn now  {24 - len(before)}' in done.stdout
    data = load_dataset(DataConfig(source=str(tmp_path/'many'), size=64, validation_fraction=0.))
    assert sorted(data.captions.count(c) for c in {*data.captions}) == [12, 12] and 'a red flower, in a meadow' in data.captions

WRONG = {'': 'is empty', 'a rose\n': "has a column 'a rose'", 'promt\na\n': "did you mean 'prompt'", 'prompt;seed\na;1\n': 'with commas between them',
         'prompt\n': 'has no rows', 'prompt,seed\n,1\n': 'row 1 has no prompt', 'prompt,seed\na,1\nb,x\n': "row 2 has the seed 'x'",
         'prompt,seed\na,-1\n': "the seed '-1'", 'prompt,seed\na,1.5\n': "the seed '1.5'", 'prompt,seed\na,99999999999999999999\n': 'use a whole number',
         'prompt\na, b\n': 'more values than columns', 'prompt,prompt\na,b\n': 'names a column twice', 'prompt,label\na,b\n': "has a column 'label'",
         'prompt\n"a\n': 'is no readable CSV', 'prompt\na\0b\n': 'is no readable CSV'}

@pytest.mark.parametrize('text', WRONG)
def test_wrong_tables_are_a_sentence(run, tmp_path, text, capsys):
    (tmp_path/'p.csv').write_bytes(text.encode())
    assert main(['sample', str(run), '--prompts', str(tmp_path/'p.csv'), '--out', str(tmp_path/'many')]) == 2
    err = capsys.readouterr().err
    assert WRONG[text] in err and err.count('\n') == 1 and not (tmp_path/'many').exists()

def test_more_wrong_words(run, tmp_path, capsys):
    (tmp_path/'p.csv').write_text('prompt\n' + 'a large red flower with five round petals '*4 + '\n')
    (tmp_path/'latin.csv').write_bytes('prompt\nfl\xf6wer\n'.encode('latin-1'))
    (tmp_path/'text.png').write_text('a rose')
    out = ['--out', str(tmp_path/'x'/'a.png')]
    for words, sentence in ((['--prompts', str(tmp_path/'p.csv')], 'tokens and the text encoder takes'),
                            (['--prompts', str(tmp_path/'latin.csv')], 'is not UTF-8'), (['--prompts', str(tmp_path/'none.csv')], 'there is no table'),
                            (['a', '--prompts', str(tmp_path/'p.csv')], 'exclude each other'), (['a', '--size', '64'], 'write WIDTHxHEIGHT'),
                            (['a', '--guidance-interval', '1'], 'LOW,HIGH'), (['a', '--guidance-rescale', '2'], 'use 0 to 1'),
                            (['a', '--start', str(tmp_path/'text.png')], 'needs --start-level'), (['a', '--seed', '-1'], '--seed is -1'),
                            (['a', '--start', str(tmp_path/'text.png'), '--start-level', '.5'], 'cannot be read'),
                            (['a', '--start', str(tmp_path/'none.png'), '--start-level', '.5'], 'there is no image'),
                            (['a', '--start-level', '2'], '--start-level is 2'), (['a', '--num-inference-steps', '1001'], 'more than the 1000 timesteps'),
                            (['--prompts', str(tmp_path/'p.csv'), '--per-prompt', '0'], '--per-prompt is 0')):
        assert main(['sample', str(run), *words, *out]) == 2, words
        err = capsys.readouterr().err
        assert sentence in err and 'Traceback' not in err, (words, err)
    assert not (tmp_path/'x'/'a.png').exists()

def test_an_image_of_an_image(run, tmp_path, capsys):
    from PIL import Image
    Image.new('RGB', (80, 70), (200, 30, 30)).save(tmp_path/'red.png')
    Image.new('RGB', (80, 70), (30, 30, 200)).save(tmp_path/'blue.png')
    out = str(tmp_path/'a.png')
    assert main(['sample', str(run), 'a red flower', '--start', str(tmp_path/'red.png'), '--start-level', '.6', '--sampler', 'euler_a', '--out', out]) == 0
    again = ['sample', str(run), '--recreate', out]
    capsys.readouterr()
    assert main(again) == 2 and 'began with another image; give it with --start' in capsys.readouterr().err
    assert main([*again, '--start', str(tmp_path/'blue.png')]) == 2 and 'began with another image than the one given' in capsys.readouterr().err
    assert main([*again, '--start', str(tmp_path/'red.png')]) == 0

def test_unwritable_folders(run, pipeline, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='cannot be made a folder'): draw_folder(None, [], tmp_path/'file', None)

def test_another_image_is_not_the_same():
    "Recreating compares what is drawn with what is shown: 45 dB and more is rounding"
    from PIL import Image
    from t2i_nb.provenance import _compare, _facts_digest, pixel_digest
    shown, rounded, other = (Image.new('RGB', (8, 8), (v, 0, 0)) for v in (100, 101, 140))
    facts = dict(start='', pipeline='p', pixels=pixel_digest(shown))
    facts['digest'] = _facts_digest(facts)
    assert _compare(facts, shown, rounded, 'p', '').same and not _compare(facts, shown, other, 'p', '').same
    assert 'another image' in _compare(facts, shown, other, 'p', '').verdict
