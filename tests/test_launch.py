"A launch against a server that answers as AWS does, and the uploaded archive trained without the library installed. Nothing leaves this machine."
import contextlib, hashlib, io, json, os, shutil, subprocess, sys, tarfile, time
from pathlib import Path
import pytest
import yaml
from PIL import Image
from servers import MotoServer
from t2i_nb import jobs as J, sagemaker_launch as L, staging as S
from t2i_nb.__main__ import main
from t2i_nb.core import InputError, apply_overrides, find_recipe, load_config
from t2i_nb.recipe import RunConfig

boto3 = pytest.importorskip('boto3')
pytest.importorskip('sagemaker')
pytestmark = pytest.mark.filterwarnings('ignore:sagemaker.train.configs has been moved:DeprecationWarning') # within the package itself
BUCKET = 'our-flowers'
ROLE = 'arn:aws:iam::123456789012:role/trainer'
FAKES = {name: 'fake-' + hashlib.sha256(name.encode()).hexdigest()[:20] for name in # never a string that looks like a real key
         ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN', 'WANDB_API_KEY', 'HF_TOKEN', 'MLFLOW_TRACKING_PASSWORD')}
TINY = ['vae.name=tiny', 'text.encoder=tiny', 'text.max_length=0', 'data.size=64', 'data.validation_fraction=0.25', 'unet.width=32',
        'unet.levels=2', 'unet.layers_per_block=1', 'unet.attention_size=8', 'train.n_images=8', 'train.global_batch=4', 'train.micro_batch=2',
        'train.zero_stage=0', 'train.warmup_images=0', 'train.log_images=4', 'train.validation_images=8', 'train.checkpoint_images=4',
        'train.device=cpu', 'train.precision=float32', 'sample.num_inference_steps=2', 'sample.n_images=1', 'sample.sampler=ddim']

@pytest.fixture(scope='module')
def server(tmp_path_factory):
    server = MotoServer(tmp_path_factory.mktemp('moto')/'server')
    try: yield server.start()
    finally: server.kill()

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    for i in range(12):
        Image.new('RGB', (64, 64), (20*i, 255 - 20*i, 90)).save(folder/f'{i:02}.png')
        (folder/f'{i:02}.txt').write_text(f'a flower number {i}')
    return folder

@pytest.fixture(scope='module')
def library(tmp_path_factory, project):
    "A checkout that stays as it is while the tests run"
    folder = tmp_path_factory.mktemp('checkout')
    for name in ('t2i_nb', 'sagemaker_src'): shutil.copytree(project/name, folder/name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', 'constraints.txt'): shutil.copyfile(project/name, folder/name)
    return folder/'t2i_nb'

@pytest.fixture
def aws(server, library, tmp_path, monkeypatch):
    "An account with a role and a bucket, secrets in the environment, and an empty working folder"
    for k in [k for k in os.environ if k.startswith(('AWS_', 'MLFLOW_', 'WANDB_', 'T2I_'))]: monkeypatch.delenv(k)
    for k, v in (server.settings() | FAKES | dict(SAGEMAKER_VALIDATE_ROLE='false', IN_TEST='1', T2I_CALIBRATION=str(tmp_path/'none'),
                 AWS_CONFIG_FILE='/dev/null', AWS_SHARED_CREDENTIALS_FILE='/dev/null')).items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(S, 'package_dir', lambda: library)
    (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here')
    s3, iam = boto3.client('s3'), boto3.client('iam')
    if not [b for b in s3.list_buckets()['Buckets'] if b['Name'] == BUCKET]:
        s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration=dict(LocationConstraint='eu-west-1'))
        iam.create_role(RoleName='trainer', AssumeRolePolicyDocument='{}')
    return s3

def words(photos, *more, experiment='flowers'):
    return ['launch', 'flowers128', '--set', *TINY, f'data.source={photos}', '--role', ROLE, '--bucket', BUCKET, '--region', 'eu-west-1',
            '--experiment', experiment, '--nodes', '2', *more]

def t2i(capsys, *argv):
    code = main(list(argv))
    written = capsys.readouterr()
    return code, written.out, written.err

def objects(s3): return {o['Key']: o['ETag'] for o in s3.list_objects_v2(Bucket=BUCKET).get('Contents', [])}

def jobs(): return sorted(j['TrainingJobName'] for j in boto3.client('sagemaker').list_training_jobs()['TrainingJobSummaries'])

def content(s3, key): return s3.get_object(Bucket=BUCKET, Key=key)['Body'].read()

def under(s3, uri): # what SageMaker would put into a channel: name -> key
    prefix = uri.removeprefix(f's3://{BUCKET}/')
    return {os.path.basename(k) if k == prefix else k[len(prefix):].lstrip('/'): k for k in objects(s3) if k.startswith(prefix)}

def test_a_launch_is_its_dry_run_and_sends_everything_once(aws, photos, capsys):
    before = jobs()
    code, out, _ = t2i(capsys, *words(photos, '--dry-run'))
    assert code == 0 and jobs() == before
    dry = yaml.safe_load(out)['request']
    code, out, err = t2i(capsys, *words(photos, '--detach'))
    assert code == 0, err
    launched = json.loads(Path('launch.json').read_text())
    real = launched['request']
    assert {k for k in {*dry, *real} if dry.get(k) != real.get(k)} == {'TrainingJobName'} # it holds the second of the launch
    assert real['TrainingJobName'].startswith('t2i-flowers-') and launched['job'] in out and {*jobs()} - {*before} == {launched['job']}
    job = boto3.client('sagemaker').describe_training_job(TrainingJobName=launched['job'])
    for k in ('HyperParameters', 'ResourceConfig', 'StoppingCondition', 'OutputDataConfig', 'InputDataConfig', 'RoleArn', 'CheckpointConfig',
              'EnableManagedSpotTraining'): assert job[k] == real[k], k
    same = lambda d: {k: v for k, v in d['AlgorithmSpecification'].items() if k != 'MetricDefinitions'} # moto makes up its own
    assert same(job) == same(real)
    there = objects(aws)
    assert all(any(key.startswith(c['DataSource']['S3DataSource']['S3Uri'].removeprefix(f's3://{BUCKET}/')) for key in there)
               for c in real['InputDataConfig'])
    assert len(under(aws, real['InputDataConfig'][0]['DataSource']['S3DataSource']['S3Uri'])) == 24
    checkpoints = real['CheckpointConfig']['S3Uri'].removeprefix(f's3://{BUCKET}/')
    for n in (4, 20): aws.put_object(Bucket=BUCKET, Key=f'{checkpoints}/checkpoints/img-{n:08}/manifest.json', Body=b'{}')
    there = objects(aws)
    time.sleep(1.1) # a job's name holds the second
    code, _, err = t2i(capsys, *words(photos, '--detach'))
    again = json.loads(Path('launch.json').read_text())
    assert code == 0 and objects(aws) == there and again['sent'] == dict(files=0, bytes=0)
    assert again['resumes_from'] == 'img-00000020' and 'the run resumes from img-00000020' in err and len(jobs()) == len(before) + 2
    code, out, _ = t2i(capsys, *words(photos, '--dry-run', '--nodes', '1', '--on-demand')) # another number of machines is the same run
    other = yaml.safe_load(out)['request']
    assert [(r['CheckpointConfig'], channels(r)['training']) for r in (other, again['request'])] == 2*[(real['CheckpointConfig'],
                                                                                                      channels(real)['training'])]
    assert 'MaxWaitTimeInSeconds' not in other['StoppingCondition'] and not other.get('EnableManagedSpotTraining')

class Cut:
    "An S3 client whose connection is cut after so many files"
    def __init__(self, s3, after): self.s3, self.left = s3, iter(range(after))
    def __getattr__(self, name): return getattr(self.s3, name)
    def upload_file(self, *args, **how):
        if next(self.left, None) is None: raise OSError('the connection is cut')
        return self.s3.upload_file(*args, **how)

def test_an_interrupted_upload_sends_what_is_missing(aws, photos, tmp_path):
    (tmp_path/'one more').write_bytes(b'x'*1000)
    parcel = S.Parcel('training', S.folder_files(photos) | {'one more': tmp_path/'one more'})
    with pytest.raises(OSError): S.send_parcel(Cut(aws, after=7), BUCKET, parcel)
    assert len(under(aws, f's3://{BUCKET}/{parcel.prefix}')) == 7
    assert S.send_parcel(aws, BUCKET, parcel)['files'] == 25 - 7 and S.send_parcel(aws, BUCKET, parcel) == dict(files=0, bytes=0)
    assert {k: content(aws, k) for k in under(aws, f's3://{BUCKET}/{parcel.prefix}').values()} == {
        f'{parcel.prefix}/{n}': f.read_bytes() for n, f in parcel.files.items()}

def test_a_large_file_is_there_whole_or_not_at_all(aws, tmp_path):
    "It travels in parts; a connection that is cut leaves no object, and the file is sent again"
    big = tmp_path/'table.parquet'
    big.write_bytes(hashlib.shake_256(b'images').digest(9*2**20)) # boto3 sends more than 8 MiB in parts
    parcel, parts = S.Parcel('training', {big.name: big}), []
    def part(params, **_):
        parts.append(params['PartNumber'])
        if params['PartNumber'] == 2: raise OSError('the connection is cut')
    aws.meta.events.register('provide-client-params.s3.UploadPart', part)
    with pytest.raises(OSError): S.send_parcel(aws, BUCKET, parcel)
    aws.meta.events.unregister('provide-client-params.s3.UploadPart', part)
    assert 2 in parts and not under(aws, f's3://{BUCKET}/{parcel.prefix}')
    assert S.send_parcel(aws, BUCKET, parcel) == dict(files=1, bytes=9*2**20)
    assert content(aws, f'{parcel.prefix}/{big.name}') == big.read_bytes() and S.send_parcel(aws, BUCKET, parcel)['files'] == 0

@pytest.mark.parametrize('spot', (False, True))
def test_what_a_budget_limits(spot):
    "MaxRuntime is the time in which the dearest expected price spends the budget; the run's own count leaves room for start and end"
    from t2i_nb.cost import EXPECTED, FINISH, HIGH, estimate_cost
    cfg, dearer = load_config(find_recipe('flowers128'), RunConfig), HIGH.spot/EXPECTED.spot if spot else 1
    how = L.LaunchConfig(spot=spot, max_hours=10)
    estimate = estimate_cost(cfg, how.instance_type, spot=spot)
    hour = estimate.dollars_per_hour*dearer
    limits = {budget: L.stopping_condition(L.replace(how, budget=budget), estimate) for budget in (0, .001, 1, 2, 1e6)}
    assert limits[0] == limits[1e6] == (36_000, 72_000) # `max_hours` alone, and twice as long with waiting
    assert [limits[b][0] for b in (1, 2)] == [int(3600*b/hour) for b in (1, 2)] and limits[.001][0] == 60 # SageMaker's least
    assert L.stopping_condition(L.replace(how, budget=1, max_hours=.5), estimate)[0] == 1800 # the shorter of both
    plain, train = (L.with_budget(cfg, L.replace(how, budget=b), estimate).train for b in (0, 1))
    assert plain.max_dollars == 0 and plain.dollars_per_hour == train.dollars_per_hour == pytest.approx(estimate.dollars_per_hour)
    minutes = estimate.times.start*HIGH.start/60 + FINISH
    assert train.max_dollars*dearer + hour*minutes/60 == pytest.approx(1)
    with pytest.raises(InputError, match='is spent before training begins'): L.with_budget(cfg, L.replace(how, budget=.01), estimate)

def test_what_the_container_reads(monkeypatch):
    "Passwords and addresses of this machine stay here"
    cfg = apply_overrides(load_config(find_recipe('flowers128'), RunConfig), ['train.track=mlflow'])
    how = L.LaunchConfig(secrets=('MLFLOW_TRACKING_PASSWORD=team/mlflow',), experiment='flowers')
    def env(**own): return L.job_environment(cfg, how, 60, own)
    assert env() == dict(MLFLOW_EXPERIMENT_NAME='flowers', T2I_SECRETS='{"MLFLOW_TRACKING_PASSWORD": "team/mlflow"}', T2I_PREDICTED_SECONDS='60')
    assert env(MLFLOW_TRACKING_URI='https://mlflow.example.org', MLFLOW_TRACKING_PASSWORD='x')['MLFLOW_TRACKING_URI'] == 'https://mlflow.example.org'
    assert not any('MLFLOW_TRACKING_URI' in env(MLFLOW_TRACKING_URI=uri) for uri in ('http://127.0.0.1:5000', 'http://localhost:5000', 'runs/mlflow'))
    assert L.read_line('epoch 3: loss=0.2') == {}
    with pytest.raises(InputError, match='holds a password'): env(MLFLOW_TRACKING_URI='https://me:word@mlflow.example.org')

def test_package_names(project):
    "Every pin is one version, and none is torch or one of its libraries"
    pins = S._pinned(project)
    assert len(pins) > 100 and all(S.Requirement(pin).specifier and S.canonicalize_name(pin.split('==')[0]) == name for name, pin in pins.items())
    assert not [name for name in pins if name.startswith(('torch', 'nvidia', 'triton'))]

def test_what_a_recipe_needs_of_this_machine_goes_along(aws, photos, library, tmp_path):
    "Latents that were computed here are a channel; weights that lie here are in the archive, under a name the container finds"
    (tmp_path/'cache').mkdir(); (tmp_path/'cache'/'latents.safetensors').write_bytes(b'latents')
    shutil.copytree(library/'pretrained'/'vae', tmp_path/'my vae')
    cfg = apply_overrides(load_config(find_recipe('flowers128'), RunConfig), [*TINY, f'data.source={photos}', f'vae.name={tmp_path}/my vae'])
    how = L.LaunchConfig(bucket=BUCKET, role=ROLE, region='eu-west-1', cache=str(tmp_path/'cache'))
    request = L.launch_job(cfg, how, dry_run=True)['request']
    assert list(channels(request)) == ['training', 'cache', 'code', 'sm_drivers'] and channels(request)['cache']['InputMode'] == 'FastFile'
    staged = load_config(S.stage_source(cfg, tmp_path/'staged')/'config.yaml', RunConfig)
    assert staged.vae.name == 'given/vae' and (tmp_path/'staged'/'given'/'vae'/'config.json').is_file()

def test_wrong_inputs_are_one_sentence_and_leave_nothing(aws, photos, capsys, monkeypatch):
    "With the bucket, the jobs and the disk compared before and after"
    ok = words(photos, '--detach')
    changed = lambda option, value: [*ok[:ok.index(option) + 1], value, *ok[ok.index(option) + 2:]]
    before = objects(aws), jobs(), boto3.client('s3').list_buckets()['Buckets'], sorted(Path('.').rglob('*'))
    def refused(argv, expected, **env):
        with monkeypatch.context() as m:
            for k, v in env.items(): m.setenv(k, v) if v else m.delenv(k, raising=False)
            code, out, err = t2i(capsys, *argv)
        assert code == 2 and expected in err and err.count('\n') == err.count('t2i: ') and not out, (argv[-4:], code, err)
        sentence = err.splitlines()[-1]
        assert 'Traceback' not in err and not any(v in err for v in FAKES.values()), sentence
    refused(changed('--role', 'missing'), "there is no role 'missing' in account 123456789012")
    refused(changed('--role', ROLE.replace('123456789012', '210987654321')), 'the role is')
    refused(changed('--role', ''), 'no role is named')
    refused(changed('--bucket', 'a-bucket-that-is-not'), "there is no bucket 'a-bucket-that-is-not'")
    refused(changed('--bucket', 's3://x'), "bucket 's3://x' is no name of a bucket")
    refused(changed('--region', 'eu-west-9'), "there is no SageMaker in the region 'eu-west-9'")
    refused([*ok, '--instance-type', 'ml.g4dn.huge'], "there is no instance type 'ml.g4dn.huge'")
    refused([*ok, '--nodes', '0'], 'nodes is 0')
    refused([*ok, '--max-hours', '2', '--max-wait-hours', '1'], 'max_wait_hours 1.0 is less than max_hours 2.0')
    refused([*ok, '--budget', '0.01'], 'is spent before training begins')
    refused([*ok, '--secret', 'hunter2'], 'names no secret')
    refused([*ok, '--cache', 'nowhere'], 'there is no folder nowhere')
    refused([*ok, '--out', 'nowhere/launch.json'], '--out nowhere/launch.json cannot be written')
    refused([*ok, '--set', 'data.source=nowhere'], "there is no data source 'nowhere'")
    refused([*ok, '--set', 'train.micro_batch=3'], 'is not a multiple of')
    refused([*ok, '--set', 'train.track=mlflow'], 'holds a password', MLFLOW_TRACKING_URI='http://me:' + 'word@mlflow.example.org')
    refused(ok, 'there are no AWS credentials', **{k: '' for k in FAKES if k.startswith('AWS')})
    refused(ok, 'AWS cannot be reached to ask who they are', AWS_ENDPOINT_URL='http://127.0.0.1:9') # a port without a server
    refused(['launch', '--attach', 'no-such-job'], "AWS could not find the training job 'no-such-job'")
    refused(['launch'], 'name one recipe')
    monkeypatch.setattr(S, 'package_dir', lambda: Path('/')/'site-packages'/'t2i_nb')
    refused(ok, 'a launch sends files of the project')
    assert before == (objects(aws), jobs(), boto3.client('s3').list_buckets()['Buckets'], sorted(Path('.').rglob('*')))

@pytest.mark.slow
def test_no_capacity_and_no_quota_say_what_to_do(aws, photos, capsys, monkeypatch):
    from botocore.exceptions import ClientError
    def refuse(code, message):
        def create(*_, **__): raise ClientError(dict(Error=dict(Code=code, Message=message)), 'CreateTrainingJob')
        monkeypatch.setattr('sagemaker.core.resources.TrainingJob.create', create)
        return t2i(capsys, *words(photos, '--detach', experiment='refused'))
    before = jobs()
    real = L.make_request # only the one that is sent is refused
    monkeypatch.setattr(L, 'make_request', lambda how, plan, *sent: real(how, plan, *sent) if sent else dict(TrainingJobName='none'))
    code, _, err = refuse('CapacityError', 'Unable to provision requested ML compute capacity')
    assert code == 2 and 'AWS has no ml.g4dn.xlarge to give now; the next in price is ml.g4dn.2xlarge' in err
    code, _, err = refuse('ResourceLimitExceeded', "The account-level service limit 'ml.g4dn.xlarge for spot training' is 0")
    assert code == 2 and "quota does not allow it" in err and jobs() == before and not Path('launch.json').exists()

def test_a_job_is_followed_through_its_log(request_of, capsys):
    job, logs = json.loads(Path('launch.json').read_text())['job'], boto3.client('logs')
    with contextlib.suppress(logs.exceptions.ResourceAlreadyExistsException): logs.create_log_group(logGroupName='/aws/sagemaker/TrainingJobs')
    stream, line = f'{job}/algo-1-1', 't2i metrics images_seen={} loss=0.{} lr=1.000e-04 images_per_second=51.20 seconds=4.0'
    logs.create_log_stream(logGroupName='/aws/sagemaker/TrainingJobs', logStreamName=stream)
    logs.put_log_events(logGroupName='/aws/sagemaker/TrainingJobs', logStreamName=stream, logEvents=[
        dict(timestamp=int(1000*time.time()) + i, message=line.format(4*i, 9 - i)) for i in range(3)])
    code, out, err = t2i(capsys, 'launch', '--attach', job, '--region', 'eu-west-1')
    assert code == 0 and '8 images seen, 51.2 images/s, loss 0.7000' in err and 'is done' in out, (out, err)

def test_the_watcher_may_leave(aws, capsys, monkeypatch):
    asked, job = [], dict(TrainingJobName='t2i-mine-1', TrainingJobStatus='InProgress', SecondaryStatusTransitions=[],
                          ResourceConfig=dict(InstanceType='ml.g5.xlarge', InstanceCount=1))
    class Answers:
        def describe_training_job(self, TrainingJobName): asked.append(1); return job | dict(SecondaryStatus='Starting' if len(asked) < 3 else 'Training')
    def sleep(seconds):
        if len(asked) == 4: raise KeyboardInterrupt
    monkeypatch.setattr(J, 'aws_client', lambda session, name, real=L.aws_client: Answers() if name == 'sagemaker' else real(session, name))
    monkeypatch.setattr(J, 'time', type('clock', (), dict(sleep=staticmethod(sleep))))
    code, out, err = t2i(capsys, 'launch', '--attach', 't2i-mine-1', '--region', 'eu-west-1')
    assert code == 0 and 'the job goes on; t2i launch --attach t2i-mine-1 watches it again' in out
    assert err.count('\n') == 2 and 'waits for machines' in err and 'trains' in err # written once each

# -- the archive -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "A virtual environment with every package of this one except ours, by links"
    folder = tmp_path_factory.mktemp('bare')
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder], check=True)
    target = next(folder.glob('lib/python3*/site-packages'))
    for path in {Path(p) for p in sys.path if p.endswith('site-packages')}:
        for entry in path.iterdir():
            if 't2i_nb' not in entry.name and entry.suffix != '.pth' and not (target/entry.name).exists(): (target/entry.name).symlink_to(entry)
    for name, module in (('torchrun', 'torch.distributed.run'), ('pip3', 'pip')):
        script(folder/'bin'/name, f'exec "{folder}/bin/python3" -m {module} "$@"')
    found = subprocess.run([folder/'bin'/'python3', '-c', 'import t2i_nb'], cwd=folder, capture_output=True, text=True, env=clean(folder))
    assert found.returncode and "No module named 't2i_nb'" in found.stderr, found.stderr # the library is not installed there
    return folder

def script(path, line):
    path.write_text(f'#!/bin/bash\n{line}\n'); path.chmod(0o755)

def clean(bare, **more):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(('AWS_', 'PYTHON', 'T2I_', 'SM_', 'MLFLOW_', 'PIP_')) and k not in FAKES}
    return keep | dict(PATH=f'{bare}/bin:{os.environ["PATH"]}', PYTHONNOUSERSITE='1', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', MPLBACKEND='Agg',
                       PYTHONDONTWRITEBYTECODE='1', PIP_NO_INDEX='1', PIP_CONFIG_FILE='/dev/null', PIP_DISABLE_PIP_VERSION_CHECK='1') | more

LAUNCHED = {}

@pytest.fixture
def request_of(aws, photos, capsys):
    "The request of one launch, made once"
    if not LAUNCHED:
        code, out, err = t2i(capsys, *words(photos, '--detach', '--budget', '5', experiment='archive'))
        assert code == 0, err
        LAUNCHED['file'] = Path('launch.json').read_text()
    Path('launch.json').write_text(LAUNCHED['file'])
    return json.loads(LAUNCHED['file'])['request']

def fetch(s3, channel, folder):
    folder.mkdir(parents=True)
    for name, key in under(s3, channel['DataSource']['S3DataSource']['S3Uri']).items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(content(s3, key))

def channels(request): return {c['ChannelName']: c for c in request['InputDataConfig']}

def check_model(root, log):
    assert (root/'model'/'pipeline'/'model_index.json').is_file(), log
    lines = [L.read_line(line) for line in log.splitlines() if L.read_line(line)]
    assert [line['images_seen'] for line in lines] == [4, 8], log # two steps, written once: by rank 0
    assert (root/'checkpoints'/'checkpoints'/'img-00000008').is_dir()

def test_the_archive_trains_where_the_library_is_not_installed(aws, request_of, bare, tmp_path):
    code, ml = tmp_path/'code', tmp_path/'ml'
    fetch(aws, channels(request_of)['code'], tmp_path/'got')
    fetch(aws, channels(request_of)['training'], tmp_path/'photos')
    with tarfile.open(tmp_path/'got'/'source.tar.gz') as tar: tar.extractall(code, filter='data')
    train = load_config(code/'config.yaml', RunConfig).train
    assert 0 < train.max_dollars < 5 and train.dollars_per_hour > 0 # the run ends in time by itself
    ran = subprocess.run([bare/'bin'/'python3', 'train.py', '--config', 'config.yaml'], cwd=code, capture_output=True, text=True, timeout=600,
                         env=clean(bare, T2I_ML_ROOT=str(ml), SM_CHANNEL_TRAINING=str(tmp_path/'photos')))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    check_model(ml, ran.stdout)

@pytest.mark.slow
def test_the_sdks_own_drivers_start_it_in_a_private_opt_ml(aws, request_of, bare, tmp_path):
    "The request's entry point and arguments, its channels as S3 has them, two processes for two pretended GPUs"
    tried = subprocess.run(['unshare', '-rm', 'bash', '-c', 'mount -t tmpfs tmpfs /opt && mkdir /opt/ml'], capture_output=True, text=True) \
        if shutil.which('unshare') else None
    if tried is None or tried.returncode or str(Path(sys.base_prefix).resolve()).startswith('/opt/'):
        pytest.skip('a private /opt/ml needs mount namespaces, which this machine does not grant')
    ml = tmp_path/'ml'
    for name, channel in channels(request_of).items(): fetch(aws, channel, ml/'input'/'data'/name)
    config = ml/'input'/'config'
    for folder in (config, ml/'model', ml/'output'/'data', ml/'checkpoints'): folder.mkdir(parents=True)
    resources = dict(current_host='algo-1', hosts=['algo-1'], current_instance_type='ml.g4dn.xlarge', network_interface_name='lo')
    (config/'resourceconfig.json').write_text(json.dumps(resources))
    (config/'inputdataconfig.json').write_text(json.dumps({n: dict(TrainingInputMode=c['InputMode']) for n, c in channels(request_of).items()}))
    (config/'hyperparameters.json').write_text(json.dumps(request_of['HyperParameters']))
    script(tmp_path/'nvidia-smi', 'echo "GPU 0: pretended"; echo "GPU 1: pretended"')
    command = [*request_of['AlgorithmSpecification']['ContainerEntrypoint'], *request_of['AlgorithmSpecification']['ContainerArguments']]
    env = clean(bare, TRAINING_JOB_NAME=request_of['TrainingJobName'], PET_STANDALONE='1', **request_of['Environment']) # on a free port
    env['PATH'] = f'{tmp_path}:{env["PATH"]}'
    ran = subprocess.run(['unshare', '-rm', 'bash', '-c', f'mount -t tmpfs tmpfs /opt && mkdir /opt/ml && mount --bind "{ml}" /opt/ml && "$@"',
                          'container', *command], cwd='/', capture_output=True, text=True, timeout=600, env=env)
    log = ran.stdout + ran.stderr
    assert ran.returncode == 0, log
    assert 'Running Torchrun Driver' in log and '--nproc_per_node=2' in log and 'already satisfied: diffusers' in log
    assert not any(line.split()[3].startswith('torch==') for line in log.splitlines() if line.startswith('Requirement already')) # none was asked for
    check_model(ml, ran.stdout)

def test_no_secret_is_left_anywhere(aws, request_of, photos, tmp_path):
    cfg = apply_overrides(load_config(find_recipe('flowers128'), RunConfig), [*TINY, f'data.source={photos}', 'train.track=mlflow'])
    S.stage_source(cfg, tmp_path/'staged')
    found = {'launch.json': Path('launch.json').read_bytes(), 'request': json.dumps(request_of).encode()}
    found |= {f'staged {p}': p.read_bytes() for p in (tmp_path/'staged').rglob('*') if p.is_file()}
    for key in objects(aws):
        found[key] = body = content(aws, key)
        if key.endswith('.tar.gz'):
            with tarfile.open(fileobj=io.BytesIO(body)) as tar: found |= {f'{key}: {m.name}': tar.extractfile(m).read() for m in tar.getmembers()}
    client = boto3.client('sagemaker')
    for job in jobs():
        described = client.describe_training_job(TrainingJobName=job)
        found[job] = json.dumps([described, client.list_tags(ResourceArn=described['TrainingJobArn'])['Tags']], default=str).encode()
    env = L.job_environment(cfg, L.LaunchConfig(secrets=('MLFLOW_TRACKING_PASSWORD=team/mlflow',)), 60)
    found['environment'] = json.dumps(env).encode()
    assert len(found) > 150 and 'team/mlflow' in env['T2I_SECRETS']
    assert [(name, k) for name, body in found.items() for k, v in FAKES.items() if v.encode() in body] == []

def test_the_container_reads_secrets_by_name(aws):
    value = 'a value that ' + 'only the container sees'
    boto3.client('secretsmanager').create_secret(Name='team/mlflow', SecretString=value)
    env = dict(T2I_SECRETS='{"MLFLOW_TRACKING_PASSWORD": "team/mlflow"}')
    L.fetch_secrets(env)
    assert env['MLFLOW_TRACKING_PASSWORD'] == value
    with pytest.raises(InputError, match="read the secret 'team/none'"): L.fetch_secrets(dict(T2I_SECRETS='{"A": "team/none"}'))
