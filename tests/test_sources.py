"Sources at their edges: broken tables, texts in other encodings, the published layouts, downloads that were cut"
import hashlib, json, shutil, sys, tarfile
import numpy as np
import pytest
import layouts
from t2i_nb.core import InputError
from t2i_nb.data import DataConfig, toy_flowers
from t2i_nb.sources import KNOWN_SETS, KnownSet, describe_face, fill_templates, get_data, load_dataset, read_source, read_table

SPLITS = ('train', 'validation', 'test')

def refuses(text): return pytest.raises(InputError, match=text)

@pytest.fixture
def garden(tmp_path):
    "Twelve flowers in folders named after their colours"
    flowers = toy_flowers(DataConfig(n_images=12))
    for i in range(12):
        folder = tmp_path/'garden'/flowers.attributes[i]['colour']
        folder.mkdir(parents=True, exist_ok=True)
        flowers.image(i).save(folder/f'{i:02}.png')
    return tmp_path/'garden'

def read(path, **settings): return read_source(DataConfig(source=str(path), **settings))

@pytest.mark.parametrize('text, name, expected', [('file_name,text\na.png,a red flower\nb.png\n', 'rows.csv', "has no column 'text' in row 2"), ('[1', 'rows.jsonl', 'cannot be read'),
                                              ('file_name,text\na.png,a small, red flower\n', 'rows.csv', 'more values than columns in row 1'), ('5\n', 'rows.jsonl', 'cannot be read'),
                                              ('name,text\na.png,b\n', 'rows.csv', "has no column 'file_name' in row 1; it has name, text")])
def test_broken_tables(text, name, expected):
    with refuses(expected): read_table(text, name, 'text')

def test_rows_of_json_end_at_a_line_feed_only():
    row = dict(file_name='a.png', text='a red\u2028flower') # a line separator, to Unicode
    assert read_table(json.dumps(row, ensure_ascii=False) + '\n', 'rows.jsonl', 'text') == [row]

def test_texts_beside_images(garden):
    first = sorted(garden.rglob('*.png'))[0]
    first.with_suffix('.txt').write_bytes(b'\xef\xbb\xbf' + 'a  flower\nby another name\n\n'.encode())
    (garden/'unmatched.txt').write_text('a text without an image')
    found = read(garden)
    assert found.captions[0] == ('a flower', 'by another name') and found.captions[1][0].startswith('a photo of a') and found.unmatched == ('unmatched.txt',)
    first.with_suffix('.txt').write_bytes('ü'.encode('latin-1'))
    with refuses('is not UTF-8'): read(garden)

def test_folders_give_captions(garden):
    "Articles, underscores, and names of splits, which are no captions"
    (garden/'tiger_lily').mkdir(), (garden/'iris').mkdir()
    for i, name in enumerate(('tiger_lily', 'iris')): shutil.copy(sorted(garden.rglob('*.png'))[0], garden/name/f'{i}.png')
    assert {'a photo of a tiger lily', 'a photo of an iris'} <= {c for c, in read(garden).captions}
    for p in sorted(garden.iterdir()): shutil.move(p, garden/'train'/p.name) if p.name == 'iris' else shutil.rmtree(p)
    assert read(garden).splits is None or set(read(garden).splits) == {'train'}

def test_a_table_that_names_missing_images(garden):
    (garden/'metadata.csv').write_text('file_name,text\nnot_here.png,a red flower\n')
    with refuses("the first is 'not_here.png'"): load_dataset(DataConfig(source=str(garden)))
    assert read(garden).unmatched == ('not_here.png',)

def test_what_is_no_source(garden, tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'no.zip').write_bytes(b'PK')
    for source, split, expected in ((tmp_path/'empty', 'train', 'holds no images'), ('toy_flower', 'train', "did you mean 'toy_flowers'"), (garden, 'held_out', 'use train, validation, test'),
                                (tmp_path/'no.zip', 'train', 'not a readable zip file'), ('cifar10', 'train', 'lacks cifar-10-batches-bin')):
        with refuses(expected): load_dataset(DataConfig(source=str(source), root=str(tmp_path)), split)
    shutil.copytree(garden, tmp_path/'tests_only'/'test')
    with refuses('has no training part, only test'): load_dataset(DataConfig(source=str(tmp_path/'tests_only')))
    assert len(load_dataset(DataConfig(source=str(tmp_path/'tests_only')), 'test')) == 12

def test_the_split_is_the_same_everywhere(garden, tmp_path):
    shutil.copytree(garden, tmp_path/'elsewhere')
    parts = [[load_dataset(DataConfig(source=str(f), validation_fraction=.25), s).names for s in SPLITS[:2]] for f in (garden, tmp_path/'elsewhere')]
    assert parts[0] == parts[1] and [len(p) for p in parts[0]] == [9, 3] and not set(parts[0][0]) & set(parts[0][1])

def test_parquet_without_the_columns(tmp_path):
    layouts.hub(tmp_path/'set', n=4)
    file = tmp_path/'set'/'data'/'train-00000-of-00001.parquet'
    with refuses("has no column 'prompt'; it has image, text"): read(file, caption_column='prompt')
    with refuses("has no column 'png'"): read(file, image_column='png')
    assert read(file, caption_column='prompt', templates=('a flower',)).captions == [('a flower',)]*4
    pytest.importorskip('datasets')
    with refuses("has no column 'prompt'"): read(f'hf:{tmp_path/"set"}', caption_column='prompt')
    with refuses("the hub set .* cannot be loaded"): read(f'hf:{tmp_path/"nowhere"}')

def test_classes_of_parquet_have_names(tmp_path):
    import pyarrow, pyarrow.parquet
    noted = dict(info=dict(features=dict(label=dict(_type='ClassLabel', names=['iris', 'rose']))))
    table = pyarrow.table(dict(image=[b'1', b'2', b'3'], label=[1, 0, -1])).replace_schema_metadata(dict(huggingface=json.dumps(noted)))
    pyarrow.parquet.write_table(table, tmp_path/'a.parquet')
    assert read(tmp_path/'a.parquet', templates=('a {label}',)).captions == [('a rose',), ('a iris',), ('a -1',)]

def test_templates():
    row = dict(name='sunflower', keywords=['sun', 'yellow', 'plant'], smiling=True, Wearing_Hat=False, none=None)
    assert fill_templates(('a {name}, {keywords:2}', '{attributes}{none}', '{text}'), row, ('a sun',)) == ('a sunflower, sun, yellow', 'smiling', 'a sun')
    for template, expected in {'a {nam}': "did you mean 'name'", 'a {name': 'cannot be filled', '{}': "names {}", '{name!r:>9}': 'cannot be filled|names'}.items():
        with refuses(expected): fill_templates((template,), row)

def test_a_template_reads_columns_and_nothing_else():
    "A foreign recipe cannot write the environment into captions"
    for template in ('{attributes.__class__}', '{attributes[0]}', '{text.__format__.__globals__[os].environ}'):
        with refuses('names {'): fill_templates((template,), dict(name='x'))

def test_a_captions_file_of_another_set(garden, tmp_path):
    (tmp_path/'others.csv').write_text('file_name,text\nelsewhere.png,a house\n')
    with refuses('names none of the images'): read(garden, captions_file=str(tmp_path/'others.csv'))
    with refuses('there is no file'): read(garden, captions_file=str(tmp_path/'none.csv'))

def test_cifar10(tmp_path):
    layouts.cifar10(tmp_path, n=4)
    cfg = DataConfig(source='cifar10', root=str(tmp_path), size=32, validation_fraction=.05)
    parts = {s: load_dataset(cfg, s) for s in SPLITS}
    assert [len(p) for p in parts.values()] == [19, 1, 4] and parts['test'].captions[:2] == ['a photo of an airplane', 'a photo of an automobile']
    assert np.array_equal(parts['test'].image(0), toy_flowers(DataConfig(n_images=24, size=32)).image(20))

def test_flowers102(tmp_path):
    layouts.flowers102(tmp_path, n=4)
    (tmp_path/'flowers102'/'text_c10'/'class_00001'/'image_99999.txt').write_text('none')
    found = read_source(DataConfig(source='flowers102', root=str(tmp_path)))
    assert [len(w) for w in found.captions] == [10]*4 and found.names[0] == 'jpg/image_00001.jpg' and found.unmatched == ('text_c10/class_00001/image_99999.txt',)

@pytest.mark.parametrize('kind', ['txt', 'csv'])
def test_celeba(tmp_path, kind):
    layouts.celeba(tmp_path, n=6)
    if kind == 'csv':
        for p in list((tmp_path/'celeba').glob('*.txt')):
            lines = [','.join(l.split()) for l in p.read_text().splitlines() if len(l.split()) > 1]
            p.with_suffix('.csv').write_text('\n'.join(lines)), p.unlink()
    cfg = DataConfig(source='celeba', root=str(tmp_path))
    parts = [load_dataset(cfg, s) for s in SPLITS]
    assert [len(p) for p in parts] == [4, 1, 1] and parts[0].names[0] == '000001.jpg'
    known = parts[0].attributes[0]
    assert known['box'] == dict(x_1=95, y_1=71, width=226, height=313) and known['landmarks']['nose_x'] == 77 and known['Male'] in (True, False)
    assert parts[0].wordings[0][0].startswith('a ') and parts[0].wordings == load_dataset(cfg, 'train').wordings
    file = next((tmp_path/'celeba').glob('list_eval_partition.*'))
    file.write_text('\n'.join(file.read_text().splitlines()[:-1]))
    with refuses('lacks 1 of 6 images, the first is 000006.jpg'): load_dataset(cfg)

def test_faces():
    import random
    face = dict.fromkeys([*layouts.HAIR, *layouts.FACE, *layouts.WEARING, *layouts.ADJECTIVES, 'Male', 'No_Beard', 'Blurry'], False)
    assert len(face) == 40 and describe_face(face, random.Random(0), 0) == 'a photo of a woman'
    man = face | dict.fromkeys(('Male', 'No_Beard', 'Attractive', 'Blond_Hair', 'Goatee', 'Bangs', 'Eyeglasses', 'Blurry'), True)
    assert describe_face(man, random.Random(0), 0) == 'a blurry photo of an attractive clean-shaven man with blond hair, bangs and a goatee, wearing glasses'

def test_an_archive_that_was_not_unpacked_to_its_end(tmp_path):
    (tmp_path/'jpg').mkdir()
    for i in range(3): (tmp_path/'jpg'/f'image_{i}.jpg').write_bytes(bytes(100))
    with tarfile.open(tmp_path/'noise.tgz', 'w:gz') as tar: tar.add(tmp_path/'jpg', 'jpg')
    md5, gone = hashlib.md5((tmp_path/'noise.tgz').read_bytes()).hexdigest(), 'http://127.0.0.1:9/noise.tgz' # no server: a download would fail
    KNOWN_SETS['noise'] = KnownSet('noise', 'do what you like', KNOWN_SETS['flowers102'].read, ('jpg', 'text_c10'), ((gone, md5, 'jpg'),), 'write text_c10 into {root}')
    try:
        (tmp_path/'noise'/'jpg').mkdir(parents=True)
        shutil.copy(tmp_path/'noise.tgz', tmp_path/'noise') # as a kill while unpacking leaves it
        with refuses('lacks text_c10, the rest of noise.tgz; t2i data get'): read_source(DataConfig(source='noise', root=str(tmp_path)))
        for _ in range(2):
            with refuses('lacks text_c10: write text_c10 into'): get_data('noise', tmp_path)
        assert len(list((tmp_path/'noise'/'jpg').iterdir())) == 3 and not (tmp_path/'noise'/'noise.tgz').exists()
        (tmp_path/'noise'/'text_c10').mkdir()
        assert get_data('noise', tmp_path) == tmp_path/'noise'
    finally: del KNOWN_SETS['noise']

def test_sets_by_name(tmp_path):
    expected = []
    with refuses('lacks img_align_celeba'): get_data('celeba', tmp_path, expected.append)
    with refuses("did you mean 'cifar10'"): get_data('cifar', tmp_path)
    assert expected == ['celeba: 202,599 aligned faces with 40 attributes (Liu 2015); non-commercial research only']

def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path/'mine_h1.py').write_text('from PIL import Image\nfrom t2i_nb.sources import Source\n'
                                       "def grey(cfg): return Source(lambda i: Image.new('L', (9, 9), 9*i), ['grey']*5, [f'{i}' for i in range(5)])\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    found = load_dataset(DataConfig(source='mine_h1:grey', templates=('{text} it is',), size=8), 'test')
    assert found.captions == ['grey it is']*5 and found.batch(range(5)).shape == (5, 3, 8, 8)
    with refuses("did you mean 'grey'"): load_dataset(DataConfig(source='mine_h1:gray'))
