"What the tests share: the top folder, the real recordings, and fresh kernels."
import os
from pathlib import Path
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault('OMP_NUM_THREADS', '1')  # two tests run side by side (pytest.ini)


def pytest_collection_modifyitems(items):
    "The chapters' own tests first: they take longest and use both cores, so the other files fill up what is left (pytest.ini keeps this order)."
    items.sort(key=lambda o: o.path.name != 'test_notebooks.py')


@pytest.fixture(scope='session')
def root():
    "The top folder of this checkout."
    return ROOT


@pytest.fixture(scope='session')
def fixtures():
    "Folder of real, openly published recordings; a test that needs it is skipped without it."
    folder = os.environ.get('ECGFLOWCMR_FIXTURES')
    if not folder: pytest.skip('ECGFLOWCMR_FIXTURES is not set: it names the folder of real recordings')
    if not Path(folder).is_dir(): pytest.fail(f'ECGFLOWCMR_FIXTURES={folder}: no such folder')
    return Path(folder).resolve()


@pytest.fixture
def papermill_run(tmp_path):
    "Run a notebook in a fresh kernel from the top folder; returns the executed notebook."
    def run(nb, tmp=tmp_path, **params):
        nb = Path(nb) if Path(nb).is_absolute() else ROOT/'nbs'/Path(nb).name
        return papermill.execute_notebook(str(nb), str(Path(tmp)/nb.name), params, kernel_name='python3', cwd=str(ROOT), progress_bar=False)
    return run
