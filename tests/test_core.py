"Configuration, files and digests: what the page 00_core shows once, tried at its edges"
import logging
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass, field
import pytest
import torch
import yaml
from t2i_nb.core import (InputError, apply_overrides, best_device, check_least, file_digest, from_dict, image_grid, keyed_generator, lazy, load_config,
                         load_function, make_folder, only_writer, quiet, replace_file, save_config, show_images, to_dict, to_pil, weights_digest, whole)

@dataclass(frozen=True)
class Optimizer:
    lr:float=1e-3
    betas:tuple[float,...]=(.9, .99)
    weight_decay:float|None=None

@dataclass(frozen=True)
class Run:
    seed:int=0
    name:str='first'
    fast:bool=False
    optimizer:Optimizer=field(default_factory=Optimizer)
    extra:dict=field(default_factory=dict)

def refuses(text): return pytest.raises(InputError, match=text)

def test_whole_numbers_are_exact():
    assert [whole('1e6'), whole('9007199254740993')] == [10**6, 2**53 + 1]
    for value in ('1.5', True, 'x'):
        with pytest.raises(ValueError): whole(value)

@pytest.mark.parametrize('d, expected', [(dict(optimizer=dict(beta=[.9, .95])), "unknown key 'optimizer.beta' \\(did you mean 'betas'"), (dict(seed=1.5), 'seed = 1.5 is not a int'),
                                     (dict(fast=1), 'fast = 1 is not a bool'), (yaml.safe_load('name:'), 'name = None is not a str'),
                                     (dict(optimizer=dict(betas='[.9, .95')), 'not valid YAML'), (dict(optimizer=3), 'optimizer is 3; write a mapping'),
                                     (dict(optimizer=dict(lr='quick')), "optimizer.lr = 'quick' is not a float")])
def test_what_a_field_cannot_hold(d, expected):
    with refuses(expected): from_dict(Run, d)

def test_values_become_their_fields_type():
    run = from_dict(Run, dict(seed='1e3', fast='true', optimizer=dict(lr='1e-4', weight_decay='none'), extra=dict(norm_eps='1e-6', act='silu', at=['1e2', 'e'])))
    assert run == Run(1000, fast=True, optimizer=Optimizer(1e-4), extra=dict(norm_eps=1e-6, act='silu', at=[100., 'e']))
    assert from_dict(Run, to_dict(run)) == run and from_dict(Run, dict(optimizer=None)) == Run()

@pytest.mark.parametrize('text, expected', [('optimiser.lr=1', "did you mean 'optimizer'"), ('seed', 'is not an override'), ('seed.x=1', "unknown key 'seed.x'")])
def test_overrides_that_mean_nothing(text, expected):
    with refuses(expected): apply_overrides(Run(), [text])

def test_overrides():
    run = apply_overrides(Run(), ['extra.heads=8', 'extra.norm_eps=1e-6', 'optimizer.betas=0.9,0.95', 'name='])
    assert run == Run(name='', optimizer=Optimizer(betas=(.9, .95)), extra=dict(heads=8, norm_eps=1e-6)) and Run().extra == {}

def test_a_file_is_utf8(tmp_path):
    save_config(Run(name='Blüte'), tmp_path/'a.yaml')
    assert load_config(tmp_path/'a.yaml', Run).name == 'Blüte'
    (tmp_path/'b.yaml').write_bytes('name: Blüte'.encode('latin-1'))
    with refuses('is not UTF-8 text'): load_config(tmp_path/'b.yaml', Run)
    with refuses('there is no configuration file'): load_config(tmp_path/'c.yaml', Run)

def test_functions_by_name():
    for name, expected in dict(math='write module:function', **{'nowhere:f': "no module 'nowhere'", 'math:sqr': "did you mean 'sqrt'"}).items():
        with refuses(expected): load_function(name)

def test_a_file_is_replaced_whole(tmp_path):
    note = tmp_path/'note.txt'
    assert replace_file(note, 'first').read_text() == 'first'
    with pytest.raises(TypeError): replace_file(note, 3)
    assert (note.read_text(), list(tmp_path.iterdir())) == ('first', [note]) and replace_file(note, b'second').read_bytes() == b'second'

def test_one_writer_at_a_time(tmp_path):
    out, messages = tmp_path/'table.csv', []
    def second():
        try:
            with only_writer(out, 'wait'): messages.append('wrote')
        except InputError as e: messages.append(str(e))
    with only_writer(out):
        thread = threading.Thread(target=second)
        thread.start(), thread.join()
    second()
    assert messages == [f'another process is writing {out}; wait', 'wrote']

def test_options_that_leave_nothing_to_do(tmp_path):
    with refuses('--batch is 0; use 1 or more'): check_least('--batch', 0)
    with refuses('is a folder'): make_folder(tmp_path)
    (tmp_path/'file').write_text('')
    with refuses('is no folder'): make_folder(tmp_path/'file'/'a'/'b.png')

def test_digests(tmp_path):
    (tmp_path/'a').write_bytes(b'1')
    assert file_digest(tmp_path/'a', 8) == '6b86b273' and len(file_digest(tmp_path/'a')) == 64
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) # floats, and a count of type int without dimensions
    before = weights_digest(model, 1, b'x')
    assert before == weights_digest(model, 1, b'x') and before not in (weights_digest(model, 2, b'x'), weights_digest(model.to(torch.bfloat16), 1, b'x'))
    model[1].num_batches_tracked += 1
    assert weights_digest(model) != weights_digest(torch.nn.Sequential(*model[:1]))

def test_quiet(recwarn, caplog):
    logger = logging.getLogger('t2i_nb.test')
    logger.setLevel(logging.INFO)
    with pytest.raises(KeyError), quiet('t2i_nb.test', level=logging.ERROR):
        warnings.warn('not shown')
        logger.warning('not shown')
        raise KeyError
    assert logger.level == logging.INFO and not len(recwarn) and not caplog.records

def test_equal_32_bits_of_a_seed_are_one_seed_to_torch():
    assert torch.equal(*[torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (7, 7 + 2**32)])
    assert torch.equal(*[torch.rand(3, generator=keyed_generator(1, 'noise', 2)) for _ in range(2)])

def test_images():
    x = torch.linspace(-1, 1, 3*4*4).reshape(1, 3, 4, 4)
    assert to_pil(x)[0].getpixel((0, 0))[0] == 0 and to_pil(x*9)[0].getpixel((3, 3))[2] == 255
    assert image_grid(x.expand(5, 3, 4, 4), cols=3).size == (3*6 - 2, 2*6 - 2)
    assert show_images(x.expand(3, 3, 4, 4), titles='abc').shape == (1, 3)

def test_what_is_imported_late():
    assert lazy('math').pi > 3 and torch.zeros(1, device=best_device()).device.type == best_device()
    code = "import sys, t2i_nb.core; assert not {'torch', 'numpy', 'matplotlib', 'PIL', 'filelock'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True)
