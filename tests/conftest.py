"Where extra test data lies: `$T2I_TEST_DATA`, by default `../shared/data` beside the checkout. No other file knows."
import os, subprocess, sys, time
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
data_dir = Path(os.environ.get('T2I_TEST_DATA') or root.parent/'shared'/'data')

def pytest_collection_modifyitems(config, items):
    "Tests of extra data are left out where it does not lie"
    if data_dir.is_dir(): return
    out = [o for o in items if 'test_data' in o.fixturenames]
    config.hook.pytest_deselected(items=out)
    items[:] = [o for o in items if o not in out]

@pytest.fixture(scope='session')
def project(): return root

@pytest.fixture(scope='session')
def test_data():
    "A function from the name of a data set to its folder; skips the test where the folder is absent"
    def find(name):
        path = data_dir/name
        if not path.exists(): pytest.skip(f'no {name} in {data_dir}: set T2I_TEST_DATA to the folder that holds it')
        return path
    return find

@pytest.fixture(scope='session')
def before_torch():
    "A function from arguments of Python: is it done in less than a third of what the import of torch takes? In turns, once in five: a busy machine stretches either"
    def seconds(words, cwd):
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd)
        if not hasattr(os, 'wait4'): process.wait(); return time.perf_counter() - start
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_utime + used.ru_stime # of the processor
    return lambda *words, cwd: any(seconds(words, cwd) < seconds(('-c', 'import torch'), cwd)/3 for _ in range(5))
