"A folder as found in the wild: the good images are trained on, the damaged ones named, and nothing is changed."
import io, json, os, random
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from t2i_nb.cli import main
from t2i_nb.data import DataConfig, toy_flowers
from t2i_nb.scan import load_usable, image_findings, scan_source
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
    for i in range(15): # five of six kinds three times, a lonely caption three times ...
        kind, (suffix, data) = list(damage(flowers.image(100 + i)).items())[i % 5 if i < 12 else 5]
        (photos/f'bad{i:02}{suffix}').write_bytes(data)
        wrong[f'bad{i:02}{suffix}'] = kind.strip()
    for i in range(3):
        (photos/f'lonely{i}.txt').write_text('a flower that nobody photographed')
        wrong[f'lonely{i}.txt'] = 'caption without an image'
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
    said = capsys.readouterr().err
    assert 'train images are left out' in said and 'names all' in said
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
    code, said = train()
    assert code == 2 and said == ('t2i: the training images are not those that run began with (a file or a caption is another one); '
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
            problem, _, image = image_findings(bytes(data))
            assert (image is None) == bool(problem)
            seen.add(problem)
    assert seen >= {'', 'not an image', 'truncated or damaged'}

def test_a_link_to_nowhere_is_left_out(tmp_path):
    toy_flowers(DataConfig(n_images=1)).image(0).save(tmp_path/'0.png')
    try: (tmp_path/'1.png').symlink_to(tmp_path/'gone.png')
    except OSError: pytest.skip('this system makes no links')
    cfg = DataConfig(source=str(tmp_path))
    assert len(load_usable(cfg, 'test', tmp_path/'images.json')) == 1
    assert scan_source(read_source(cfg))['problems'] == {'1.png': 'cannot be opened'}
