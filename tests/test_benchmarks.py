"The benchmarks run, measure both sides, and find no result that the two ways disagree on (they assert that themselves); the cost is calculated and says so."
import json, re, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pandas as pd
import pytest

ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent


def test_help():
    res = subprocess.run([BIN/'papermill', '--help-notebook', 'nbs/95_benchmarks.ipynb'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode == 0 and 'Unknown' not in res.stdout
    for k in ('preset', 'section', 'bundle', 'recipe', 'cohort', 'publish', 'run', 'seed'): assert re.search(rf'\n  {k}: \w+ \(default .*\)\s+\S+', res.stdout), k


def test_published_numbers_name_their_machine():
    "The table in figures/, if this checkout has one, says what it was measured on, and ours beside each of the peers."
    if not (ROOT/'figures'/'benchmarks.csv').exists(): pytest.skip('figures/benchmarks.csv is not published yet')
    told = json.loads((ROOT/'figures'/'benchmarks.json').read_text())['made_by']
    assert told['machine']['cpu'] and told['repeats'] >= 3 and told['preset'] != 'smoke'
    t = pd.read_csv(ROOT/'figures'/'benchmarks.csv')
    assert all((g['way'] == 'ecgflowcmr').sum() == 1 and len(g) >= 2 for _, g in t.groupby('what'))


@pytest.mark.slow
def test_files(tmp_path, papermill_run, monkeypatch):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setenv('ECGFLOWCMR_ROOT', str(tmp_path))
    nb = papermill_run('95_benchmarks.ipynb', preset='smoke', section='files', run='t')
    out = tmp_path/'runs'/'t'/'benchmarks_files'
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
    assert 'results: runs/t/benchmarks_files' in printed and str(tmp_path) not in printed
    assert not re.search(r'v0-\d{6}', nbformat.writes(nb)), "no subject's id in the report"


def test_published_speed_names_its_machine():
    "The generator's table in figures/, if this checkout has one: machine, goals, and nothing measured without precision, guidance and steps."
    if not (ROOT/'figures'/'speed.csv').exists(): pytest.skip('figures/speed.csv is not published yet')
    told = json.loads((ROOT/'figures'/'speed.json').read_text())['made_by']
    assert told['machine']['cpu'] and told['machine']['threads'] and told['gpu'] and told['bundle'] and told['preset'] != 'smoke'
    t = pd.read_csv(ROOT/'figures'/'speed.csv')
    check_speed(t)
    assert told['gpu'] != 'not measured' or (t.loc[t['topic'] == 'GPU', 'measured'] == 'not measured').all()


def check_speed(t):
    "What any table of the generator holds."
    assert set(t['topic']) == {'file to pixels', 'parts of a video', 'many videos', 'steps', 'against a U-Net', 'arithmetic', 'decoders', 'training', 'GPU'}
    done = t[t['measured'] == 'measured']
    assert (done['value'].notna() | done['what'].str.contains('waiting')).all() and (done['value'].dropna() >= 0).all() and t.loc[t['measured'] == 'not measured', 'value'].isna().all()
    videos = done[(done['unit'] == 's a video') & (done['topic'] != 'decoders') & (done['topic'] != 'parts of a video')]
    assert videos[['precision', 'steps', 'guidance', 'device']].notna().all().all()
    assert {.25, 25., 12., .015, 150.} <= set(t['goal'].dropna()), 'every goal of the table stays in it'
    assert t.loc[t['measured'] == 'not measured', 'reached'].isna().all()


@pytest.mark.slow
def test_generator(tmp_path, papermill_run, monkeypatch):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setenv('ECGFLOWCMR_ROOT', str(tmp_path))
    nb = papermill_run('95_benchmarks.ipynb', preset='smoke', section='generator', run='t')
    out = tmp_path/'runs'/'t'/'benchmarks_generator'
    t = pd.read_csv(out/'speed.csv')
    print(t[['topic', 'what', 'unit', 'value', 'goal']].to_string())
    check_speed(t)
    of = lambda what: t.loc[t['what'].str.startswith(what), 'value'].iloc[0]
    assert 15_000 < of('released configuration: all') < 25_000, 'GFLOP of the released configuration, counted'
    assert of('the U-Net takes as long as ours') > 5
    assert {o.name for o in out.iterdir()} >= {'speed.png', 'speed.json', 'done.json'} and not (tmp_path/'figures').exists()
    assert not re.search(r'v0-\d{6}', nbformat.writes(nb)), "no subject's id in the report"


@pytest.mark.slow
def test_cost(tmp_path, papermill_run, monkeypatch):
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setenv('ECGFLOWCMR_ROOT', str(tmp_path))
    nb = papermill_run('96_cost.ipynb', preset='smoke', run='t')
    out = tmp_path/'runs'/'t'/'cost'
    t = pd.read_csv(out/'cost.csv')
    assert json.loads((out/'cost.json').read_text())['made_by']['status'] == 'calculated, not measured'
    assert set(t['gpu']) == {'H100', 'A100'} and set(t['gpus']) == {1, 8} and (t['hours'] > 0).all()
    assert ((t['hours_low'] <= t['hours']) & (t['hours'] <= t['hours_high'])).all()
    parts, everything = t[t['part'] != 'all'], t[t['part'] == 'all']
    assert parts.groupby(['gpu', 'gpus'])['hours'].sum().sub(everything.set_index(['gpu', 'gpus'])['hours']).abs().max() < 1e-4
    eight = everything.pivot(index='gpu', columns='gpus', values='hours')
    assert ((eight[1]/eight[8] - 8).abs() < .01).all()
    printed = ' '.join(o.get('text', '') for c in nb.cells for o in c.get('outputs', []) if o.get('name') == 'stdout')
    assert 'calculated, not measured' in printed and str(tmp_path) not in printed
