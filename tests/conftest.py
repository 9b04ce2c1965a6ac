"What the tests share: the top folder, the real recordings, and fresh kernels."
import json, os, shutil, subprocess, sys
from pathlib import Path
import nbformat
import papermill
import pytest
from filelock import FileLock
from ecgflowcmr.ecg import DataError

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault('OMP_NUM_THREADS', '1')  # two tests run side by side (pytest.ini)


LONG = 'notebooks papermill generation_quality processes downstream build synthesis benchmarks cohort virtual stats cardiacnets generate readers'.split()  # longest first


def pytest_configure(config):
    "A name for what the tests of this session share; workers inherit it."
    if not hasattr(config, 'workerinput'): os.environ['ECGFLOWCMR_TEST_RUN'] = f'test-shared-{os.getpid()}'  # never a name from outside: it is removed in the end


def pytest_sessionfinish(session):
    "Nothing stays in runs/."
    if not hasattr(session.config, 'workerinput'): shutil.rmtree(ROOT/'runs'/os.environ['ECGFLOWCMR_TEST_RUN'], ignore_errors=True)


def pytest_collection_modifyitems(items):
    "Long files first, so that the short ones fill up what is left at the end (two workers take file by file; pytest.ini keeps this order)."
    rank = {f'test_{o}.py': i for i, o in enumerate(LONG)}
    items.sort(key=lambda o: rank.get(o.path.name, len(LONG)))


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


@pytest.fixture(scope='session')
def smoke():
    "A run in this checkout, trained from nothing by the README's command: its name, and how the command ended. Whoever comes first trains it, for all tests of all workers."
    run = os.environ['ECGFLOWCMR_TEST_RUN']
    folder = ROOT/'runs'/run
    folder.mkdir(parents=True, exist_ok=True)
    cmd = [str(Path(sys.executable).parent/'papermill'), 'nbs/30_amdf_train.ipynb', '-p', 'preset', 'smoke', '-p', 'run', run]
    with FileLock(folder/'.lock'):
        if not (folder/'command.json').exists():
            res = subprocess.run(cmd, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
            (folder/'command.json').write_text(json.dumps([res.returncode, res.stdout, res.stderr]))
    return run, subprocess.CompletedProcess(cmd, *json.loads((folder/'command.json').read_text()))


@pytest.fixture
def papermill_run(tmp_path):
    "Run a notebook in a fresh kernel from the top folder; returns the executed notebook."
    def run(nb, tmp=tmp_path, **params):
        nb = Path(nb) if Path(nb).is_absolute() else ROOT/'nbs'/Path(nb).name
        return papermill.execute_notebook(str(nb), str(Path(tmp)/nb.name), params, kernel_name='python3', cwd=str(ROOT), progress_bar=False)
    return run


@pytest.fixture
def cells(monkeypatch):
    "Run a notebook's cells in this process, which has all imports already (a kernel and its imports take seven seconds). papermill itself is looked at in test_papermill.py."
    def run(nb, display=print, **params):
        monkeypatch.chdir(ROOT)
        space = dict(In=[], display=display)  # as in a kernel: what was typed so far
        def cell(source): space['In'].append(source); exec(compile(source, nb, 'exec'), space)
        for c in (c for c in nbformat.read(ROOT/'nbs'/nb, as_version=4).cells if c.cell_type == 'code'):
            cell(c.source)
            if 'parameters' in c.metadata.get('tags', []): cell('# Parameters\n' + '\n'.join(f'{k} = {v!r}' for k, v in params.items()))
    return run


@pytest.fixture
def refusal(cells):
    "The error with which a notebook refuses its parameters."
    def run(nb, **params):
        with pytest.raises(DataError) as e: cells(nb, **params)
        return e.value
    return run
