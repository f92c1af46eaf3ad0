"Where extra test data lies: `$T2I_TEST_DATA`, by default `../shared/data` beside the checkout. No other file knows."
import os, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root/'tools'))
data_dir = Path(os.environ.get('T2I_TEST_DATA') or root.parent/'shared'/'data')

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
