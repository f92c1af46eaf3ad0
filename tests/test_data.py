"A folder as found in the wild: the good images are trained on, the damaged ones named, and nothing is changed."
import collections, io, json, os, random
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from t2i_nb.__main__ import main
from t2i_nb.core import InputError
from t2i_nb.data import (ATTRIBUTES, WORDS, DataConfig, ImageCaptionDataset, caption_flower, held_out_triples, image_to_tensor, open_image, random_attributes,
                         toy_flowers)
from t2i_nb.scan import attribute_report, image_findings, image_marks, leave_out_damaged, load_usable, near_duplicates, scan_source, without_near_copies
from t2i_nb.sources import load_dataset, read_source

TINY = ['vae.name=tiny', 'text.encoder=tiny', 'text.max_length=0', 'data.size=64', 'unet.width=16', 'unet.overrides={}',
        'unet.attention_size=4', 'train.global_batch=8', 'train.validation_images=16', 'sample.num_inference_steps=2']

def encode(image, format='PNG', **kwargs):
    out = io.BytesIO()
    image.save(out, format, **kwargs)
    return out.getvalue()

def damage(image):
    "What has to be left out: kind -> suffix, bytes"
    jpeg, png = encode(image, 'JPEG'), encode(image)
    return {'empty file': ('.jpg', b''), 'not an image': ('.jpg', b'Dear all,'), 'truncated or damaged': ('.jpg', jpeg[:-200]),
            'truncated or damaged ': ('.png', png[:len(png)//2]), 'not an image ': ('.png', png[:20]),
            'more than 100,000,000 pixels': ('.png', encode(Image.new('1', (12_000, 12_000))))}

def oddities(image):
    "What has to be converted: kind -> suffix, bytes"
    turn = Image.Exif()
    turn[274] = 6
    return {'CMYK': ('.jpg', encode(image.convert('CMYK'), 'JPEG')), '16 bit': ('.png', encode(Image.fromarray(np.full((64, 64), 40_000, np.uint16)))),
            'transparent': ('.png', encode(image.convert('RGBA'))), 'turned by EXIF': ('.jpg', encode(image, 'JPEG', exif=turn)),
            'animated, first frame used': ('.gif', encode(image, 'GIF', save_all=True, append_images=[image.rotate(90)]))}

def test_hundred_good_and_thirty_damaged(tmp_path, capsys):
    flowers, photos = toy_flowers(DataConfig(n_images=130)), tmp_path/'photos'
    photos.mkdir()
    for i in range(100):
        flowers.image(i).save(photos/f'good{i:03}.png')
        (photos/f'good{i:03}.txt').write_text(flowers.captions[i])
    wrong, odd = {}, {}
    for i in range(15): # five of six kinds three times, an unmatched caption three times ...
        kind, (suffix, data) = list(damage(flowers.image(100 + i)).items())[i % 5 if i < 12 else 5]
        (photos/f'bad{i:02}{suffix}').write_bytes(data)
        wrong[f'bad{i:02}{suffix}'] = kind.strip()
    for i in range(3):
        (photos/f'unmatched{i}.txt').write_text('a flower that was not photographed')
        wrong[f'unmatched{i}.txt'] = 'caption without an image'
    for i in range(12): # ... and twelve that are converted: thirty files of twelve kinds
        kind, (suffix, data) = list(oddities(flowers.image(115 + i)).items())[i % 5]
        (photos/f'odd{i:02}{suffix}').write_bytes(data)
        odd[f'odd{i:02}{suffix}'] = f'{kind}, no caption'
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in photos.iterdir()}

    assert main(['scan', str(photos), '--out', str(tmp_path/'report'), '--set', 'text.encoder=tiny', 'text.max_length=0']) == 0
    report = json.loads((tmp_path/'report'/'scan.json').read_text(encoding='utf-8'))
    assert report['problems'] == wrong and report['notes'] == odd and report['images'] == 112
    assert len(wrong | odd) == 30 and len({*wrong.values(), *odd.values()}) == 10 # JPEG and PNG break alike, in two kinds
    findings = (tmp_path/'report'/'findings.txt').read_text(encoding='utf-8').splitlines()
    assert sorted(findings) == sorted(f'{name}: {what}' for name, what in (wrong | odd).items())

    capsys.readouterr()
    assert main(['train', 'folder', '--run-dir', str(tmp_path/'run'), '--set', *TINY, 'train.n_images=16', f'data.source={photos}']) == 0
    errors = capsys.readouterr().err
    assert 'train images are left out' in errors and 'names all' in errors
    counts = []
    for file in (tmp_path/'run'/'cache').glob('latents-*/rows-*.safetensors'):
        with safe_open(file, 'np') as f: counts.append(f.get_slice('mean').get_shape()[0])
    cfg = DataConfig(source=str(photos)) # training and validation: the hundred, and the twelve that are converted
    assert sum(len(load_usable(cfg, split)) for split in ('train', 'validation')) == 112
    used = {data for name, (data, _) in before.items() if name not in wrong and not name.endswith('.txt')}
    assert sum(counts) == len(used) # equal images are encoded once
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in photos.iterdir()} == before

def test_damage_does_not_move_the_split(tmp_path):
    flowers = toy_flowers(DataConfig(n_images=40))
    for i in range(40): flowers.image(i).save(tmp_path/f'{i:02}.png')
    cfg = DataConfig(source=str(tmp_path), validation_fraction=.25)
    val, trained = ({Path(n).name for n in load_dataset(cfg, split).names} for split in ('validation', 'train'))
    (tmp_path/'07.png').write_bytes(b'')
    gone = {'07.png'}
    assert {Path(n).name for n in load_usable(cfg, 'validation').names} == val - gone
    assert {Path(n).name for n in load_usable(cfg).names} == trained - gone
    with pytest.raises(InputError, match='none of the 1 images can be read; the first, 07.png: empty file'):
        damaged = load_dataset(cfg, 'test')
        leave_out_damaged(damaged.subset([damaged.names.index('07.png')]))

def test_memo_follows_a_file_that_changes(tmp_path):
    flowers = toy_flowers(DataConfig(n_images=4))
    for i in range(4): flowers.image(i).save(tmp_path/f'{i}.png')
    whole = (tmp_path/'2.png').read_bytes()
    (tmp_path/'2.png').write_bytes(whole[:200])
    cfg, memo = DataConfig(source=str(tmp_path)), tmp_path/'cache'/'images.json'
    assert len(load_usable(cfg, 'test', memo)) == 3
    (tmp_path/'2.png').write_bytes(whole)
    assert len(load_usable(cfg, 'test', memo)) == 4

def test_resume_on_changed_images_asks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flowers, photos = toy_flowers(DataConfig(n_images=24)), tmp_path/'photos'
    photos.mkdir()
    for i in range(24):
        flowers.image(i).save(photos/f'{i:02}.png')
        (photos/f'{i:02}.txt').write_text(flowers.captions[i])
    def train():
        code = main(['train', 'folder', '--run-dir', 'run', '--set', *TINY, 'data.source=photos', 'train.n_images=16'])
        return code, capsys.readouterr().err.splitlines()[-1]
    assert train()[0] == 0
    for p in photos.iterdir(): os.utime(p) # a copy on another machine has other times
    assert train()[0] == 0
    caption = photos/sorted(Path(n).name for n in load_dataset(DataConfig(source='photos')).names)[0].replace('.png', '.txt')
    caption.write_text('a flower by another name')
    code, errors = train()
    assert code == 2 and errors == ('t2i: the training images are not those that run began with (a file or a caption is another one); '
                                  f"put them back, use another --run-dir, or delete {Path('run')/'data.json'} to go on with these")
    (tmp_path/'run'/'data.json').unlink()
    assert train()[0] == 0

@pytest.mark.filterwarnings('ignore') # Pillow's, of what it finds
def test_broken_bytes_never_raise():
    image, rng, seen = toy_flowers(DataConfig(n_images=1)).image(0), random.Random(0), set()
    for format in ('JPEG', 'PNG', 'GIF', 'TIFF', 'BMP', 'WEBP'):
        whole = encode(image, format)
        for _ in range(60):
            data = bytearray(whole[:rng.randrange(1, len(whole) + 1)])
            for _ in range(rng.randrange(8)): data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
            problem, _, found = image_findings(bytes(data))
            assert (found is None) == bool(problem)
            seen.add(problem)
    assert seen >= {'', 'not an image', 'truncated or damaged'}

def test_a_link_to_nowhere_is_left_out(tmp_path):
    toy_flowers(DataConfig(n_images=1)).image(0).save(tmp_path/'0.png')
    try: (tmp_path/'1.png').symlink_to(tmp_path/'gone.png')
    except OSError: pytest.skip('this system makes no links')
    cfg = DataConfig(source=str(tmp_path))
    assert len(load_usable(cfg, 'test', tmp_path/'images.json')) == 1
    assert scan_source(read_source(cfg))['problems'] == {'1.png': 'cannot be opened'}

def test_captions_name_each_attribute_in_the_stated_share():
    "Half of the captions name all six attributes, the others leave each out with probability .3"
    rng, n = random.Random(0), 6000
    named = [caption_flower(random_attributes(rng), rng)[1] for _ in range(n)]
    counts = collections.Counter(k for names in named for k in names)
    for k in ATTRIBUTES: assert abs(counts[k]/n - .85) < .02, (k, counts[k]/n)
    assert abs(sum(len(names) == 6 for names in named)/n - (.5 + .5*.7**6)) < .02
    assert {caption_flower(random_attributes(rng), rng, leave_out=0)[1] for _ in range(500)} == {tuple(ATTRIBUTES)}

@pytest.mark.parametrize('split, share', [('train', .85), ('validation', 1), ('test', 1), ('held_out', 1)])
def test_a_split_says_what_its_captions_name(split, share):
    "By the words that stand in them, and no word that is false"
    data = toy_flowers(DataConfig(n_images=1600), split)
    shown = [sum(any(w in c for w in WORDS[k][a[k]]) for k in ('colour', 'shape', 'background')) for c, a in zip(data.captions, data.attributes)]
    assert abs(sum(shown)/len(shown)/3 - share) < (.03 if share < 1 else 1e-9)
    seen = {(a['colour'], a['shape'], a['count']) in held_out_triples() for a in data.attributes}
    assert seen == {split == 'held_out'} and all({a[k] for a in data.attributes} <= set(v) for k, v in ATTRIBUTES.items())

def test_flowers_are_a_function_of_seed_split_and_number():
    some, more, other = (toy_flowers(DataConfig(n_images=n, seed=seed)) for n, seed in ((6, 0), (20, 0), (6, 1)))
    assert np.array_equal(some.image(5), more.image(5)) and some.captions == more.captions[:6] and other.captions != some.captions
    assert image_marks(some) == image_marks(more)[:6] and not set(image_marks(some)) & set(image_marks(other))
    for settings, split, errors in ((dict(crop='left'), 'train', 'use center or random'), (dict(size=4), 'train', 'at least 8 pixels'), ({}, 'valid', "did you mean 'validation'")):
        with pytest.raises(InputError, match=errors): toy_flowers(DataConfig(**settings), split)

def test_crops_belong_to_an_image():
    flowers = toy_flowers(DataConfig(n_images=8))
    def strip(i):
        wide = Image.new('RGB', (96, 64), 'grey')
        wide.paste(flowers.image(i), (16, 0))
        return wide
    def strips(**settings): return ImageCaptionDataset(flowers.captions, strip, DataConfig(crop='random', **settings))
    a, again, other = (strips(seed=k).batch(range(8)) for k in (1, 1, 2))
    assert (a == again).all() and not any((o == p).all() for o, p in zip(a, other))
    assert (strips(seed=1).subset([5, 2]).batch(range(2)) == a[[5, 2]]).all() # whatever its number
    assert (strips(seed=1).batch(range(8), flip=True) == a.flip(-1)).all()
    several = ImageCaptionDataset([('a', 'b'), 'c'], flowers.image, DataConfig())
    assert several.captions == ['a', 'c'] and several.subset([1, 0]).wordings == [('c',), ('a', 'b')]

def test_any_image_is_upright_rgb():
    flower = toy_flowers(DataConfig(n_images=1)).image(0)
    clear, turned = flower.convert('RGBA'), flower.rotate(90, expand=True)
    clear.putalpha(0)
    turned.getexif()[274] = 6
    grey = flower.convert('L')
    assert np.asarray(open_image(clear)).min() == 255 and np.array_equal(open_image(turned), flower)
    assert np.array_equal(open_image(Image.fromarray(np.asarray(grey).astype('uint16')*257)), grey.convert('RGB'))
    assert np.abs(np.asarray(open_image(flower.convert('CMYK'))).astype(int) - np.asarray(flower)).max() <= 2
    x = image_to_tensor(flower, 64)
    assert np.array_equal(((x + 1)*127.5).round().permute(1, 2, 0).numpy(), flower) and x.min() >= -1 and x.max() <= 1
    assert image_to_tensor(Image.new('RGB', (2, 900)), 64).shape == (3, 64, 64)

def test_the_lookup_finds_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    h = rng.integers(0, 2**64, 300, np.uint64)
    h[150:] = h[:150] ^ np.array([sum(1 << k for k in random.Random(i).sample(range(64), 1 + i % 4)) for i in range(150)], np.uint64) # one to four bits
    slow = [(i, j) for i in range(300) for j in range(i + 1, 300) if (int(h[i]) ^ int(h[j])).bit_count() <= 3]
    assert near_duplicates(h, np.zeros((300, 3))) == slow and len(slow) == 113
    assert near_duplicates(h, np.arange(900).reshape(300, 3)) == [] and near_duplicates([], []) == []

def test_without_near_copies_keeps_what_was_drawn():
    flowers = toy_flowers(DataConfig(n_images=8))
    assert len(without_near_copies(flowers, flowers)) == 8

def test_attributes_of_every_kind():
    rows = [dict(keywords=['sun', 'plant'], smiling=i % 50 == 0, name=f'{i}', box=dict(x=1)) for i in range(100)]
    report = attribute_report([*rows, {}])
    assert report['rare'] == ['smiling'] and set(report['shares']) == {'keywords: sun', 'keywords: plant', 'smiling'} and attribute_report([{}]) == {}

def test_a_scan_names_what_it_compared(tmp_path):
    flowers = toy_flowers(DataConfig(n_images=3))
    for i in range(3): flowers.image(i).save(tmp_path/f'{i}.png')
    flowers.image(0).save(tmp_path/'again.bmp')
    (tmp_path/'0.txt').write_text('a flower on the left side of it')
    cfg = DataConfig(source=str(tmp_path))
    report = scan_source(read_source(cfg), lambda texts: [len(t.split()) for t in texts], 5)
    assert report['exact_duplicates'] == [['0.png', 'again.bmp']] and report['near_duplicates'] == []
    assert report['captions']['too_long'] == ['a flower on the left side of it'] and report['captions']['left_or_right'] == 1
    assert report['notes'] == {n: 'no caption' for n in ('1.png', '2.png', 'again.bmp')} and json.loads(json.dumps(report))['images'] == 4
    before = report['fingerprint']
    assert scan_source(read_source(cfg))['fingerprint'] == before
    (tmp_path/'0.txt').write_text('another caption')
    assert scan_source(read_source(cfg))['fingerprint'] != before
