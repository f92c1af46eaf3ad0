"From a scan to samples with the commands that a user types: a zip of class folders, and a table of icons with names and keywords."
import io, json, random, zipfile
from pathlib import Path
import pytest
from PIL import Image, ImageDraw
from conftest import data_dir
from t2i_nb.__main__ import main

# the only thing smaller than what a user would type: the network and how long it is trained
SHORT = ['unet.width=16', 'unet.attention_size=8', 'train.n_images=32', 'train.global_batch=8', 'train.warmup_images=8', 'train.log_images=8',
         'train.validation_images=32', 'train.checkpoint_images=32', 'sample.num_inference_steps=2']
OURS = ['vae.name=tiny', 'data.size=64', 'text.max_length=24'] # the recipe's own VAE is a download

def run(*commands):
    for words in commands: assert main([str(w) for w in words]) == 0, words

def photographs(path):
    "A zip of six classes, cut out of photographs that scikit-image ships: 32 for training, of which every fourth is a smaller copy, and 8 for testing"
    import skimage
    rng, folder = random.Random(0), Path(skimage.__file__).parent/'data'
    with zipfile.ZipFile(path, 'w') as archive:
        def put(name, image, quality):
            out = io.BytesIO()
            image.save(out, 'JPEG', quality=quality)
            archive.writestr(name, out.getvalue())
        for name, file in dict(astronaut='astronaut.png', cat='chelsea.png', coffee='coffee.png', rocket='rocket.jpg', retina='retina.jpg', stars='hubble_deep_field.jpg').items():
            with Image.open(folder/file) as whole: whole = whole.convert('RGB')
            for i in range(32):
                side = rng.randrange(120, 240)
                x, y = rng.randrange(whole.width - side), rng.randrange(whole.height - side)
                image = whole.crop((x, y, x + side, y + side)).resize((96, 96))
                put(f'{"train" if i < 24 else "test"}/{name}/{i:02}.jpg', image, 92)
                if i < 24 and i % 3 == 0: put(f'train/{name}/{i:02} small.jpg', image.resize((80, 80)), 70)
    return path

def icons(path, n=96):
    "A table of transparent icons with a name and keywords each"
    import pyarrow, pyarrow.parquet
    colours, shapes = ('red', 'green', 'blue', 'gold', 'purple', 'teal'), ('disc', 'ring', 'square', 'star')
    def icon(i):
        image, a = Image.new('RGBA', (64, 64), (0, 0, 0, 0)), 4 + i//24
        pen, box, colour = ImageDraw.Draw(image), (a, a, 60 - a, 60 - a), colours[i % 6]
        kind = i//6 % 4
        if kind == 0: pen.ellipse(box, fill=colour)
        elif kind == 1: pen.ellipse(box, outline=colour, width=9)
        elif kind == 2: pen.rectangle(box, fill=colour)
        else: pen.regular_polygon((32, 32, 28 - a), 3 + i//24, rotation=7*i, fill=colour)
        out = io.BytesIO()
        image.save(out, 'PNG')
        return dict(image=out.getvalue(), name=f'{colour} {shapes[kind]}', keywords=[colour, shapes[kind], 'icon', 'flat', 'small'])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([icon(i) for i in range(n)]), path)
    return path

shared = [pytest.param('shared', marks=pytest.mark.slow)]

@pytest.mark.parametrize('which', ['shipped', *(shared if (data_dir/'flowers12').exists() else [])])
def test_a_zip_of_class_folders(which, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zip_file = photographs(tmp_path/'mine.zip') if which == 'shipped' else data_dir/'flowers12'/'images_224.zip'
    source = [f'data.source={zip_file}', 'data.validation_fraction=.2']
    run(['scan', zip_file],
        ['train', 'folder', '--run-dir', 'runs/mine', '--set', *source, *OURS, *SHORT],
        ['sample', 'runs/mine', 'a photo of a cat', 'a photo of a rocket'],
        ['evaluate', 'runs/mine', '--n-images', '8', '--n-training', '64'])
    scan = tmp_path/'scans'/zip_file.stem
    report = json.loads((scan/'scan.json').read_text(encoding='utf-8'))
    assert report['splits'] == (dict(train=192, test=48) if which == 'shipped' else dict(train=720, test=240)) and not report['problems']
    assert report['images'] == sum(report['splits'].values()) and report['captions']['different'] == (6 if which == 'shipped' else 12)
    assert len(report['exact_duplicates']) + len(report['near_duplicates']) > 20
    assert {p.name for p in scan.iterdir()} == {'scan.json', 'findings.txt', 'examples.png', 'duplicates.png', 'attributes.png'}
    score = json.loads((tmp_path/'runs/mine/evaluation.json').read_text())
    assert score['near_copies'] >= 1 and score['n_images'] == 8

@pytest.mark.parametrize('which', ['drawn', *(shared if (data_dir/'fluent_emoji').exists() else [])])
def test_icons_with_names_and_keywords(which, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = icons(tmp_path/'icons.parquet') if which == 'drawn' else data_dir/'fluent_emoji'/'emoji_fluent3d_64_noflags_nosymbols.parquet'
    source, words = f'data.source={table}', 'data.templates=["a 3D render of a {name}", "{name}: {keywords:4}"]'
    run(['scan', table, '--set', words],
        ['train', 'folder', '--run-dir', 'runs/icons', '--set', source, words, *OURS, *SHORT],
        ['sample', 'runs/icons', 'a 3D render of a sunflower', '--out', 'sunflower.png'])
    report = json.loads((tmp_path/'scans'/table.stem/'scan.json').read_text(encoding='utf-8'))
    assert report['images'] == (96 if which == 'drawn' else 1376) and set(report['notes'].values()) == {'transparent'}
    assert report['captions']['per_image']['most'] == 2 and report['captions']['too_long'] == []
    assert (tmp_path/'sunflower.png').is_file()
