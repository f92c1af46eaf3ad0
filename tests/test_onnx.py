"The exported folder: the same images as torch, in any batch, in a process without torch, and refusals in a sentence."
import json, shutil, subprocess, sys
import numpy as np
import pytest
for name in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(name)
import onnxruntime
import torch
from PIL import Image
from t2i_nb.captions import encode_prompts
from t2i_nb.core import InputError, to_pil
from t2i_nb.onnx_export import (ONNX_PRECISIONS, OnnxBackend, check_parity, check_precision, check_target, check_unet, describe_latents, export_pipeline, find_exported, graph_error,
                                graph_file, graph_tolerance, open_folder, probes, reduce_graph)
from t2i_nb.onnx_runtime import (SOLVERS, DrawingCancelled, Noise, OnnxPipeline, Plan, Refused, alphas_cumprod, decode, draw_latents, generate_main, guided_prediction,
                                 latents_to_draw, open_graph, parse, plan, randn, to_images)
from t2i_nb.provenance import compare_pixels, pipeline_digest, read_provenance, draw_again
from t2i_nb.sampling import Cancelled, draw, make_generators
from t2i_nb.pipeline import load_pipeline
from tiny_models import tiny_pipeline

PROMPTS, SEEDS = ['a red flower', 'a large blue flower with five petals', 'yellow petals', 'a white daisy at night'], [3, 2**33 + 1, 0, 11]
GUARD = '''import runpy, sys
banned = ('torch', 'diffusers', 'transformers', 't2i_nb', 'onnx')
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in banned: raise ImportError(name)
sys.meta_path.insert(0, Forbid())
del sys.argv[0]
try: runpy.run_path(sys.argv[0], run_name='__main__')
finally: assert not {*banned} & {m.split('.')[0] for m in sys.modules}
'''

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of an untrained denoiser between the shipped VAE and text encoder, exported"
    folder = tmp_path_factory.mktemp('run')
    options = dict(addition_embed_type='text', addition_embed_type_num_heads=4, resnet_time_scale_shift='scale_shift')
    pipeline = tiny_pipeline(16, overrides=options, levels=1)
    pipeline.save_pretrained(folder/'pipeline')
    how = dict(num_inference_steps=5, guidance_scale=1.5, sampler='dpmpp_2m')
    export_pipeline(load_pipeline(folder), folder/'onnx', defaults=how, weights=pipeline_digest(folder), encoder=False)
    return folder

@pytest.fixture(scope='module')
def pipeline(run): return load_pipeline(run)

@pytest.fixture(scope='module')
def loaded(run): return OnnxPipeline(run/'onnx', threads=2)

def generate_file(folder, *words, cwd=None):
    argv = [sys.executable, '-c', GUARD, str(folder/'generate.py'), *words]
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=300)

def psnr(a, b): return 10*np.log10(4/max(float(((np.clip(a, -1, 1) - np.clip(b, -1, 1))**2).mean()), 1e-12))

def test_the_manifest_holds_how_far_each_graph_is_from_torch(run):
    m = json.loads((run/'onnx'/'manifest.json').read_text())
    assert {*m['modules']} == {'text_encoder', 'context', 'step', 'unet', 'vae_decoder'}
    for name, module in m['modules'].items(): assert module['max_abs_error'] <= module['threshold'] == 1e-4, name
    assert len(m['trajectory']['per_step']) == 5 and max(m['trajectory']['per_step']) <= 1e-4 and m['trajectory']['psnr'] >= 45
    assert 'generate.py' in m['files'] and all((run/'onnx'/f).is_file() for f in m['files'])

def test_one_graph_takes_five_sizes_and_three_batches(run, pipeline):
    session = onnxruntime.InferenceSession(str(run/'onnx'/'unet'/'model.onnx'), providers=['CPUExecutionProvider'])
    states = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, PROMPTS)
    for h, w in ((8, 8), (4, 6), (16, 8), (10, 22), (32, 32)):
        for batch in (1, 3, 4):
            x, t = torch.randn(batch, 8, h, w, generator=torch.Generator().manual_seed(h)), torch.tensor(321.)
            with torch.no_grad(): wanted = pipeline.unet(x, t, states[:batch]).sample.numpy()
            feeds = dict(sample=x.numpy(), timestep=t.numpy(), encoder_hidden_states=states[:batch].numpy())
            assert abs(session.run(None, feeds)[0] - wanted).max() <= 1e-4, (h, w, batch)

@pytest.mark.parametrize('sampler', SOLVERS)
def test_images_are_those_of_torch(run, pipeline, loaded, sampler):
    generate, _ = open_folder(run)
    away = ['', 'red', '', 'petals']
    wanted = draw(pipeline, PROMPTS, make_generators(SEEDS), 6, 1.8, away, sampler)
    for image, x in zip(generate(PROMPTS, SEEDS, 6, 1.8, negative_prompt=away, sampler=sampler), to_pil(wanted)):
        assert compare_pixels(image, x)[1] >= 45

def test_settings_of_guidance_are_those_of_torch(run, pipeline, loaded):
    for how in (dict(guidance_scale=1.), dict(guidance_scale=4., guidance_rescale=.7), dict(guidance_scale=3., guidance_interval=(.2, .8))):
        a = draw(pipeline, PROMPTS, make_generators(SEEDS), 6, height=48, width=80, **how).numpy()
        z = draw_latents(loaded, PROMPTS, SEEDS, 6, height=48, width=80, **how)
        assert psnr(a, decode(loaded, z)) >= 45, how

def test_batch_order_and_threads_change_no_bit(run, loaded):
    texts, seeds = (PROMPTS*3)[:9], list(range(9))
    alone = [draw_latents(loaded, [p], [s], 4, 2., sampler='euler_a')[0] for p, s in zip(texts, seeds)]
    one = OnnxPipeline(run/'onnx', threads=1)
    for n in (1, 3, 8):
        order = np.random.default_rng(n).permutation(9)
        for k in range(0, 9, n):
            part = order[k:k + n]
            for pipe in (loaded, one):
                found = draw_latents(pipe, [texts[i] for i in part], [seeds[i] for i in part], 4, 2., sampler='euler_a')
                for i, z in zip(part, found): np.testing.assert_array_equal(z, alone[i])

def test_its_own_file_draws_without_torch(run, tmp_path, pipeline):
    done = generate_file(run/'onnx', 'a red flower', 'yellow petals', '--seed', '7', '--out', 'f.png', cwd=tmp_path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ['f-0.png', 'f-1.png'], '')
    ours = open_folder(run)[0](['a red flower', 'yellow petals'], [7, 8])
    for i, image in enumerate(ours): np.testing.assert_array_equal(np.asarray(Image.open(tmp_path/f'f-{i}.png')), np.asarray(image))
    facts = read_provenance(tmp_path/'f-1.png')
    assert (facts['prompt'], facts['seed'], facts['backend'], facts['pipeline']) == ('yellow petals', 8, 'onnx', pipeline_digest(run))
    assert draw_again(tmp_path/'f-1.png', pipeline, pipeline_digest(run)).same

@pytest.mark.parametrize('words, message', [
    (['a flower', '--height', '60'], 'the height 60 is not a multiple of 8'), ([' '], 'empty prompt'), (['red '*60], 'would be cut after'),
    (['a', '--sampler', 'magic'], "there is no sampler 'magic'"), (['a', '--provider', 'cuda'], 'CUDAExecutionProvider'),
    (['a', '--out', 'no/where.png'], 'there is no folder no'), (['a', '--out', 'x.jpg'], 'is no PNG'), (['a', '--seed', 'x'], 'see --help'),
    (['a', '--num-inference-steps', '0'], 'use 1 to 1000'), (['a', '--guidance-interval', '.9', '.1'], 'the lower first'),
    (['a', '--batch-size', '0'], 'use 1 or more'), (['a', '--folder', 'nowhere'], 'is no exported model')])
def test_wrong_words_are_refused_in_a_sentence(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert generate_main([*words] if '--folder' in words else [*words, '--folder', str(run/'onnx')]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1 and not list(tmp_path.iterdir())

def test_what_was_damaged_is_refused(run, tmp_path):
    shutil.copytree(run/'onnx', tmp_path/'onnx')
    file = tmp_path/'onnx'/'unet'/'context.onnx'
    whole = file.read_bytes()
    file.write_bytes(whole[:30_000] + bytes(8) + whole[30_008:])
    with pytest.raises(Refused, match='is not the file that was exported'): OnnxPipeline(tmp_path/'onnx')
    file.unlink()
    with pytest.raises(Refused, match='lacks unet/context.onnx'): OnnxPipeline(tmp_path/'onnx')
    file.write_bytes(whole)
    with np.load(tmp_path/'onnx'/'reference.npz') as f: stored = {k: f[k] for k in f.files}
    np.savez(tmp_path/'onnx'/'reference.npz', **stored | dict(step=stored['step'] + .01))
    manifest = tmp_path/'onnx'/'manifest.json'
    m = json.loads(manifest.read_text())
    with pytest.raises(Refused, match='reference.npz is not the file'): OnnxPipeline(tmp_path/'onnx')
    del m['files']['reference.npz']
    manifest.write_text(json.dumps(m))
    with pytest.raises(Refused, match="step is 0.01 away from torch's output"): OnnxPipeline(tmp_path/'onnx')
    manifest.write_text('{')
    with pytest.raises(Refused, match='is no exported model'): OnnxPipeline(tmp_path/'onnx')

def test_graphs_of_other_weights_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path/'run')
    weights = next((tmp_path/'run'/'pipeline'/'unet').glob('*.safetensors'))
    weights.write_bytes(weights.read_bytes()[:-4] + b'\0\0\0?')
    with pytest.raises(InputError, match='was exported from other weights'): open_folder(tmp_path/'run')

def test_the_playground_draws_with_it_and_cancels(run):
    from types import SimpleNamespace
    s = SimpleNamespace(prompt='a red flower', negative_prompt='', seed=1, num_inference_steps=6, guidance_scale=2., sampler='dpmpp_2m',
                        size=64, weights='pipeline')
    seen, backend = [], OnnxBackend(run)
    image, seconds = backend(s, lambda n, look: seen.append((n, look().size)))
    assert image.size == (64, 64) and {*seconds} == {'text', 'unet', 'vae', 'other'} and seen == [(n, (64, 64)) for n in range(1, 6)]
    with pytest.raises(Cancelled): backend(s, lambda n, look: n == 2)
    with pytest.raises(DrawingCancelled): draw_latents(backend.loaded, ['a'], [0], 4, callback=lambda *a: True)

def test_latents_of_pixel_space_unfold_as_in_torch():
    from types import SimpleNamespace
    from t2i_nb.vae import unfold_pixels
    z, pipe = randn(0, (2, 12, 4, 6)), SimpleNamespace(manifest=dict(latents=dict(vae=False)))
    np.testing.assert_array_equal(decode(pipe, z), unfold_pixels(torch.as_tensor(z)).numpy())
    pixels = tiny_pipeline(16, 'epsilon', pixels=True, levels=1)
    assert describe_latents(pixels) == dict(vae=False, channels=3, height=16, width=16, factor=1, multiple=1, scaling_factor=1., shift_factor=0.)

@pytest.mark.slow
def test_pixels_without_a_vae(tmp_path):
    pipeline = tiny_pipeline(16, 'epsilon', pixels=True, levels=1)
    m = export_pipeline(pipeline, tmp_path/'onnx', defaults=dict(num_inference_steps=4, guidance_scale=1.5, sampler='ddim'))
    assert 'vae_decoder' not in m['modules'] and m['trajectory']['psnr'] >= 45
    done = generate_file(tmp_path/'onnx', 'a red flower', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path/'image.png').size == (16, 16)

def test_what_is_no_place_for_it_is_left_alone(pipeline, tmp_path):
    (tmp_path/'mine.txt').write_text('mine')
    with pytest.raises(InputError, match='holds something that is no exported model'): export_pipeline(pipeline, tmp_path)
    with pytest.raises(InputError, match="there is no precision 'float8'"): export_pipeline(pipeline, tmp_path/'onnx', 'float8')
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']

def test_int8_has_an_honest_bound(run, pipeline, tmp_path):
    "An int8 graph passes; one whose scales are a fifth smaller does not, nor an output that is off by half a standard deviation"
    import onnx
    shutil.copyfile(run/'onnx'/graph_file('unet'), tmp_path/'int8.onnx')
    reduce_graph(tmp_path/'int8.onnx', 'int8')
    names, x = ['sample', 'timestep', 'encoder_hidden_states'], probes(pipeline, 'unet', (2, 3), 2)
    with torch.no_grad(): wanted = pipeline.unet(*x).sample
    assert graph_error(open_graph(tmp_path/'int8.onnx'), names, x, wanted) < graph_tolerance('unet', 'int8') == .25
    model = onnx.load(tmp_path/'int8.onnx')
    for w in model.graph.initializer:
        if w.name.endswith('_scale'): w.CopyFrom(onnx.numpy_helper.from_array(np.float32(.5)*onnx.numpy_helper.to_array(w), w.name))
    onnx.save(model, tmp_path/'int8.onnx')
    assert graph_error(open_graph(tmp_path/'int8.onnx'), names, x, wanted) > graph_tolerance('unet', 'int8')
    for precision, (_, least) in ONNX_PRECISIONS.items():
        check_parity(dict(modules=dict(unet=1e-5), trajectory=dict(psnr=least)), precision)
        for error, psnr_ in ((.5, 99.), (float('nan'), 99.), (1e-5, least - 1), (1e-5, float('nan'))):
            with pytest.raises(InputError, match='nothing was written'): check_parity(dict(modules=dict(unet=error), trajectory=dict(psnr=psnr_)), precision)

def test_what_the_graphs_cannot_repeat_is_refused(pipeline, run, tmp_path):
    from types import SimpleNamespace
    kind, config = type(pipeline.unet.config), dict(pipeline.unet.config)
    check_unet(pipeline.unet)
    for change, message in ((dict(num_class_embeds=10), 'conditioned on a class'), (dict(attention_type='gated'), 'does not know attention_type=gated')):
        with pytest.raises(InputError, match=message): check_unet(SimpleNamespace(config=kind(config | change)))
    with pytest.raises(InputError, match="there is no precision 'float8'"): check_precision('float8')
    with pytest.raises(InputError, match='there is no folder'): check_target(tmp_path/'no'/'where')
    with pytest.raises(InputError, match='holds no onnx/ folder'): find_exported(tmp_path)
    assert find_exported(run) == run/'onnx'

def test_noise_is_torchs(tmp_path):
    for seed in (0, 7, 2**31 + 5, 2**40 + 3, -1):
        g, ours = torch.Generator('cpu').manual_seed(seed), Noise(seed)
        for shape in ((8, 8, 8), (4, 32, 24)): assert abs(torch.randn(shape, generator=g).numpy() - ours(shape)).max() < 2.5e-6
    with pytest.raises(Refused, match='75 numbers of noise are no multiple of 16'): randn(0, (3, 5, 5))

def test_plans_know_every_kind_of_prediction():
    clean, eps = randn(1, (4, 8, 8)), randn(2, (4, 8, 8))
    kinds = dict(epsilon=(.6, .8, eps), v_prediction=(.6, .8, .6*eps - .8*clean), sample=(.6, .8, clean), flow_prediction=(.2, .8, eps - clean))
    for kind, (a, s, pred) in kinds.items():
        np.testing.assert_allclose(Plan([800], np.array([a, 1.]), np.array([s, 0.]), kind).x0(pred, a*clean + s*eps, 0), clean, atol=1e-5)
    with pytest.raises(Refused, match="the beta schedule 'sigmoid' is not known"): alphas_cumprod(dict(num_train_timesteps=1000, beta_schedule='sigmoid'))
    with pytest.raises(Refused, match='--num-inference-steps is 0; use 1 to 1000'): plan(dict(num_train_timesteps=1000, prediction_type='epsilon'), 'euler', 0)

def test_sizes_images_and_guidance(loaded):
    sizes = dict(latents=dict(channels=8, height=8, width=8, factor=8, multiple=2))
    assert latents_to_draw(sizes) == (8, 8, 8) and latents_to_draw(sizes, 96, 64) == (8, 12, 8)
    with pytest.raises(Refused, match='the height 100 is not a multiple of 16, which this model needs; use 96 or 112'): latents_to_draw(sizes, 100)
    row = np.array([-9, -1, 0, 1, 9], np.float32)
    assert np.asarray(to_images(np.broadcast_to(row, (1, 3, 1, 5)))[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    cond, uncond = randn(1, (2, 4, 8, 8)), randn(2, (2, 4, 8, 8))
    np.testing.assert_allclose(guided_prediction(cond, uncond, 1.), cond, atol=1e-5)
    np.testing.assert_allclose(guided_prediction(cond, uncond, 5., 1.).std((1, 2, 3)), cond.std((1, 2, 3)), atol=1e-4)
    texts, seeds = PROMPTS[:2], [1, 2]
    np.testing.assert_array_equal(draw_latents(loaded, texts, seeds, 4, 1.), draw_latents(loaded, texts, seeds, 4, 2., guidance_interval=(0., 0.)))

def test_options_and_prompts_come_in_any_order(tmp_path):
    words = parse(['--seed', '5', 'a red flower', '--guidance-scale', '2', 'a blue flower'], tmp_path)
    assert (words.prompts, words.seed, words.guidance_scale, words.folder) == (['a red flower', 'a blue flower'], 5, 2., tmp_path)
    with pytest.raises(Refused, match='unrecognized arguments: --sed 5; see --help'): parse(['a', '--sed', '5'], tmp_path)
    for provider, message in (('npu', "there is no provider 'npu'; use cpu, cuda, tensorrt"), ('cuda', 'this onnxruntime has no CUDAExecutionProvider')):
        with pytest.raises(Refused, match=message): open_graph('any.onnx', provider)
