"What `make test` runs, in order; a later step runs even where an earlier one failed. `python tools/check.py [step …]` runs some of them."
import ast, os, re, subprocess, sys, time
from pathlib import Path
import yaml
from fastcore.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config

root = Path(__file__).resolve().parents[1]
cfg = get_config(root)
modules = lambda: sorted(o for o in (root/'t2i_nb').glob('*.py') if o.name != '__main__.py')
entry = root/'sagemaker_src'/'train.py' # the one page that is exported twice
generated = lambda: [*modules(), entry]
pages = lambda: sorted((root/'nbs').glob('[!_.]*.ipynb'))
code = lambda: [*generated(), *sorted((root/'tools').glob('*.py')), *sorted((root/'tests').glob('*.py')), root/'setup.py']
text = lambda path: path.read_text(encoding='utf-8')

def command(*args, **env):
    "Runs a Python command of this environment; its output goes to the terminal"
    return subprocess.run([sys.executable, *map(str, args)], cwd=root, env={**os.environ, **env}).returncode == 0

def say(good, sentence):
    if not good: print(sentence)
    return good

def library():
    "The library and SageMaker's entry point are what the notebooks export"
    before = {o: text(o) for o in generated() if o.is_file()}
    done = command('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()')
    stale = [o.relative_to(root).as_posix() for o in generated() if text(o) != before.get(o)]
    return say(not stale, f'Not in step with the notebooks, exported anew: {", ".join(stale)}. Commit them.') and done

def never_fails(source):
    "Does a cell call `expect_fail` without `with`? Nothing is checked then"
    lines = '\n'.join('' if l.startswith(('%', '!')) else l for l in source.splitlines())
    return any(isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) and getattr(n.value.func, 'id', '') == 'expect_fail'
        for n in ast.walk(ast.parse(lines)))

def options_are_yaml(source):
    "Can Quarto read the options `#| key: value` of a cell?"
    options = [l[2:].strip() for l in source.splitlines() if l.startswith('#|') and ': ' in l]
    try: return all(isinstance(yaml.safe_load(o), dict) for o in options)
    except yaml.YAMLError: return False

def notebooks():
    "The notebooks are clean, and show no error, no progress bar and no check that cannot fail"
    untidy, broken, noisy, idle, odd = [], [], [], [], []
    for o in pages():
        nb = read_nb(o)
        outputs = [out for c in nb.cells for out in c.get('outputs', [])]
        if any(out.output_type == 'error' for out in outputs): broken.append(o.name)
        if any('it/s]' in ''.join(out.get('text', '')) for out in outputs): noisy.append(o.name)
        idle += [f'{o.name} #{c.id}' for c in nb.cells if c.cell_type == 'code' and never_fails(c.source)]
        odd += [f'{o.name} #{c.id}' for c in nb.cells if c.cell_type == 'code' and not options_are_yaml(c.source)]
        clean_nb(nb)
        if nb2str(nb) != text(o): untidy.append(o.name)
    return (say(not untidy, f'Not clean: {", ".join(untidy)}. Give `nbdev-clean` and commit.')
        & say(not broken, f'A stored output is an error: {", ".join(broken)}.')
        & say(not noisy, f'A stored output is a progress bar: {", ".join(noisy)}. Turn it off in a hidden cell, and run the page again.')
        & say(not odd, f'Quarto cannot read the options of {", ".join(odd)}: quote texts that hold a colon.')
        & say(not idle, f'`expect_fail` checks nothing without `with`: {", ".join(idle)}.'))

def links():
    "Every link between pages, and from a page to a file, leads somewhere"
    dead = []
    for o in pages():
        for c in read_nb(o).cells:
            found = re.findall(r'\]\(([^)\s]+)\)', c.source) if c.cell_type == 'markdown' else []
            targets = [u.split('#')[0] for u in found if not re.match('[a-z]+:|#', u)]
            dead += [f'{o.name} #{c.id}: {u}' for u in targets if u.endswith('.html') or not (o.parent/u).exists()]
    return say(not dead, 'Dead links (a page is linked by its .ipynb): ' + ', '.join(dead))

def readme():
    "README.md and CONTRIBUTING.md are what their notebooks say"
    return command('tools/readme.py', '--check')

def imports():
    "Every module imports in a fresh process with the core requirements alone"
    names = ['t2i_nb' if o.stem == '__init__' else f't2i_nb.{o.stem}' for o in modules()]
    return all([command('tools/core_only.py', o) for o in names])

def flakes():
    "pyflakes finds nothing"
    return command('-m', 'pyflakes', *code())

def flagged():
    "The cells that the default run of the pages leaves out, listed"
    flags, n = set(cfg.tst_flags.split()), 0
    for o in pages():
        for c in read_nb(o).cells:
            names = {d.split()[0].rstrip(':') for d in (l[2:].strip() for l in c.source.splitlines() if l.startswith('#|')) if d}
            if not (found := (flags & names) | ({'eval: false'} if '#| eval: false' in c.source else set())): continue
            if 'nbdev_export()' in c.source: continue
            n += 1
            print(f'{o.name} #{c.id}: {", ".join(sorted(found))}')
    print(f'{n} cells flagged')
    return True

def nb_test():
    "Every page runs"
    cores = os.cpu_count() or 1
    env = dict(OMP_NUM_THREADS=str(max(1, cores//2)), HF_HUB_OFFLINE='1', TRANSFORMERS_VERBOSITY='error', PYTHONWARNINGS='ignore')
    return command('-c', 'from nbdev.test import nbdev_test; nbdev_test()', '--n-workers', min(2, cores), '--timing', **env)

def docs():
    "nbdev prepares every page for the site"
    return command('tools/docs.py', '--pages')

def pytest(*args):
    "pytest passes, two files at a time; what is marked as slow is left out"
    return command('-m', 'pytest', '-q', '-rs', '-n', min(2, os.cpu_count() or 1), '--dist', 'loadfile', '--durations=10', *args,
        OMP_NUM_THREADS='1')

def slow():
    "The slow tests pass: browsers, JupyterLab, drills and many kills, one after the other"
    return command('-m', 'pytest', '-q', '-rs', '-m', 'slow', '--durations=10')

steps = dict(library=library, notebooks=notebooks, links=links, readme=readme, imports=imports, flakes=flakes, flagged=flagged, pages=nb_test,
    docs=docs, pytest=pytest)

def main():
    results, known = {}, steps | dict(slow=slow)
    for name in sys.argv[1:] or steps:
        print(f'\n== {name}: {known[name].__doc__}', flush=True)
        start = time.perf_counter()
        results[name] = known[name](), time.perf_counter() - start
    print('\n' + '\n'.join(f'{name:10} {"passed" if ok else "FAILED"} {seconds:7.1f} s' for name, (ok, seconds) in results.items()))
    sys.exit(not all(ok for ok, _ in results.values()))

if __name__ == '__main__': main()
