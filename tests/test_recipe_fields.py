"""Every field of a recipe changes something that can be seen: a batch, a network, a loss, a file, a refusal.

`CHANGES` names for each field another value, and what to look at. The fields are listed by dataclasses, so a new one without an entry
fails, and so does one that changes nothing."""
import dataclasses, json, types
from dataclasses import replace
import pytest, torch, yaml
from PIL import Image
import layouts
from t2i_nb.core import InputError, apply_overrides
from t2i_nb.objective import Objective
from t2i_nb.recipe import Components, RunConfig, TrainingData, _image_classes, check_images, check_run, load_components, open_run, prepare_data
from t2i_nb.sources import load_dataset
from t2i_nb.train import train_steps
from t2i_nb.unet import build_unet
from t2i_nb.vae import build_vae, load_vae

BASE = ['data.n_images=8', 'data.size=16', 'vae.name=', 'vae_train.n_images=8', 'vae_train.batch=4', 'unet.width=8', 'unet.levels=2', 'unet.head_dim=8',
        'unet.attention_size=8', 'train.n_images=16', 'train.global_batch=4', 'train.warmup_images=4', 'train.log_images=4', 'train.validation_images=8',
        'train.checkpoint_images=8', 'train.keep_checkpoints=9', 'train.device=cpu', 'train.precision=float32', 'sample.num_inference_steps=2']

def stored(o): # tensors as lists, so that two observations can be compared
    if isinstance(o, torch.Tensor): return o.detach().float().flatten().tolist()
    return [stored(v) for v in o] if isinstance(o, (list, tuple)) else o

def folder_of(tmp_path, n=20):
    "Pictures that are not square, with a class folder each, a table of two captions, and another table"
    folder = tmp_path/'pictures'
    if folder.exists(): return folder
    rows = []
    for i in range(n):
        path = folder/'ab'[i % 2]/f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 16), 60).convert('RGB').save(path)
        rows.append(dict(file_name=path.relative_to(folder).as_posix(), text=f'one {i}', title=f'two {i}', colour='red' if i % 3 else 'blue'))
    (folder/'metadata.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (tmp_path/'other.csv').write_text('file_name,text\n' + ''.join(f"{r['file_name']},three {i}\n" for i, r in enumerate(rows)))
    return folder

def dataset(cfg, tmp_path):
    "What the source gives"
    data = load_dataset(cfg.data)
    return len(data), list(data.captions), stored(data[0]['pixel_values']), [v.tolist() if hasattr(v, 'tolist') else v for v in _image_classes(cfg.data, data, 'train')]

def prepared(cfg, tmp_path):
    "What training reads"
    data = prepare_data(cfg, load_components(cfg))
    return tuple(data.mean.shape), stored(data.mean[:2]), tuple(data.states.shape), stored(data.states[:, :2]), len(data.flips)

def network(cfg, tmp_path):
    unet = build_unet(cfg.unet, 8, 3, 16, seed=0).eval()
    with torch.no_grad(): return stored(unet(torch.ones(1, 3, 8, 8), 500, torch.ones(1, 4, 16)).sample), str(unet)

def vae(cfg, tmp_path): return str(load_vae(cfg.vae, 16)), sum(p.numel() for p in load_vae(cfg.vae, 16).parameters())

def objective(cfg, tmp_path):
    o, draw = Objective(cfg.objective), torch.Generator().manual_seed(0)
    x0, eps, pred = torch.randn(3, 4, 3, 8, 8, generator=draw)
    t = o.sample_timesteps(torch.tensor([.1, .4, .6, .9]))
    return stored([t, o.timestep(t).float(), o.add_noise(x0, eps, t), o.target(x0, eps, t), o.loss_per_image(pred, x0, eps, t)])

def noise_data(n, seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 8, 8, generator=draw).half()
    return TrainingData(images, images.abs()/4, torch.arange(1, n + 1)[:, None], torch.randn(n + 1, 4, 16, generator=draw).half())

def training(cfg, tmp_path, monkeypatch=None):
    "Everything that a run of four steps leaves, and what it says"
    import t2i_nb.train as train
    run, messages, drawn, make_batch = tmp_path/f'run{len(list(tmp_path.glob("run*")))}', [], [], train.make_batch
    train.make_batch = lambda data, cfg, k, n: (drawn.append((k, n)), make_batch(data, cfg, k, n))[1]
    try:
        for state in train_steps(cfg, run, Components(None, None, None), noise_data(8, 0), noise_data(4, 1), log=messages.append): pass
    finally: train.make_batch = make_batch
    rows = [{k: v for k, v in json.loads(l).items() if 'second' not in k} for l in (run/'metrics.jsonl').read_text().splitlines()]
    cost = [{k: v for k, v in o.items() if k == 'dollars_per_hour'} for o in json.loads((run/'cost.json').read_text())['attempts']]
    return (rows, sorted(p.name for p in (run/'checkpoints').iterdir()), stored(list(state.unet.parameters())), stored(list(state.ema.values())),
            [m.replace(str(tmp_path), '') for m in messages], drawn, cost, state.ended, state.unet.is_gradient_checkpointing)

def sampling(cfg, tmp_path, monkeypatch):
    "What a grid asks the pipeline for"
    import t2i_nb.pipeline as p
    given = []
    monkeypatch.setattr(p, 'build_pipeline', lambda *a: types.SimpleNamespace(to=lambda device: None))
    monkeypatch.setattr(p, 'sample_images', lambda pipeline, *a, **k: given.append((a, k)) or [Image.new('RGB', (8, 8))]*len(a[0]))
    p.grid_maker(cfg, None, ['a prompt'])(types.SimpleNamespace(device='cpu'), 16)
    return given

def scoring(cfg, tmp_path, monkeypatch):
    "How many images are scored"
    import t2i_nb.run as r
    for name in ('find_pipeline', 'save_model_card', 'quiet_loading'): monkeypatch.setattr(r, name, lambda *a: tmp_path)
    monkeypatch.setattr(r, 'evaluate_run', lambda run_dir, **how: how)
    return r.Run(cfg, tmp_path).evaluate()

def following(cfg, tmp_path, monkeypatch):
    "Which trackers a training is sent to"
    import t2i_nb.pipeline, t2i_nb.run as r
    class Followed(Exception): pass
    def follow(run_dir, trackers, log): raise Followed(trackers)
    monkeypatch.setattr(t2i_nb.pipeline, 'grid_maker', lambda *a: None)
    monkeypatch.setattr(r, 'follow', follow)
    with pytest.raises(Followed) as e: r.train_run(cfg, tmp_path, None, None, None)
    return e.value.args

def maps(x): return [x]
def other_maps(x): return [x[:, :2], x.square()]

def vae_training(cfg, tmp_path):
    "Losses and weights of a VAE after two steps"
    from t2i_nb.vae_train import train_vae
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = build_vae(replace(cfg.vae, name='new', block_out_channels=(8,)), 16)
    out = [({k: v for k, v in o.items() if k not in ('seconds', 'ema')}, stored(list(o['ema'].values()))) for o in train_vae(model, pixels, cfg.vae_train, every=1)]
    return out

def vae_command(cfg, tmp_path, monkeypatch):
    "With which VAE and on how many flowers `t2i vae train` begins"
    import t2i_nb.own_images as o
    class Begun(Exception): pass
    def make_vae(out, vae, how, pixels, *a): raise Begun(vae.name, pixels)
    monkeypatch.setattr(o, 'make_vae', make_vae)
    monkeypatch.setattr(o, '_all_pixels', lambda data: data.n_images)
    (tmp_path/'r.yaml').write_text(yaml.safe_dump(dict(data=dict(source='toy_flowers', size=16), vae_train=dataclasses.asdict(cfg.vae_train))))
    with pytest.raises(Begun) as e: o.vae_train(str(tmp_path/'r.yaml'), tmp_path/'vae')
    return e.value.args

FOLDER, LEVELS = ['data.source={folder}', 'data.size=16'], ['vae.name=new', 'vae.block_out_channels=[8, 16]']
OWN_MAPS = ['vae_train.feature_network=test_recipe_fields:maps']
CHANGES = { # field: another value, what to look at, and what the recipe needs for the field to count
    'data.source': ('{folder}', dataset, []), 'data.root': ('elsewhere', dataset, ['data.source=cifar10']), 'data.size': (32, dataset, []),
    'data.n_images': (9, dataset, []), 'data.validation_fraction': (.5, dataset, FOLDER), 'data.seed': (1, dataset, []),
    'data.image_column': ('picture', dataset, ['data.source={parquet}']), 'data.caption_column': ('title', dataset, FOLDER),
    'data.captions_file': ('{other}', dataset, FOLDER), 'data.templates': ('["a {{colour}} thing"]', dataset, FOLDER), 'data.label': ('colour', dataset, []),
    'data.crop': ('random', dataset, FOLDER), 'data.flip': ('true', prepared, []),
    'text.encoder': ('{clip}', prepared, []), 'text.max_length': (12, prepared, []),
    'vae.name': ('tiny', prepared, []), 'vae.patch': (2, prepared, []), 'vae.block_out_channels': ('[8, 32]', vae, LEVELS),
    'vae.latent_channels': (2, vae, LEVELS), 'vae.layers_per_block': (2, vae, LEVELS), 'vae.norm_num_groups': (2, vae, LEVELS),
    'vae_train.n_images': (12, vae_training, []), 'vae_train.batch': (2, vae_training, []), 'vae_train.lr': (1e-4, vae_training, []),
    'vae_train.n_drawings': (7, vae_command, []),
    'vae_train.l1_weight': (1, vae_training, []), 'vae_train.kl_weight': (1, vae_training, []), 'vae_train.ema_decay': (0, vae_training, []),
    'vae_train.seed': (2, vae_training, []), 'vae_train.kl_warmup': (1, vae_training, []), 'vae_train.feature_weight': (1, vae_training, OWN_MAPS),
    'vae_train.feature_network': ('test_recipe_fields:other_maps', vae_training, [*OWN_MAPS, 'vae_train.feature_weight=1']),
    'unet.width': (16, network, []), 'unet.levels': (1, network, []), 'unet.layers_per_block': (2, network, []), 'unet.head_dim': (4, network, []),
    'unet.attention_size': (4, network, []), 'unet.overrides': ('{{"resnet_time_scale_shift": "scale_shift"}}', network, []),
    'objective.prediction_type': ('epsilon', objective, []), 'objective.beta_schedule': ('linear', objective, ['objective.prediction_type=epsilon']),
    'objective.beta_start': (1e-3, objective, ['objective.prediction_type=epsilon', 'objective.beta_schedule=linear']),
    'objective.beta_end': (.01, objective, ['objective.prediction_type=epsilon', 'objective.beta_schedule=linear']),
    'objective.zero_terminal_snr': ('true', objective, ['objective.prediction_type=v_prediction', 'objective.beta_schedule=linear']),
    'objective.snr_gamma': (1, objective, ['objective.prediction_type=epsilon']), 'objective.timestep_sampling': ('logit_normal', objective, []),
    'objective.logit_mean': (1, objective, ['objective.timestep_sampling=logit_normal']),
    'objective.logit_std': (2, objective, ['objective.timestep_sampling=logit_normal']),
    'objective.num_train_timesteps': (100, objective, []),
    'train.lr': (1e-4, training, []), 'train.weight_decay': (1, training, []), 'train.betas': ('[0.5, 0.9]', training, []),
    'train.max_grad_norm': (1e-3, training, []), 'train.global_batch': (8, training, []), 'train.micro_batch': (2, training, []),
    'train.zero_stage': (2, training, []), 'train.gradient_checkpointing': ('true', training, []), 'train.device': ('cuda', training, []),
    'train.precision': ('bfloat16', training, []), 'train.n_images': (20, training, []), 'train.max_minutes': (1e-9, training, []),
    'train.max_dollars': (1e-6, training, ['train.dollars_per_hour=3600']), 'train.dollars_per_hour': (1, training, []),
    'train.patience': (1, training, ['train.lr=0', 'train.validation_images=4']), 'train.lr_schedule': ('onecycle', training, []),
    'train.warmup_images': (100, training, []), 'train.ema_decay': (0, training, []), 'train.caption_dropout': (.9, training, []),
    'train.sample_posterior': ('true', training, []), 'train.init_from': ('{weights}', training, []), 'train.log_images': (8, training, []),
    'train.validation_images': (16, training, []), 'train.checkpoint_images': (4, training, []),
    'train.checkpoint_minutes': (1e-9, training, ['train.checkpoint_images=0']), 'train.keep_checkpoints': (1, training, []),
    'train.track': ('tensorboard', following, []), 'train.seed': (1, training, []),
    'sample.prompts': ('[one]', sampling, []), 'sample.guidance_scale': (1, sampling, []), 'sample.num_inference_steps': (3, sampling, []),
    'sample.sampler': ('euler', sampling, []), 'sample.n_images': (5, scoring, []),
}

def fields_of(cls, prefix=''):
    for f in dataclasses.fields(cls):
        kind = f.default_factory if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(kind): yield from fields_of(kind, f'{f.name}.')
        else: yield prefix + f.name

def test_all_fields_are_here(): assert set(fields_of(RunConfig)) == {*CHANGES}

@pytest.fixture(scope='module')
def known(): return {}

@pytest.mark.parametrize('field', CHANGES)
def test_field_changes_something(field, known, tmp_path_factory, tmp_path, monkeypatch):
    value, look, needs = CHANGES[field]
    shared = known.setdefault('folder', tmp_path_factory.mktemp('fields'))
    places = dict(folder=folder_of(shared), other=shared/'other.csv', parquet=shared/'set.parquet', clip=shared/'clip', weights=shared/'first.safetensors')
    if value == '{clip}': layouts.clip(places['clip'])
    if needs == ['data.source={parquet}']:
        parquet, table = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
        raw = [p.read_bytes() for p in sorted(places['folder'].rglob('*.png'))[:4]]
        parquet.write_table(table.table(dict(image=raw, picture=raw[::-1], text=list('abcd'))), places['parquet'])
    if value == '{weights}':
        from safetensors.torch import save_file
        save_file({k: v + 0 for k, v in build_unet(apply_overrides(RunConfig(), BASE).unet, 8, 3, 16, seed=5).named_parameters()}, places['weights'])
    def recipe(*more): return apply_overrides(RunConfig(), [*BASE, *(o.format(**places) for o in (*needs, *more))])
    def observe(cfg):
        given = dict(monkeypatch=monkeypatch) if 'monkeypatch' in look.__code__.co_varnames[:look.__code__.co_argcount] else {}
        try: return look(cfg, tmp_path, **given)
        except InputError as e: return str(e)
    before = (look, *needs)
    if before not in known: known[before] = observe(recipe())
    if not (isinstance(value, str) and ('{' in value or value in ('true', 'elsewhere'))): assert not isinstance(known[before], str), known[before]
    assert observe(recipe(f'{field}={value}')) != known[before], f'{field} changes nothing'

REFUSED = {'data.size=66': 'use 64 or 72', 'data.validation_fraction=0': 'share between 0 and 1', 'train.micro_batch=5': 'choose a divisor',
           'sample.sampler=eular': "did you mean 'euler'", 'unet.overrides={"dropout": 0.1}': 'could not repeat its draws', 'vae.patch=0': 'use 1, 2 or 4',
           'train.keep_checkpoints=0': 'use 1 or more', 'train.max_minutes=-1': 'use 0 for none', 'train.max_dollars=-1': 'use 0 for none',
           'train.max_dollars=5': 'set train.dollars_per_hour', 'train.lr_schedule=cosin': 'one of constant, cosine, onecycle',
           'train.zero_stage=3': 'one of 0, 1, 2', 'train.precision=half': 'one of auto, float32', 'train.caption_dropout=1': r'a share in \[0, 1\)',
           'train.n_images=3': 'less than one batch', 'objective.prediction_type=eps': 'is unknown', 'train.track=mlfow': "did you mean 'mlflow'"}

@pytest.mark.parametrize('override', REFUSED)
def test_refused(override):
    with pytest.raises(InputError, match=REFUSED[override]): check_run(apply_overrides(RunConfig(), [override]))

def test_run_directory(tmp_path):
    "One configuration, but for what decides only when it ends and where it is computed; keys that an older version lacks are not compared"
    cfg, run = apply_overrides(RunConfig(), BASE), tmp_path/'run'
    open_run(cfg, run)
    open_run(apply_overrides(cfg, ['train.max_minutes=30', 'train.device=auto', 'vae_train.lr=1']), run)
    with pytest.raises(InputError, match='holds a run with train.lr = 0.001, not 0.1'): open_run(apply_overrides(cfg, ['train.lr=0.1']), run)
    with pytest.raises(InputError, match='unet.overrides'): open_run(apply_overrides(cfg, ['unet.overrides={"a": 1}']), run)
    with pytest.raises(InputError, match='only in an empty directory'): open_run(cfg, run, fresh=True)
    with pytest.raises(InputError, match='holds no UNet'): open_run(apply_overrides(cfg, ['train.init_from=nowhere']), tmp_path/'astray')
    assert not (tmp_path/'astray').exists()
    there = yaml.safe_load((run/'config.yaml').read_text())
    del there['vae_train'], there['sample'], there['train']['keep_checkpoints']
    (run/'config.yaml').write_text(yaml.safe_dump(there))
    open_run(apply_overrides(cfg, ['sample.guidance_scale=5']), run)

def test_other_images_are_refused(tmp_path):
    data = noise_data(8, 0)
    for o in (data, replace(data, fingerprint='a'), replace(data, fingerprint='a')): check_images(tmp_path, o) # drawn images have no fingerprint
    with pytest.raises(InputError, match='a file or a caption is another one'): check_images(tmp_path, replace(data, fingerprint='b'))
    with pytest.raises(InputError, match='8 of them then, 7 now'): check_images(tmp_path, replace(data, mean=data.mean[1:], fingerprint='b'))

def test_classes():
    "An image without a class gets the number of none; an unknown column is refused"
    data = replace(RunConfig().data, n_images=8, label='colour', size=16)
    flowers = load_dataset(data)
    flowers.attributes[0] = {}
    numbers, names = _image_classes(data, flowers, 'train')
    assert [names[k] for k in numbers[1:]] == [a['colour'] for a in flowers.attributes[1:]] and numbers[0] == len(names)
    with pytest.raises(InputError, match="did you mean 'colour'"): _image_classes(replace(data, label='color'), flowers, 'train')
