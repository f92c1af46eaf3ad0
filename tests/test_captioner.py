"What the page 01c_captioner cannot show: captioning processes that are killed, and tables cut at every byte"
import contextlib, csv, json, random, shutil, subprocess, sys, time
import pytest
import safetensors.torch
import torch
from PIL import Image
from t2i_nb.core import InputError, out_of_memory
from t2i_nb.captioner import _caption_batch, append_rows, caption_names, caption_images, continue_table, load_captioner
from t2i_nb.data import DataConfig, toy_flowers
from t2i_nb.sources import load_dataset
from tiny_models import save_tiny_captioner

N, TOKENS = 48, 8

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "A folder with sub-folders, a damaged image, and names that a CSV file has to quote"
    folder = tmp_path_factory.mktemp('images')
    flowers = toy_flowers(DataConfig(n_images=N))
    for i in range(N):
        (folder/f'{i%3}').mkdir(exist_ok=True)
        flowers.image(i).save(folder/f'{i%3}'/f'"{i}", Blüte.png')
    (folder/'0'/'cut.png').write_bytes((folder/'0'/'"0", Blüte.png').read_bytes()[:400])
    return folder

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp('models')
    for family in ('florence2', 'blip'): save_tiny_captioner(folder/family, family)
    return folder

def dataset(folder): return load_dataset(DataConfig(source=str(folder)), 'test')

def rows(table):
    with table.open(newline='', encoding='utf-8') as f: return list(csv.reader(f))

# Killed and resumed --------------------------------------------------------------------------------------------------

RUN = """import sys
from t2i_nb.captioner import caption_images, load_captioner
from t2i_nb.data import DataConfig
from t2i_nb.sources import load_dataset
images, model, table, tokens = sys.argv[1:]
data = load_dataset(DataConfig(source=images), 'test')
caption_images(data, load_captioner(model, max_new_tokens=int(tokens)), table, batch=2)"""

def start(images, model, table):
    return subprocess.Popen([sys.executable, '-c', RUN, str(images), str(model), str(table), str(TOKENS)])

def count(table): return table.read_bytes().count(b'\n') if table.is_file() else 0

def kill_at(running, tables, goals):
    "Kill each process when its table has so many lines"
    end = time.monotonic() + 120
    while left := {family: o for family, o in running.items() if o.returncode is None}:
        for family, process in left.items():
            if count(tables[family]) >= goals[family]: process.kill(), process.wait()
            else: assert process.poll() is None and time.monotonic() < end
        time.sleep(.002)

def test_stopped_and_resumed(images, tmp_path):
    "Stopped in its third batch, and going on: every image once, the same captions, the rows of the first part unchanged"
    data, table, left = dataset(images), tmp_path/'c.csv', iter(range(2))
    def stopping(images):
        if next(left, None) is None: raise KeyboardInterrupt
        return describe(images)
    stopping.about = describe.about
    with pytest.raises(KeyboardInterrupt): caption_images(data, stopping, table, batch=3)
    before = table.read_bytes()
    assert before.count(b'\n') == 1 + 6
    resumed, failures = caption_images(data, describe, table, batch=3)
    assert resumed == caption_images(data, describe, tmp_path/'at_once.csv')[0] and table.read_bytes().startswith(before)
    assert len(resumed) == N and failures == {'0/cut.png': 'truncated or damaged'}

@pytest.mark.slow
def test_killed_and_resumed(images, models, tmp_path):
    "Both families at a time, each killed twice at random moments: every image once, none missing, the same captions"
    rng, data = random.Random(), dataset(images)
    tables = {family: tmp_path/f'{family}.csv' for family in ('florence2', 'blip')}
    for kill in range(2):
        running = {family: start(images, models/family, table) for family, table in tables.items()}
        try: kill_at(running, tables, {family: count(o) + rng.randint(2, N//3) for family, o in tables.items()})
        finally:
            for process in running.values(): process.kill(), process.wait()
        assert all(1 < count(o) < N + 1 for o in tables.values()), 'killed half-way'
    for family, table in tables.items():
        captioner = load_captioner(models/family, max_new_tokens=TOKENS)
        resumed, failures = caption_images(data, captioner, table)
        at_once, _ = caption_images(data, captioner, tmp_path/f'{family}_at_once.csv', batch=16)
        assert resumed == at_once and len(set(resumed.values())) > N//4
        assert failures == {'0/cut.png': 'truncated or damaged'}
        names = [name for name, _ in rows(table)[1:]]
        assert len(names) == len(set(names)) == N and {*names, '0/cut.png'} == set(caption_names(data))
        assert rows(table)[0] == ['file_name', 'text']
        assert rows(tmp_path/f'{family}.failures.csv') == [['file_name', 'reason'], ['0/cut.png', 'truncated or damaged']]

LOCK = """import sys, time
from pathlib import Path
from t2i_nb.core import only_writer
with only_writer(Path(sys.argv[1])): print(flush=True), time.sleep(60)"""

def test_one_process_a_table(images, tmp_path):
    "A second process is refused until the first is done, or dead"
    data, table = dataset(images).subset(range(3)), tmp_path/'captions.csv'
    with subprocess.Popen([sys.executable, '-c', LOCK, str(table)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match='another process is writing'): caption_images(data, describe, table)
        process.kill()
    assert len(caption_images(data, describe, table)[0]) == 3

# The table -----------------------------------------------------------------------------------------------------------

def describe(images):
    "Captions with all that a CSV file has to quote"
    return [f'a "{image.size[0]}", größe, {image.getpixel((0, 0))}' for image in images]
describe.about = dict(model='describe', prompt='', weights='0')

def test_cut_at_every_byte(images, tmp_path):
    "Wherever a write ends, the next run leaves the same table"
    data, table = dataset(images).subset(range(4)), tmp_path/'captions.csv'
    caption_images(data, describe, table)
    whole = table.read_bytes()
    for end in range(len(whole)):
        table.write_bytes(whole[:end])
        caption_images(data, describe, table)
        assert rows(table) == rows_of(whole), whole[:end][-40:]

def rows_of(data): return list(csv.reader(data.decode().splitlines()))

def test_edited_by_hand(images, tmp_path):
    "As a spreadsheet saves it: a mark at the start, other quotes and line ends, a row less, a column and a caption more"
    data, table = dataset(images).subset(range(6)), tmp_path/'captions.csv'
    caption_images(data.subset(range(4)), describe, table)
    kept = [[name, 'by hand' if i == 1 else text, 'seen'] for i, (name, text) in enumerate(rows(table)[1:]) if i != 2]
    with table.open('w', newline='', encoding='utf-8-sig') as f: csv.writer(f).writerows([['file_name', 'text', 'note'], *kept])
    before = table.read_bytes()
    captions, _ = caption_images(data, describe, table, batch=2)
    assert table.read_bytes().startswith(before) and len(captions) == 6
    assert captions[caption_names(data)[1]] == 'by hand'
    assert [row[0] for row in rows(table)[4:]] == [caption_names(data)[i] for i in (2, 4, 5)]

def test_refused_tables(images, tmp_path):
    data, table = dataset(images).subset(range(2)), tmp_path/'captions.csv'
    table.write_text('file_name,text\n')
    with pytest.raises(InputError, match='no captioner wrote it'): caption_images(data, describe, table)
    table.unlink()
    caption_images(data, describe, table)
    with pytest.raises(InputError, match='begun by describe with another prompt'):
        continue_table(table, describe.about | dict(prompt='a photo of'))
    assert continue_table(table, describe.about | dict(model='moved/describe')) == dict(rows(table)[1:])
    whole = table.read_bytes()
    for data_now, problem in [(whole.replace(b'","', b'";"'), 'with commas'), (whole.decode().encode('utf-16'), 'UTF-8')]:
        table.write_bytes(data_now)
        with pytest.raises(InputError, match=problem): caption_images(data, describe, table)
    with pytest.raises(InputError, match='name it captions.csv'): caption_images(data, describe, tmp_path/'captions.xlsx')

def test_names(images, tmp_path):
    assert caption_names(toy_flowers(DataConfig(n_images=8)).subset([2, 5])) == ['train 2', 'train 5']
    assert '1/"1", Blüte.png' in caption_names(dataset(images))
    pyarrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet
    files = sorted(images.rglob('*.png'))[-3:]
    pyarrow.parquet.write_table(pyarrow.table(dict(image=[p.read_bytes() for p in files], text=['']*3)), tmp_path/'x.parquet')
    captions, failures = caption_images(dataset(tmp_path/'x.parquet'), describe, tmp_path/'x.csv')
    assert (list(captions), failures) == ([f'x.parquet row {i}' for i in range(3)], {})

def test_whole_rows_only(tmp_path):
    append_rows(tmp_path/'none.csv', 'text', [])
    assert not (tmp_path/'none.csv').exists()

# Failures ------------------------------------------------------------------------------------------------------------

def failing(bad, error):
    "Writes the number of a flower, and fails on batches with one of `bad`"
    def caption(images):
        if any(image.width - 1 in bad for image in images): raise error
        return [f'flower {image.width - 1}' for image in images]
    caption.about = describe.about
    return caption

@pytest.fixture
def numbered():
    "Forty images whose width tells their number"
    data = toy_flowers(DataConfig(n_images=40))
    data.image = lambda i: Image.new('RGB', (i + 1, 4))
    return data

def test_a_few_fail(numbered, tmp_path):
    "Failures do not stop the rest, even more than eight in a row, and are tried again"
    bad = {3, *range(10, 25)}
    captions, failures = caption_images(numbered, failing(bad, ValueError('odd\nlines')), tmp_path/'c.csv', batch=4)
    assert failures == {f'train {i}': 'ValueError: odd' for i in sorted(bad)}
    assert captions == {f'train {i}': f'flower {i}' for i in range(40) if i not in bad}
    captions, failures = caption_images(numbered, failing({3}, ValueError('odd')), tmp_path/'c.csv', batch=4)
    assert len(captions) == 39 and list(failures) == ['train 3'] and len(rows(tmp_path/'c.failures.csv')) == 2

def test_broken_later(numbered, tmp_path):
    "A model that worked and does not any more stops the run"
    calls = iter(range(10**9))
    def caption(images):
        if next(calls) > 3: raise RuntimeError('device-side assert')
        return ['a flower']*len(images)
    caption.about = describe.about
    with pytest.raises(InputError, match="8 images in a row, the last time with 'RuntimeError: device-side assert'"):
        caption_images(numbered, caption, tmp_path/'c.csv', batch=4)
    assert len(rows(tmp_path/'c.csv')) == 1 + 16

def test_memory(numbered, tmp_path):
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError('CUDA error: out of memory'))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"))
    assert not out_of_memory(RuntimeError('shapes')) and not out_of_memory(ValueError('out of memory'))
    sizes, messages = [], []
    def caption(images):
        sizes.append(len(images))
        if len(images) > 2: raise RuntimeError('MPS backend out of memory')
        return ['a flower']*len(images)
    caption.about = describe.about
    captions, failures = caption_images(numbered, caption, tmp_path/'c.csv', batch=8, log=messages.append)
    assert (len(captions), failures, sizes[:2], set(sizes[2:]), len(messages)) == (40, {}, [8, 4], {2}, 2)

def test_a_batch_fails_image_by_image(numbered):
    "Memory for two images at a time, and one image that the model cannot take: the others keep their captions"
    def caption(images):
        if len(images) > 3: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        if any(o.width < 3 for o in images): raise ValueError('the image is smaller than a patch')
        return [f'flower {o.width}' for o in images]
    pairs, fits = _caption_batch(caption, [numbered.image(i) for i in range(2, 10)])
    assert (pairs, fits) == ([(f'flower {i}', '') for i in range(3, 11)], 2)
    pairs, _ = _caption_batch(caption, [numbered.image(i) for i in (5, 6, 0)])
    assert [problem for _, problem in pairs] == ['', '', 'ValueError: the image is smaller than a patch']

# The models of transformers -------------------------------------------------------------------------------------------

def test_alone_or_in_a_batch(models, images):
    seen = [toy_flowers(DataConfig(n_images=4)).image(i) for i in range(4)]
    for family in ('florence2', 'blip'):
        captioner = load_captioner(models/family, max_new_tokens=12)
        assert captioner(seen) == [captioner([o])[0] for o in seen] and len(set(captioner(seen))) > 1

def test_prompts(models, images):
    seen = [toy_flowers(DataConfig(n_images=1)).image(0)]
    assert load_captioner(models/'blip', prompt='a red flower', max_new_tokens=8)(seen)[0].startswith('a red flower')
    with pytest.raises(InputError, match='<CAPTION>, <DETAILED_CAPTION>'): load_captioner(models/'florence2', prompt='<OD>')

def test_tables_of_an_older_version_go_on(models, images, tmp_path):
    "Side files once held digests of 32 digits; one of the same length and another value is refused"
    data, captioner = dataset(images).subset(range(2)), load_captioner(models/'blip', max_new_tokens=4)
    caption_images(data, captioner, tmp_path/'c.csv')
    side = tmp_path/'c.csv.json'
    for digest, refused in (('0'*32, False), ('0'*16, True)):
        side.write_text(json.dumps(captioner.about | dict(weights=digest)))
        with pytest.raises(InputError, match='another weights') if refused else contextlib.nullcontext():
            caption_images(data, captioner, tmp_path/'c.csv')

# Models that cannot caption ------------------------------------------------------------------------------------------

def test_refused_models(models, tmp_path):
    chat = tmp_path/'chat'
    shutil.copytree(models/'florence2', chat)
    (chat/'chat_template.jinja').write_text('{{ messages }}')
    with pytest.raises(InputError, match='wants a conversation'): load_captioner(chat)
    weights = models/'blip'/'model.safetensors'
    whole = safetensors.torch.load_file(weights)
    lacking = {k: v for k, v in whole.items() if 'crossattention.self.key' not in k}
    try:
        safetensors.torch.save_file(lacking, weights, metadata=dict(format='pt'))
        with pytest.raises(InputError, match='lack 2 tensors.*would be random'): load_captioner(models/'blip')
    finally: safetensors.torch.save_file(whole, weights, metadata=dict(format='pt'))
    with pytest.raises(InputError, match='there is no captioning model'): load_captioner(tmp_path)

def test_cpu_computes_in_fp32(models):
    model = load_captioner(models/'blip').model
    assert str(model.dtype) == 'torch.float32' and not model.training
