"The package as a package: metadata said once, a wheel that is complete, imports that are cheap, optional dependencies that are optional."
import ast, configparser, os, re, shutil, subprocess, sys, tomllib, zipfile
import pytest
import t2i_nb

HEAVY = ('diffusers', 'transformers', 'deepspeed', 'sagemaker', 'boto3', 'mlflow', 'datasets', 'onnxruntime', 'torch')
COMMANDS = ('demo', 'cache', 'vae', 'vae train', 'vae evaluate', 'train', 'sample', 'evaluate', 'launch', 'drill', 'promote', 'card', 'export')

def fresh(code, *args, cwd=None, **env):
    "Runs `code` in a fresh process"
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, encoding='utf-8', cwd=cwd,
        env={**os.environ, 'PYTHONUTF8': '1', **env})

def settings(project):
    cfg = configparser.ConfigParser(interpolation=None)
    cfg.read(project/'settings.ini', encoding='utf-8')
    return cfg

def words(text): return [o for o in text.split('\n') if o]

# Metadata ------------------------------------------------------------------------------------------------------------------

def test_version_is_one(project):
    assert settings(project)['metadata']['version'] == t2i_nb.__version__

def test_setup_holds_no_list_of_its_own(project):
    names = {re.match(r'[\w.-]+', o)[0] for section in ('dependencies', 'extras') for text in settings(project)[section].values() for o in words(text)}
    constants = [n.value for n in ast.walk(ast.parse((project/'setup.py').read_text(encoding='utf-8'))) if isinstance(n, ast.Constant)]
    assert not {o for o in constants if isinstance(o, str)} & names
    static = tomllib.loads((project/'pyproject.toml').read_text(encoding='utf-8'))['project']
    assert 'dependencies' not in static and 'dependencies' in static['dynamic']

def test_every_requirement_is_bounded_and_pinned(project):
    cfg = settings(project)
    pins = {o.split('==')[0] for o in words((project/'constraints.txt').read_text(encoding='utf-8')) if '==' in o}
    for section in ('dependencies', 'extras'):
        for key, text in cfg[section].items():
            for o in words(text):
                assert '>=' in o and ',<' in o, f'{o} in settings.ini has no bounds'
                if section == 'dependencies': assert re.match(r'[\w.-]+', o)[0] in pins, f'{o} is not pinned in constraints.txt'

def test_install_names_the_pinned_torch(project):
    pin = next(o for o in words((project/'constraints.txt').read_text(encoding='utf-8')) if o.startswith('torch=='))
    assert set(re.findall(r'torch==[\w.]+', (project/'nbs'/'install.ipynb').read_text(encoding='utf-8'))) == {pin}

def test_quarto_configuration_is_one_file(project):
    link = project/'nbs'/'_quarto.yml'
    if os.name == 'nt' and not link.is_symlink(): pytest.skip('git made no symbolic link on this Windows')
    assert os.readlink(link).replace('\\', '/') == '../_quarto.yml'

@pytest.fixture(scope='module')
def wheel(project, tmp_path_factory):
    "The names in a wheel built from a copy of the sources"
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('wheel')
    for o in ('setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'): shutil.copy(project/o, source)
    shutil.copytree(project/'t2i_nb', source/'t2i_nb', ignore=shutil.ignore_patterns('__pycache__'))
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, source],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob('*.whl'))) as z: return {o: z.read(o) for o in z.namelist()}

def test_wheel_is_complete(project, wheel):
    "Everything under t2i_nb is in the wheel: modules, recipes, shipped weights"
    ours = {o.relative_to(project).as_posix() for o in (project/'t2i_nb').rglob('*') if o.is_file() and '__pycache__' not in o.parts}
    assert {o for o in ours if o.endswith('.yaml')} and ours <= set(wheel)
    assert not {o for o in wheel if not o.startswith(('t2i_nb/', f't2i_nb-{t2i_nb.__version__}.dist-info/'))}

def test_wheel_metadata_comes_from_settings(project, wheel):
    info = next(v for k, v in wheel.items() if k.endswith('METADATA')).decode()
    required = {re.match(r'[\w.-]+', o)[0] for o in words(settings(project)['dependencies']['requirements'])}
    assert required == set(re.findall(r'Requires-Dist: ([\w.-]+)[^;\n]*\n', info))
    assert {o for o in re.findall('Provides-Extra: (.*)', info)} == {*settings(project)['extras'], 'dev'}
    entry = next(v for k, v in wheel.items() if k.endswith('entry_points.txt')).decode()
    assert 't2i = t2i_nb.__main__:main' in entry

# Rooms ---------------------------------------------------------------------------------------------------------------------

def page_order(project):
    "Modules in the order of their pages"
    names = {}
    for page in sorted((project/'nbs').glob('[0-9]*.ipynb')):
        found = re.search(r'#\| default_exp (\w+)', page.read_text(encoding='utf-8'))
        if found: names[found[1]] = page.name
    return list(names)

def own_imports(path):
    "(imported module of ours, its line, does it stand inside a function?) for every import of a module"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        found = []
        if isinstance(n, ast.Import): found = [a.name.split('.')[1] for a in n.names if a.name.startswith('t2i_nb.')]
        elif isinstance(n, ast.ImportFrom):
            module = n.module or ''
            if n.level == 1 or module.split('.')[0] == 't2i_nb':
                module = module.removeprefix('t2i_nb').strip('.')
                found = [module] if module else [a.name for a in n.names]
        elif isinstance(n, ast.Call) and getattr(n.func, 'id', '') in ('lazy', 'import_module') and isinstance(n.args[0], ast.Constant):
            found = [n.args[0].value.split('.')[1]] if str(n.args[0].value).startswith('t2i_nb.') else []
        yield from ((o, n.lineno, id(n) in inside) for o in found)

def test_imports_point_to_earlier_pages(project):
    "Also inside functions: a page builds on those before it alone"
    order, inside, wrong = page_order(project), 0, []
    assert set(order) == {o.stem for o in (project/'t2i_nb').glob('*.py') if not o.stem.startswith('_')}
    for k, name in enumerate(order):
        for other, line, within in own_imports(project/'t2i_nb'/f'{name}.py'):
            inside += within
            if other not in order[:k]: wrong.append(f'{name}.py:{line} imports {other}')
    assert not wrong
    assert inside < 40, f'{inside} imports inside functions'

def test_every_public_name_has_one_module(project):
    "A command may bear the name of a function, everything else is defined once"
    commands, seen, twice = ('commands', 'tools', 'cloud'), {}, []
    for name in page_order(project):
        tree = ast.parse((project/'t2i_nb'/f'{name}.py').read_text(encoding='utf-8'))
        public = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__')
        assert len(public) == len(set(public)), name
        twice += [f'{o} in {seen[o]} and {name}' for o in public if o in seen and name not in commands]
        seen |= {o: name for o in public}
    assert not twice

def test_one_of_each(project):
    "What has one implementation is written once: hashing a file, replacing one, the kernel distance, quieting loggers"
    source = {o: (project/'t2i_nb'/f'{o}.py').read_text(encoding='utf-8') for o in page_order(project)}
    where = lambda pattern: sorted(o for o, text in source.items() if re.search(pattern, text) and o != 'onnx_runtime')
    assert where(r'hashlib\.file_digest') == ['core']
    assert where(r'/d \+ 1\)\*\*3') == ['evaluation']
    assert where(r'\.setLevel\(') in (['core'], ['core', 'engine']) # DeepSpeed's own logger has its own levels
    assert where(r'2\*\*\(len\([^\n]*block_out_channels') == ['vae']

def test_rooms_are_small(project):
    "Lines that a page exports; the torch-free runtime is one file, because an export takes it along"
    lines = {o: len((project/'t2i_nb'/f'{o}.py').read_text(encoding='utf-8').splitlines()) for o in page_order(project)}
    assert not {k: v for k, v in lines.items() if v > 520 and k != 'onnx_runtime'}
    assert sum(lines.values()) <= 12_500

# Imports -------------------------------------------------------------------------------------------------------------------

def modules(project): return sorted(o.stem for o in (project/'t2i_nb').glob('*.py') if not o.stem.startswith('__'))

def heavy_after(code, *args):
    "The heavy packages that `code` left in `sys.modules`, and the process"
    tail = f"\nimport sys; print('HEAVY', *[o for o in {HEAVY} if o in sys.modules])"
    done = fresh(code + tail, *args)
    assert 'HEAVY' in done.stdout, done.stderr
    return done.stdout.rsplit('HEAVY', 1)[1].split(), done

def test_configurations_are_utf8_in_every_locale(tmp_path):
    "A process whose own encoding is ASCII writes and reads what another one did"
    code = """import sys; from t2i_nb.core import load_config, save_config; from t2i_nb.data import DataConfig
save_config(DataConfig('Bl\\u00fcten'), sys.argv[1]); assert load_config(sys.argv[1], DataConfig).source == 'Bl\\u00fcten'"""
    done = fresh(code, tmp_path/'c.yaml', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', LC_ALL='C', PYTHONIOENCODING='utf-8')
    assert done.returncode == 0, done.stderr
    assert 'Bl\u00fcten' in (tmp_path/'c.yaml').read_text(encoding='utf-8')

def test_imports_are_cheap(project):
    "Every module imports without a heavy package, but `pipeline`, which subclasses a diffusers class"
    names = [f't2i_nb.{o}' for o in modules(project) if o != 'pipeline']
    heavy, _ = heavy_after('\n'.join(f'import {o}' for o in names))
    assert not heavy

def test_core_alone_suffices(project):
    "Known defect n, first half: with every optional dependency missing, each module imports"
    code = 'import sys; sys.path.insert(0, sys.argv[1]); import core_only; core_only.block_all_but_core()\n' + '\n'.join(
        f'import t2i_nb.{o}' for o in modules(project))
    done = fresh(code, str(project/'tools'))
    assert done.returncode == 0, done.stderr

@pytest.mark.parametrize('source', ('images.parquet', 'hf:somebody/images'))
def test_missing_dependency_is_named(source, project, tmp_path):
    "Known defect n, second half: a feature whose dependency is missing says what to install"
    (tmp_path/'images.parquet').write_bytes(b'PAR1')
    code = '''import sys; sys.path.insert(0, sys.argv[1]); import core_only; core_only.block_all_but_core()
from t2i_nb.core import InputError
from t2i_nb.data import DataConfig; from t2i_nb.sources import load_dataset
try: load_dataset(DataConfig(source=sys.argv[2]))
except InputError as e: print(e)'''
    done = fresh(code, str(project/'tools'), source if ':' in source else str(tmp_path/source))
    assert 'pip install' in done.stdout and '[data]' in done.stdout, done.stdout + done.stderr

def test_missing_features_are_named(project):
    "The same of the feature network that fine-tuning may use"
    code = '''import sys; sys.path.insert(0, sys.argv[1]); import core_only; core_only.block_all_but_core()
from t2i_nb.core import InputError
from t2i_nb.vae_train import feature_maps
try: feature_maps()
except InputError as e: print(e)'''
    done = fresh(code, str(project/'tools'))
    assert 'pip install efficientnet-lite-pytorch' in ' '.join(done.stdout.split()), done.stdout + done.stderr

# The command ---------------------------------------------------------------------------------------------------------------

RUN = '''import sys
from t2i_nb.__main__ import main
sys.argv[0] = 't2i'
code = None
try: code = main()
except SystemExit as e: code = e.code
print('EXIT', code or 0)'''

WRONG = {'unknown recipe': ['train', 'dmeo', '--run-dir', 'runs/x'], 'unknown command': ['trian'],
    'no such run': ['sample', 'runs/absent', 'a flower'], 'no such run to evaluate': ['evaluate', 'runs/absent'],
    'unknown key': ['train', 'demo', '--run-dir', 'runs/x', '--set', 'train.learning_rat=1']}

@pytest.mark.parametrize('command', ('', *COMMANDS))
def test_help_is_cheap(command):
    heavy, done = heavy_after(RUN, *command.split(), '--help')
    assert 'EXIT 0' in done.stdout and 'usage' in done.stdout and not heavy

@pytest.mark.parametrize('args', WRONG.values(), ids=WRONG)
def test_wrong_input_is_cheap(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heavy, done = heavy_after(RUN, *args)
    assert 'EXIT 2' in done.stdout and not heavy
    assert 'Traceback' not in done.stderr and done.stderr.strip()

@pytest.mark.parametrize('args', (['--help'], ['sample', '--help'], WRONG['unknown recipe'], WRONG['unknown key']), ids=' '.join)
def test_answers_before_torch_is_there(args, tmp_path, before_torch):
    "An answer that needs no torch takes less than a third of what the import of torch alone takes"
    assert before_torch('-m', 't2i_nb', *args, cwd=tmp_path)
