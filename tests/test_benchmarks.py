"The benchmark runs, measures both sides, and finds no result that the two ways disagree on (it asserts that itself)."
import json, re, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pandas as pd
import pytest

ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent


def test_help():
    res = subprocess.run([BIN/'papermill', '--help-notebook', 'nbs/95_benchmarks.ipynb'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode == 0 and 'Unknown' not in res.stdout
    for k in ('preset', 'recipe', 'cohort', 'publish', 'run', 'seed'): assert re.search(rf'\n  {k}: \w+ \(default .*\)\s+\S+', res.stdout), k


def test_published_numbers_name_their_machine():
    "The table in figures/, if this checkout has one, says what it was measured on, and ours beside each of the peers."
    if not (ROOT/'figures'/'benchmarks.csv').exists(): pytest.skip('figures/benchmarks.csv is not published yet')
    told = json.loads((ROOT/'figures'/'benchmarks.json').read_text())['made_by']
    assert told['machine']['cpu'] and told['repeats'] >= 3 and told['preset'] != 'smoke'
    t = pd.read_csv(ROOT/'figures'/'benchmarks.csv')
    assert all((g['way'] == 'ecgflowcmr').sum() == 1 and len(g) >= 2 for _, g in t.groupby('what'))


@pytest.mark.slow
def test_the_experiment(tmp_path, papermill_run, monkeypatch):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setenv('ECGFLOWCMR_ROOT', str(tmp_path))
    nb = papermill_run('95_benchmarks.ipynb', preset='smoke', run='t')
    out = tmp_path/'runs'/'t'/'benchmarks'
    t = pd.read_csv(out/'benchmarks.csv')
    print(t[['what', 'unit', 'way', 'rate', 'times_faster']].to_string())
    assert set(t['topic']) == {'ECG read', 'ECG clean', 'cine read', 'store'}
    assert (t['rate'] > 0).all() and ((t['lowest'] <= t['rate']) & (t['rate'] <= t['highest'])).all()
    ours = t[t['way'] == 'ecgflowcmr']
    asked = ours[ours['target'].notna()]
    assert set(asked['target']) == {3, 5, 40, 5000}
    assert (asked['rate'] > .5*asked['target']).all(), 'half of what is asked for, on however busy a machine'
    assert (t.loc[t['way'].str.contains('neurokit2|statsmodels|np.load'), 'times_faster'] > 1).all()
    assert {o.name for o in out.iterdir()} >= {'benchmarks.png', 'benchmarks.json', 'done.json'} and not (tmp_path/'figures').exists()
    printed = ' '.join(o.get('text', '') for c in nb.cells for o in c.get('outputs', []) if o.get('name') == 'stdout')
    assert 'results: runs/t/benchmarks' in printed and str(tmp_path) not in printed
    assert not re.search(r'v0-\d{6}', nbformat.writes(nb)), "no subject's id in the report"
