"A run that an earlier version began: its files are read, and its training goes on with the losses that it had then"
import json, zipfile
from pathlib import Path
import pytest
from t2i_nb.core import load_config
from t2i_nb.checkpoint import cost_summary, newest_checkpoint, read_cost, read_metrics
from t2i_nb.recipe import RunConfig
from t2i_nb.train import train_steps

@pytest.fixture(scope='module')
def old_run(tmp_path_factory):
    "Written by d8374eb: a finished run of 128 images, of which the checkpoint at 64 is kept"
    folder = tmp_path_factory.mktemp('old')
    with zipfile.ZipFile(Path(__file__).parent/'data'/'old_run.zip') as z: z.extractall(folder)
    return folder/'old'

def test_files_are_read(old_run):
    from t2i_nb.evaluation import load_evaluation
    cfg = load_config(old_run/'config.yaml', RunConfig)
    assert (cfg.train.n_images, cfg.data.size, cfg.vae_train) == (128, 16, RunConfig().vae_train)
    assert 'lives' in json.loads((old_run/'cost.json').read_text())
    assert (read_cost(old_run)['attempts'][0]['images_to'], cost_summary(old_run)['attempts']) == (128, 1)
    score = load_evaluation(old_run)
    assert round(score.adherence['held_out'], 3) == .125

def test_training_goes_on(old_run):
    "From the checkpoint with its old digests and names; the log, the losses and the counters are those of today"
    before = {r['images_seen']: r for r in read_metrics(old_run) if 'loss' in r}
    validated = {r['images_seen']: r['validation_loss'] for r in read_metrics(old_run) if 'validation_loss' in r}
    messages = []
    for state in train_steps(load_config(old_run/'config.yaml', RunConfig), old_run, log=messages.append): pass
    assert 'goes on at 64 images, from img-00000064' in messages
    after = {r['images_seen']: r for r in read_metrics(old_run) if 'loss' in r}
    assert before.keys() == after.keys() == {32, 64, 96, 128}
    for n in before: assert after[n]['loss'] == pytest.approx(before[n]['loss'], abs=1e-4), n # another machine rounds otherwise
    assert sum(state.validation_bins)/8 == pytest.approx(validated[128], abs=1e-3) and state.ended == 'images'
    newest = newest_checkpoint(old_run)
    counters, manifest = (json.loads((newest/f'{name}.json').read_text()) for name in ('state', 'manifest'))
    assert newest.name == 'img-00000128' and {'loss_ema', 'bad_validations'} <= {*counters} and not {'usual_loss', 'worse'} & {*counters}
    assert counters['cost']['attempts'] == 2 and {len(h) for h in manifest.values()} == {64}
    assert [o['images_lost'] for o in json.loads((old_run/'cost.json').read_text())['attempts']] == [0, 64]
