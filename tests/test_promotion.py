"Promotion against a real MLflow server and a real HTTP stand-in of AWS: whatever is sent, and whenever it is killed, one champion stays"
import gzip, io, os, random, re, shutil, signal, socket, subprocess, sys, tarfile, time
import pytest
from servers import MlflowServer, MotoServer
from t2i_nb.core import InputError, apply_overrides, find_recipe, load_config, save_config
from t2i_nb.candidate import Candidate, Limits, read_model, unpack
from t2i_nb.promotion import Registry, check_comparable, check_eval, check_draws, make_eval, model_name, paired_test, promote_model, reason
from t2i_nb.recipe import RunConfig

mlflow = pytest.importorskip('mlflow')
SMALL = ['unet.width=16', 'unet.levels=1', 'unet.overrides={}', 'data.n_images=128', 'train.lr=2e-3', 'train.warmup_images=64', 'train.ema_decay=.9',
         'train.validation_images=0', 'train.global_batch=32', 'train.micro_batch=0', 'sample.num_inference_steps=2', 'sample.guidance_scale=1']
EVAL = dict(metric='loss', n_images=16)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Runs as training leaves them: two that have learnt nothing, two that have"
    from t2i_nb.pipeline import save_pipeline
    from t2i_nb.recipe import load_components, prepare_data
    from t2i_nb.train import averaged, train_steps
    from t2i_nb.unet import build_unet
    from t2i_nb.objective import Objective
    work, cfg = tmp_path_factory.mktemp('runs'), apply_overrides(load_config(find_recipe('demo'), RunConfig), SMALL)
    models = load_components(cfg)
    data, val = (prepare_data(cfg, models, split) for split in ('train', 'validation'))
    def leave(name, unet, c):
        save_pipeline(work/name/'pipeline', unet, models, Objective(c.objective))
        save_config(c, work/name/'config.yaml')
    for seed, name in enumerate(('fresh', 'other'), 1):
        leave(name, build_unet(cfg.unet, 8, data.mean.shape[1], data.states.shape[-1], seed), cfg)
    for n, name in ((960, 'trained'), (320, 'less')):
        c = apply_overrides(cfg, [f'train.n_images={n}'])
        for state in train_steps(c, work/name, models, data, val): pass
        leave(name, averaged(state.unet, state.ema), c)
    shutil.copytree(work/'trained', work/'equal')
    leave_config = apply_overrides(load_config(work/'trained'/'config.yaml', RunConfig), ['sample.num_inference_steps=3'])
    save_config(leave_config, work/'equal'/'config.yaml') # another model by its digest, with the same losses
    return work

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    made = MlflowServer(tmp_path_factory.mktemp('mlflow')/'server').start()
    yield made
    made.kill()

@pytest.fixture(autouse=True)
def tracking(server, monkeypatch): monkeypatch.setenv('MLFLOW_TRACKING_URI', server.address)

def twice(candidate, name, **settings):
    "Promote, and promote again: nothing may change"
    first = promote_model(str(candidate), name=name, **EVAL | settings)
    before = standing(name)
    again = promote_model(str(candidate), name=name, **EVAL | settings)
    assert standing(name) == before
    assert (again.version, again.champion, again.new) == (first.version, first.champion, False) and first.new
    assert again.reason == f'this model is version {first.version}, and was decided on before: {first.reason}'
    return first

def standing(name):
    "The champion's number, and every version with its tags"
    client = mlflow.MlflowClient()
    versions = {v.version: v.tags for v in client.search_model_versions(f"name = '{name}'")}
    return client.get_model_version_by_alias(name, 'champion').version if versions else None, versions

def archive(run, path, wrong=()):
    "A run as SageMaker packs it, with further members"
    with tarfile.open(path, 'w:gz', compresslevel=1) as tar:
        for name in ('pipeline', 'config.yaml'): tar.add(run/name, name)
        for member, data in wrong: tar.addfile(member, io.BytesIO(data) if data else None)
    return path

def test_better_equal_worse(runs, tmp_path):
    "The alias moves for the better model alone; every model gets a version; a second call changes nothing"
    seen = {name: twice(runs/name, 'flowers') for name in ('fresh', 'trained', 'equal', 'less')}
    assert [(p.version, p.champion, p.better) for p in seen.values()] == [('1', '1', True), ('2', '2', True), ('3', '2', False), ('4', '2', False)]
    reasons = [p.reason for p in seen.values()]
    assert 'the first one' in reasons[0] and 'better by' in reasons[1] and 'no difference' in reasons[2] and 'worse by' in reasons[3]
    champion, versions = standing('flowers')
    tags = versions[champion]
    assert champion == '2' and tags['t2i.digest'] == seen['trained'].digest and (tags['t2i.n'], tags['t2i.metric']) == ('16', 'loss')
    assert float(tags['t2i.gain']) > 2*float(tags['t2i.gain_std_error']) > 0 and float(tags['t2i.mean']) < float(tags['t2i.champion'])
    there = mlflow.artifacts.download_artifacts('models:/flowers@champion', dst_path=str(tmp_path)) # what an application does
    assert read_model(there, 'champion').digest == tags['t2i.digest']

def test_within_noise(runs):
    "Two untrained networks obey equally little, so the champion stays"
    settings = dict(metric='adherence', n_images=24)
    assert twice(runs/'other', 'noise', **settings).better
    second = twice(runs/'fresh', 'noise', **settings)
    assert not second.better and second.champion == '1' and 'within twice its standard error' in second.reason, second.reason

def test_photographs_by_kid_and_by_loss(runs, tmp_path):
    "Images in a folder: both measures, the captions as prompts, and what cannot be compared"
    from t2i_nb.core import to_pil
    from t2i_nb.classifier import fresh_drawings
    (tmp_path/'photos').mkdir()
    for i, image in enumerate(to_pil(fresh_drawings(24)[1])):
        image.save(tmp_path/'photos'/f'{i}.png')
        (tmp_path/'photos'/f'{i}.txt').write_text('a red flower')
    made = {}
    for name, further in dict(fresh=[], trained=[], less=['objective.prediction_type=epsilon']).items():
        made[name] = tmp_path/name
        shutil.copytree(runs/name/'pipeline', made[name]/'pipeline')
        save_config(apply_overrides(load_config(runs/name/'config.yaml', RunConfig),
                                    [f'data.source={tmp_path}/photos', 'data.validation_fraction=.5', *further]), made[name]/'config.yaml')
    assert twice(made['fresh'], 'by-kid', metric='kid', n_images=8, features='classifier').better
    second = twice(made['trained'], 'by-kid', metric='kid', n_images=8, features='classifier')
    tags = standing('by-kid')[1]['2']
    assert second.version == '2' and tags['t2i.metric'] == 'kid' and float(tags['t2i.gain']) == pytest.approx(float(tags['t2i.champion']) - float(tags['t2i.mean']))
    assert twice(made['fresh'], 'by-loss', data=str(tmp_path/'photos')).better and twice(made['trained'], 'by-loss').better
    with pytest.raises(InputError, match='differ in their prediction'): promote_model(str(made['less']), name='by-loss', **EVAL)
    with pytest.raises(InputError, match='adherence needs toy flowers'): promote_model(str(made['less']), name='by-loss', metric='adherence')
    assert sorted(standing('by-loss')[1]) == ['1', '2']
    assert promote_model(str(made['fresh']), metric='loss', n_images=8).name == 't2i-photos' # named after the source

@pytest.fixture(scope='module')
def settled(runs, server):
    "A registered model with a champion"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('MLFLOW_TRACKING_URI', server.address)
        promote_model(str(runs/'fresh'), name='settled', **EVAL)
        return standing('settled')

def refused(candidate, sentence, settled, folder):
    "One sentence, nothing written, the champion as it was"
    before = sorted(folder.rglob('*'))
    with pytest.raises(InputError, match=sentence) as e: promote_model(str(candidate), name='settled', **EVAL)
    assert '\n' not in str(e.value)
    assert sorted(folder.rglob('*')) == before and standing('settled') == settled

def test_corrupt_archives(runs, settled, tmp_path):
    good, wrong = archive(runs/'trained', tmp_path/'model.tar.gz').read_bytes(), tmp_path/'wrong.tar.gz'
    tar = gzip.decompress(good)
    spoilt = {'truncated': good[:len(good)//2], 'without its end': good[:-4], 'empty': b'', 'no tar': gzip.compress(b'hello'*1000),
              'no gzip': tar, 'text': b'<html>404</html>', 'empty tar': gzip.compress(bytes(10240)),
              'tar truncated inside': gzip.compress(tar[:len(tar)//2])}
    for at in (20, len(good)//3, len(good)//2, len(good) - 200, len(good) - 6):
        flipped = bytearray(good)
        flipped[at] ^= 16
        spoilt[f'bit {at}'] = bytes(flipped)
    for what, data in spoilt.items():
        wrong.write_bytes(data)
        refused(wrong, 'wrong.tar.gz cannot be unpacked', settled, tmp_path)

def member(name, type=tarfile.REGTYPE, size=0, link=''):
    m = tarfile.TarInfo(name)
    m.type, m.size, m.linkname = type, size, link
    return m

def test_hostile_archives(runs, settled, tmp_path):
    "Members that would land elsewhere, are links, or unfold without end"
    hostile = {'../up': ('../up', tarfile.REGTYPE, 4), 'deep': ('pipeline/../../up', tarfile.REGTYPE, 4), 'absolute': (str(tmp_path/'up'), tarfile.REGTYPE, 4),
               'symlink': ('pipeline/out', tarfile.SYMTYPE, 0, '/etc'), 'relative symlink': ('out', tarfile.SYMTYPE, 0, '../..'),
               'hard link': ('same', tarfile.LNKTYPE, 0, 'config.yaml'), 'device': ('disk', tarfile.CHRTYPE), 'pipe': ('pipe', tarfile.FIFOTYPE),
               'backslash': ('..\\up', tarfile.REGTYPE, 4), 'folder': ('../folder', tarfile.DIRTYPE)}
    for what, args in hostile.items():
        path = archive(runs/'trained', tmp_path/'hostile.tar.gz', [(member(*args), b'evil'[:member(*args).size])])
        refused(path, 'cannot be unpacked .*(outside the destination|neither a plain file nor a folder)', settled, tmp_path)
    refused(archive(runs/'trained', path, [(member('config.yaml', size=4), b'evil')]), 'cannot be unpacked .*comes twice', settled, tmp_path) # a second one
    (tmp_path/'pickled').mkdir()
    shutil.copytree(runs/'trained'/'pipeline', tmp_path/'pickled'/'pipeline')
    shutil.copy(runs/'trained'/'config.yaml', tmp_path/'pickled')
    (tmp_path/'pickled'/'pipeline'/'unet'/'diffusion_pytorch_model.bin').write_bytes(b'\x80\x04.')
    refused(archive(tmp_path/'pickled', path), 'could run a program', settled, tmp_path)
    (tmp_path/'pickled'/'pipeline'/'unet'/'diffusion_pytorch_model.bin').unlink()
    index = (tmp_path/'pickled'/'pipeline'/'model_index.json')
    index.write_text(index.read_text().replace('"transformers"', '"antigravity"', 1))
    refused(archive(tmp_path/'pickled', path), "wants a class of 'antigravity' loaded", settled, tmp_path)

def test_bombs(tmp_path):
    "Megabytes of zeros, a great many files, a header without end: refused before they fill anything"
    limits, bomb = Limits(max_bytes=3_000_000, max_files=50), tmp_path/'bomb.tar.gz'
    bombs = {'zeros': [member('zeros', size=50_000_000)], 'many': [member(f'{i}') for i in range(100)],
             'folders': [member(f'{i}', tarfile.DIRTYPE) for i in range(100)]}
    for what, members in bombs.items():
        with tarfile.open(bomb, 'w:gz') as tar:
            for m in members: tar.addfile(m, io.BytesIO(bytes(m.size)))
        with pytest.raises(InputError, match='unfolds to more than 3,000,000 bytes|more than 50 files'): unpack(bomb, tmp_path/'out', limits)
    header = member('x', tarfile.XHDTYPE, 2_000_000) # extended header: tarfile would read it whole
    bomb.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(2_000_000)))
    with pytest.raises(InputError, match='cannot be unpacked .a header of 2,00'): unpack(bomb, tmp_path/'out', limits)
    tail = gzip.compress(bytes(50_000_000)) # behind the end of the archive
    bomb.write_bytes(gzip.compress(member('x').tobuf() + bytes(1024)) + tail)
    with pytest.raises(InputError, match='unfolds to more than'): unpack(bomb, tmp_path/'out', limits)
    assert [p.name for p in tmp_path.iterdir()] == ['bomb.tar.gz']

def test_broken_models(runs, settled, tmp_path):
    "Weights that are not finite, or of another network: refused before anything is registered"
    from safetensors.torch import load_file, save_file
    for what, change, sentence in (('nan', lambda k, v: v*float('nan'), 'not finite'), ('cut', lambda k, v: v[:1] if v.ndim == 4 else v, 'holds no pipeline that loads')):
        run = tmp_path/what
        shutil.copytree(runs/'trained', run)
        file = run/'pipeline'/'unet'/'diffusion_pytorch_model.safetensors'
        save_file({k: change(k, v).contiguous() for k, v in load_file(file).items()}, file)
        refused(run, sentence, settled, tmp_path)

@pytest.mark.parametrize('mute', (False, True))
def test_registry_does_not_answer(runs, tmp_path, monkeypatch, mute):
    "Refused or never answered: one sentence in seconds, no password in it, and nothing begun"
    with socket.socket() as deaf:
        deaf.bind(('127.0.0.1', 0))
        if mute: deaf.listen()
        monkeypatch.setenv('MLFLOW_TRACKING_URI', f'http://me:pass-8d1f@127.0.0.1:{deaf.getsockname()[1]}')
        monkeypatch.setattr('t2i_nb.promotion.fetch', lambda *a: pytest.fail('fetched before the registry answered'))
        start = time.monotonic()
        with pytest.raises(InputError, match='the model registry does not answer') as e: promote_model(str(runs/'fresh'), **EVAL)
    assert time.monotonic() - start < 60 and '\n' not in str(e.value) and 'pass-8d1f' not in str(e.value)

KILLS = '''
import os, signal, sys
import diffusers, mlflow.artifacts, torch, transformers # before the forks
from mlflow import MlflowClient
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from t2i_nb import promotion
candidate, name, client = sys.argv[1], sys.argv[2], MlflowClient()
def at(cls, call, when, which=1):
    real, n = getattr(cls, call), [0]
    def deadly(*args, **kwargs):
        n[0] += 1
        if n[0] < which: return real(*args, **kwargs)
        if when == 'after': real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(cls, call, deadly)
points = [(MlflowClient, 'create_run', 'after'), (HttpArtifactRepository, 'log_artifact', 'after', 3),
          (MlflowClient, 'create_model_version', 'after'),
          (MlflowClient, 'set_model_version_tag', 'after', 4), (MlflowClient, 'set_registered_model_alias', 'before'),
          (MlflowClient, 'set_registered_model_alias', 'after'), None]
for point in [points[int(i)] for i in sys.argv[3:]]:
    child = os.fork()
    if not child:
        signal.alarm(300) # rather than hang
        if point: at(*point)
        try: promotion.promote_model(candidate, name=name, metric='loss', n_images=8); os._exit(0)
        finally: os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    champion = client.get_model_version_by_alias(name, 'champion').version
    print(ended, champion, len(client.search_model_versions(f"name = '{name}'")), flush=True)
'''

ALL = [[1, 1], [1, 1], [1, 2], [1, 2], [1, 2], [2, 2], [2, 2]] # champion and number of versions after each point

@pytest.mark.skipif(os.name == 'nt', reason='forks and sends SIGKILL')
@pytest.mark.parametrize('points', [(4, 6), pytest.param(range(7), marks=pytest.mark.slow)], ids=['before the alias', 'all'])
def test_killed_at_any_point(runs, server, tmp_path, points):
    "SIGKILL along the whole way, each call going on where the last one was killed: there is always one champion, and one version in the end"
    name = f'killed-{len(points)}'
    first = promote_model(str(runs/'fresh'), name=name, metric='loss', n_images=8)
    done = subprocess.run([sys.executable, '-c', KILLS, str(runs/'trained'), name, *map(str, points)], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'))
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [ended for ended, *_ in seen] == [-signal.SIGKILL]*(len(points) - 1) + [0], (seen, done.stderr[-3000:])
    assert [where for _, *where in seen] == [ALL[i] for i in points]
    champion, versions = standing(name)
    again = promote_model(str(runs/'trained'), name=name, metric='loss', n_images=8)
    assert not again.new and again.champion == champion == '2' and 'better by' in again.reason and standing(name) == (champion, versions)
    assert versions['1']['t2i.digest'] == first.digest and versions['2']['t2i.done'] == 'yes'
    there = mlflow.artifacts.download_artifacts(f'models:/{name}@champion', dst_path=str(tmp_path/'champion'))
    assert read_model(there, 'champion').digest == again.digest

def test_champion_is_checked_before_it_is_beaten(runs, server):
    "A registered file that changed on the server: said, and nothing moves"
    promote_model(str(runs/'fresh'), name='spoilt', **EVAL)
    before = standing('spoilt')
    run = mlflow.MlflowClient().get_model_version('spoilt', '1').run_id
    file = next(p for p in (server.folder/'artifacts').rglob('diffusion_pytorch_model.safetensors') if run in p.parts and 'unet' in p.parts)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match='version 1 of spoilt in the registry are not those that were registered'): promote_model(str(runs/'trained'), name='spoilt', **EVAL)
    assert standing('spoilt') == before

def test_best_run_of_an_experiment(runs, tmp_path):
    "The finished run with a pipeline and the least validation loss, at whatever time it was reached"
    client = mlflow.MlflowClient()
    experiment = client.create_experiment('flowers-runs')
    def log(name, losses, folder, status='FINISHED'):
        run = client.create_run(experiment, run_name=name).info.run_id
        for step, loss in enumerate(losses): client.log_metric(run, 'validation_loss', loss, step=step)
        if folder:
            client.log_artifacts(run, str(runs/folder/'pipeline'), 'pipeline')
            client.log_artifact(run, str(runs/folder/'config.yaml'))
        client.set_terminated(run, status)
    with pytest.raises(InputError, match="no finished run of 'flowers-runs' has a pipeline"): promote_model(best='flowers-runs', **EVAL)
    log('late', [.9, .8], 'less'); log('early', [.5, .95], 'trained')
    log('failed', [.1], 'fresh', 'FAILED'); log('bare', [.1], None); log('unknown', [], 'fresh')
    found = promote_model(best='flowers-runs', name='best', **EVAL)
    assert found.digest == read_model(runs/'trained', '').digest and standing('best')[1]['1']['t2i.from'] == 'early'
    assert not promote_model(best='flowers-runs', name='best', **EVAL).new
    with pytest.raises(InputError, match="MLflow has no experiment 'nowhere'"): promote_model(best='nowhere', **EVAL)

def understand(prompt):
    from t2i_nb.data import WORDS
    return {k: v for k, values in WORDS.items() for v, words in values.items() if any(re.search(rf'(?<![\w-]){w}(?![\w-])', prompt) for w in words)}

@pytest.mark.parametrize('metric', ('adherence', 'kid'))
def test_toy_flowers_are_judged_by_held_out_triples(monkeypatch, metric):
    "Combinations that neither model was trained on: a model that only remembers must not win"
    from types import SimpleNamespace
    from t2i_nb.data import draw_flower, held_out_triples
    cfg, prompted = apply_overrides(load_config(find_recipe('demo'), RunConfig), SMALL), []
    def by_rule(pipeline, prompts, seeds, *how, **more):
        prompted.extend(map(understand, prompts))
        return [draw_flower(understand(p), random.Random(s)) for p, s in zip(prompts, seeds)]
    monkeypatch.setattr('t2i_nb.sampling.sample_images', by_rule)
    scores = make_eval(cfg, metric, 32).scores(SimpleNamespace(pipeline=None, cfg=cfg))
    assert len(scores) == len(prompted) == 32 and {(a['colour'], a['shape'], a['count']) for a in prompted} <= held_out_triples()
    if metric == 'adherence': assert scores == [1.]*32
    else: assert abs(sum(scores)/32) < .02

def test_both_models_get_the_same_prompts_and_no_prompt_of_the_report():
    from t2i_nb.evaluation import score_prompts
    assert not set(score_prompts(256, True, 0, 'promotion')[2]) & set(score_prompts(256)[2])

def test_paired(runs):
    "Better on nearly every image, equal, by luck, worse; and the sentence for each"
    base = [i % 7/7 for i in range(64)]
    closely, luck = [b + .1 + .01*(i % 3) for i, b in enumerate(base)], [b + (-1)**i*.2 for i, b in enumerate(base)]
    cases = {'better by': closely, 'no difference': base, 'within twice': luck[:-1] + [luck[-1] + .5], 'worse by': [b - 1 for b in closely]}
    for words, ours in cases.items():
        v = paired_test(ours, base)
        assert v.better == (words == 'better by') and words in reason('score', 64, v, 'champion')
        assert paired_test([-o for o in ours], [-b for b in base], -1) .gain == pytest.approx(v.gain)
    with pytest.raises(InputError, match='64 scores and 63'): paired_test(base, base[1:])

def test_what_can_be_evaluated():
    cfg = apply_overrides(load_config(find_recipe('demo'), RunConfig), SMALL)
    photos = apply_overrides(cfg, ['data.source=/data/my photos.parquet'])
    assert (make_eval(cfg).metric, make_eval(photos, features='classifier').metric) == ('adherence', 'kid')
    assert (model_name(cfg), model_name(photos)) == ('t2i-toy_flowers', 't2i-my-photos')
    with pytest.raises(InputError, match="no metric 'los' .did you mean 'loss'"): check_eval('los', 48)
    with pytest.raises(InputError, match='--data is for photographs'): make_eval(cfg, data='photos')
    with pytest.raises(InputError, match='adherence needs toy flowers'): make_eval(photos, 'adherence')

def test_models(runs, tmp_path):
    "The digest is of the content; what a folder lacks or should not hold; losses of different things"
    fresh = read_model(runs/'fresh', 'fresh')
    assert read_model(runs/'fresh', 'again').digest == fresh.digest != read_model(runs/'other', 'other').digest and len(fresh.digest) == 40
    assert read_model(runs/'trained', '').digest != read_model(runs/'equal', '').digest # more steps are another product
    with pytest.raises(InputError, match='holds no pipeline/model_index.json'): read_model(tmp_path, 'it')
    for name in ('a', 'b'): shutil.copytree(runs/'fresh', tmp_path/name)
    with pytest.raises(InputError, match='holds no pipeline/model_index.json'): read_model(tmp_path, 'two of them')
    shutil.rmtree(tmp_path/'b')
    assert read_model(tmp_path, 'packed with a folder around it').digest == fresh.digest
    (tmp_path/'a'/'config.yaml').unlink()
    with pytest.raises(InputError, match='holds no config.yaml'): read_model(tmp_path, 'it')
    other = Candidate(fresh.folder, apply_overrides(fresh.cfg, ['objective.prediction_type=epsilon']), '', 'other')
    with pytest.raises(InputError, match='differ in their prediction'): check_comparable(make_eval(fresh.cfg, 'loss'), fresh, other)
    check_comparable(make_eval(fresh.cfg, 'adherence'), fresh, other)
    check_draws(fresh)

def test_a_champion_of_an_older_version_is_accepted(settled, tmp_path):
    "Digests had 32 digits before 0.2 and were computed otherwise"
    from types import SimpleNamespace
    def fetched(digest): return Registry('settled').fetch_version(SimpleNamespace(version='1', tags={'t2i.digest': digest}), tmp_path/digest).digest
    assert fetched('d'*32) == settled[1]['1']['t2i.digest']
    with pytest.raises(InputError, match='are not those that were registered'): fetched('d'*40)

def test_wrong_words(tmp_path):
    for words, sentence in ((dict(), 'name a candidate, or an experiment'), (dict(candidate='a', best='b'), 'name a candidate, or an experiment'),
                            (dict(candidate='a', metric='los'), "no metric 'los' .did you mean 'loss'"), (dict(candidate='a', n_images=2), 'use 3 or more'),
                            (dict(candidate='a', name='a/b'), 'is no name for a model'), (dict(candidate='runs/no.tar.gz'), 'there is no file or folder')):
        with pytest.raises(InputError, match=sentence): promote_model(**words)

# SageMaker's stand-in ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def moto(tmp_path_factory):
    pytest.importorskip('moto', reason='moto[server] is not installed')
    made = MotoServer(tmp_path_factory.mktemp('moto')/'server').start()
    yield made
    made.kill()

def job(client, name):
    "A training job as far as promotion looks at one"
    client.create_training_job(TrainingJobName=name, RoleArn='arn:aws:iam::123456789012:role/trainer', StoppingCondition=dict(MaxRuntimeInSeconds=60),
                               AlgorithmSpecification=dict(TrainingImage='image', TrainingInputMode='File'),
                               OutputDataConfig=dict(S3OutputPath='s3://models/jobs'),
                               ResourceConfig=dict(InstanceType='ml.g4dn.xlarge', InstanceCount=2, VolumeSizeInGB=10))
    return client.describe_training_job(TrainingJobName=name)['ModelArtifacts']['S3ModelArtifacts']

def test_job(runs, moto, tmp_path, monkeypatch):
    "From the name of a job to a champion, by way of S3; and what is said where there is no job, file, key or region"
    import boto3
    for k, v in moto.settings().items(): monkeypatch.setenv(k, v)
    s3, sagemaker = boto3.client('s3'), boto3.client('sagemaker')
    s3.create_bucket(Bucket='models', CreateBucketConfiguration=dict(LocationConstraint='eu-west-1'))
    where = job(sagemaker, 'flowers-1')
    assert where.startswith('s3://models/')
    with pytest.raises(InputError, match=f'AWS could not read {where}'): promote_model('flowers-1', name='jobs', **EVAL) # not there yet
    s3.upload_file(str(archive(runs/'fresh', tmp_path/'model.tar.gz')), *where.removeprefix('s3://').split('/', 1))
    found = twice('flowers-1', 'jobs')
    assert found.better and standing('jobs')[1]['1']['t2i.from'] == 'flowers-1'
    s3.upload_file(str(archive(runs/'trained', tmp_path/'model.tar.gz')), 'models', 'by/hand.tar.gz')
    assert twice('s3://models/by/hand.tar.gz', 'jobs').champion == '2'
    before = standing('jobs')
    for candidate, sentence in (('flowers-2', "AWS could not read the job 'flowers-2'"), ('s3://nobody/x.tar.gz', 'AWS could not read s3://nobody/x.tar.gz'),
                                ('s3://models', 'names no file')):
        with pytest.raises(InputError, match=sentence): promote_model(candidate, name='jobs', **EVAL)
    with pytest.raises(InputError, match='bytes; if it is meant to'): promote_model('flowers-1', name='jobs', limits=Limits(max_bytes=1000), **EVAL)
    for k in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'): monkeypatch.delenv(k)
    monkeypatch.setenv('AWS_SHARED_CREDENTIALS_FILE', str(tmp_path/'none'))
    with pytest.raises(InputError, match='set AWS_PROFILE, or AWS_ACCESS_KEY_ID'): promote_model('flowers-1', name='jobs', **EVAL)
    monkeypatch.setenv('AWS_CONFIG_FILE', str(tmp_path/'none'))
    for k in ('AWS_REGION', 'AWS_DEFAULT_REGION'): monkeypatch.delenv(k)
    with pytest.raises(InputError, match='specify a region'): promote_model('flowers-1', name='jobs', **EVAL)
    assert standing('jobs') == before

def test_import_is_light():
    code = ("import sys, t2i_nb.promotion, t2i_nb.model_card; "
            "print([m for m in ('torch', 'diffusers', 'mlflow', 'boto3', 'botocore', 'sagemaker') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
