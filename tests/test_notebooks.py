"The source chapters' own tests: nbdev_test runs every cell of every chapter below 20 (experiments are run by test_papermill.py)."
import os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nbdev_test():
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}  # two workers share two cores
    cmd = [Path(sys.executable).parent/'nbdev_test', '--n_workers', '2', '--timing']
    res = subprocess.run(cmd, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=890)
    print(res.stdout[-20_000:])
    assert res.returncode == 0, 'a chapter fails its own tests, see above'
