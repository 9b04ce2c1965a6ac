"The source chapters' own tests: nbdev_test runs every cell of every chapter below 20 (experiments are run by test_papermill.py)."
import os, re, signal, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ['^0', '^1[0-2]', '^1[3-9]']  # of the chapters


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('part', PARTS)
def test_nbdev_test(part):
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}  # two workers share two cores
    cmd = [Path(sys.executable).parent/'nbdev_test', '--n_workers', '2', '--timing', '--file_re', part]
    p = subprocess.Popen(cmd, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try: shown = p.communicate(timeout=590)[0]
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)  # its workers outlive it when it is stopped
        except ProcessLookupError: pass
    print(shown[-20_000:])
    assert p.returncode == 0, 'a chapter fails its own tests, see above'


def test_every_source_chapter_is_in_one_part():
    names = [f.name for f in (ROOT/'nbs').glob('[01]*.ipynb')]
    assert len(names) > 10 and {n: sum(bool(re.search(p, n)) for p in PARTS) for n in names} == dict.fromkeys(names, 1)
