"Tables 2 to 4: the disease table at the smoke preset in a fresh kernel, planted leaks, a job that is killed, and bad input."
import json, os, re, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from ecgflowcmr.bundle import ECGFlowCMR
from ecgflowcmr.ecg import DataError
from ecgflowcmr.files import digest
from ecgflowcmr.cohort import COHORT_SIZE, build_virtual_cohort, cohort_at
from ecgflowcmr.mixing import Leak, Seen, check_no_leak, method_of, people_of, pool_of
from ecgflowcmr.study import binary_row, methods_of, phenotype_table
from ecgflowcmr.synthesis import synthesise
from ecgflowcmr.tasks import Task, case_control, fold_parts, held_back, stratified, tune, tune_config

ROOT = Path(__file__).resolve().parents[1]
SIZES = 'tune.epochs=1'
ROWS = 'vit mae_real mae_synthetic:given:50'


class Toy(ECGFlowCMR):
    "Random weights; a beat of one second in every strip."
    def read_beat(self, mv): return self.pamae.encode(mv)[:, :50].detach(), torch.ones(len(mv)), torch.ones(len(mv), dtype=torch.long)


def toy(folder, cohort, trained_on=None, **more):
    "An untrained generator that says what it was trained on, and its bundle."
    torch.manual_seed(0)
    g = Toy(dict(pamae=dict(width=16, depth=1), vae=dict(width=8, deep=8, blocks=1), dit=dict(width=16, depth=1, heads=2, features=16, patch=2, components=8), harmonics={}, pixel_mm=1.83)).eval()
    return g, g.save_pretrained(folder, kind='untrained toy', subjects=0, cohort=trained_on or cohort.fingerprint, **more)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run of its own; cines drawn for training ECGs, and, as no one should, for test ECGs."
    out = ROOT/'runs'/f'test-down-{os.getpid()}'
    real = cohort_at('virtual', ROOT, n=COHORT_SIZE['smoke'], coupling='strong', progress=False)
    g, bundle = toy(out/'bundle', real)
    for split in ('train', 'test'): synthesise(g, bundle, real, out/split, split=split, rows=real.index(split)[:24], per_subject=1, steps=1, progress=False)
    yield out
    shutil.rmtree(out, ignore_errors=True)


@pytest.mark.slow
def test_table_2_fold_by_fold(run, papermill_run, cells, capsys):
    made = dict(preset='smoke', run=run.name, methods=ROWS, diseases='cm', synthetic=str(run/'train'), settings=SIZES)
    papermill_run('50_disease_classification.ipynb', folds='1 2', **made)
    assert not (run/'figures'/'table2.csv').exists(), 'no table of two folds'
    kept = {o: o.stat().st_mtime_ns for o in run.glob('tune/cm/*/predictions.safetensors')}
    assert len(kept) == 6
    shown = []
    cells('50_disease_classification.ipynb', display=lambda *o: shown.append(' '.join(map(str, o))), **made)
    assert {o: o.stat().st_mtime_ns for o in kept} == kept, 'what was trained is read, not trained again'
    table = pd.read_csv(run/'figures'/'table2_all.csv')
    assert table['method'].tolist() == ROWS.split() and table['subjects'].tolist() == [30]*3
    assert ((table['AUC pooled: low'] < table['AUC pooled']) & (table['AUC pooled'] < table['AUC pooled: high'])).all()
    assert table['p (Holm)'].notna().tolist() == [True, False, True] and table.loc[1, 'AUC, as published'] == '0.806 ± 0.054'
    text = capsys.readouterr().out + ''.join(shown) + ''.join(o.read_text() for o in run.glob('figures/*.[cj]s*'))
    assert 'audit of 3 cohorts' in text and '0 in two splits, 0 cines drawn from held-out people' in text
    assert not re.search(r'v\d+-\d{6}', text), 'no subject id in an output or a table'
    assert not list(run.glob('tune/**/model.safetensors')), 'a fold leaves outputs, not weights'


def sound(table, *keys):
    "Intervals lie around their values."
    for k in keys:
        t = table[table[k].notna()]; assert len(t) and ((t[f'{k}: low'] < t[k]) & (t[k] < t[f'{k}: high'])).all(), k


def no_ids(run, *texts):
    files = [o for folder in (run/'figures', *run.glob('table*')) for o in folder.iterdir() if o.suffix in ('.csv', '.json', '.svg')]
    assert files and not re.search(r'v\d+-\d{6}', ''.join([*texts, *(o.read_text() for o in files)])), 'no subject id in an output or a table'


@pytest.mark.slow
def test_table_3_and_again_with_other_rows(run, cells, capsys):
    "An encoder as a job of its own; the table with its control; then a table of other rows, which leaves the first where it is."
    made = dict(preset='smoke', run=run.name, synthetic=str(run/'train'), phenotypes='LVEDV LVEF LVM RVEDV RVEF', settings='regress.epochs=1 mae.train.epochs=1', draws=200); shown = []
    keep = lambda *o: shown.append(' '.join(map(str, o)))
    rows = 'mae_real mae_real_longer:50 mae_synthetic:given:50'
    cells('51_phenotype_prediction.ipynb', display=keep, methods='mae_synthetic:given:50', table=False, **made)
    told = run/'tune'/'phenotypes'/'mae_synthetic-given-50-1'/'predictions.safetensors'; at = told.stat().st_mtime_ns
    assert not (run/'figures'/'table3.csv').exists() and load_file(told)['test'].shape[1] == 5
    cells('51_phenotype_prediction.ipynb', display=keep, methods=rows, **made)
    first = pd.read_csv(run/'figures'/'table3_all.csv'); assert told.stat().st_mtime_ns == at, 'what was trained is read'
    assert first['method'].tolist() == rows.split() and first['control'].tolist()[2] == 'mae_real_longer:50' and first['phenotypes'].tolist() == [5]*3
    sound(first, 'mean R2', 'LVEDV MAE', 'LVEF R2', 'difference', 'over control'); assert first['p (Holm)'].notna().tolist() == [False, True, True]
    cells('51_phenotype_prediction.ipynb', display=keep, methods='mae_real', **made)
    last, kept = pd.read_csv(run/'figures'/'table3_all.csv'), sorted(o.parent.name for o in run.glob('table3*/done.json'))
    assert last['method'].tolist() == ['mae_real'] and len(kept) == 2 and kept[0] == 'table3' and (run/kept[1]/'table3_ratio.svg').stat().st_size > 5000
    pd.testing.assert_frame_equal(pd.read_csv(run/'table3'/'table3_all.csv'), first)
    epochs = json.loads((run/'table3'/'table3.json').read_text())['made_by']['epochs']
    assert epochs['fine-tuning'] == dict(phenotypes=1) and epochs['pre-training'] == pytest.approx(dict(zip(rows.split(), (1, 1.5, 1))), abs=.15), 'a control sees each of its cines more often'
    out = capsys.readouterr().out; no_ids(run, out, *shown)
    assert out.index('audit of 1 cohorts') < out.index('with the drawn cines: audit of 2 cohorts'), 'before anything is drawn, and again with it'


@pytest.mark.slow
def test_table_4_fold_by_fold(run, cells, capsys):
    "A second hospital: one fold as a job, then both tasks with all folds."
    made = dict(preset='smoke', run=run.name, people=60, hospital='subtypes', methods='vit mae_real', settings='tune.epochs=1'); shown = []
    cells('52_external_validation.ipynb', folds='2', tasks_of='cardiomyopathy', **made)
    assert sorted(o.parent.name for o in run.glob('tune/cardiomyopathy/*/done.json')) == ['mae_real-2', 'vit-2'] and not (run/'figures'/'table4.csv').exists()
    cells('52_external_validation.ipynb', display=lambda *o: shown.append(' '.join(map(str, o))), **made)
    t = pd.read_csv(run/'figures'/'table4_all.csv'); out = capsys.readouterr().out
    assert t[['method', 'task']].values.tolist() == [[m, k] for k in ('cardiomyopathy', 'subtypes') for m in ('vit', 'mae_real')] and t['folds'].tolist() == [3]*4
    sound(t, 'ACC pooled', 'AUC pooled', 'difference'); assert t['AUC, as published'].tolist() == ['0.671 ± 0.061', '0.798 ± 0.029', '0.694 ± 0.055', '0.784 ± 0.063']
    assert t.filter(regex='^AUC (HCM|DCM|RCM|controls)$').notna().sum(axis=1).tolist() == [0, 0, 4, 4], 'an AUC of each of four classes'
    assert out.count('audit of 2 cohorts') == 2 and 'with the drawn cines' not in out
    no_ids(run, out, *shown)


@pytest.mark.parametrize('nb', ['50_disease_classification.ipynb', '51_phenotype_prediction.ipynb', '52_external_validation.ipynb'])
def test_the_audit_comes_before_anything_is_drawn(run, refusal, monkeypatch, nb):
    def drawn(*a, **k): raise AssertionError('drawn before the audit')
    monkeypatch.setattr('ecgflowcmr.study.synthetic_for', drawn)
    monkeypatch.setattr('ecgflowcmr.study.audit_together', lambda cohorts: dict(ok=False, cohorts=[], subjects=0, in_two_splits=2, synthetic_of_held_out=0))
    small = dict(diseases='cm') if nb[:2] == '50' else dict(people=60, hospital='subtypes') if nb[:2] == '52' else {}
    name = f'{run.name}-dirty'
    try: assert 'in two splits: 2' in str(refusal(nb, preset='smoke', run=name, **small))
    finally: shutil.rmtree(ROOT/'runs'/name, ignore_errors=True)


@pytest.mark.parametrize('params, message', [
    (dict(methods='mae_synthetic:given:10', synthetic='{run}/test'), 'drawn from held-out people'),
    (dict(methods='mae_synthetic:given:500', synthetic='{run}/train'), 'only 24 were drawn'),
    (dict(methods='mae_synthetic:given:10', synthetic='{run}/nowhere'), 'nowhere'),
    (dict(methods='mae_synthetic:given:10'), 'no synthetic cohort is named'),
    (dict(methods='mae_real', cases=4), '4 matched pairs of 4 cases of CM'),
    (dict(methods='mae'), 'no such method'),
    (dict(diseases='flu'), 'cad')])
def test_the_notebook_stops(run, refusal, params, message):
    params = {k: v.format(run=run) if isinstance(v, str) else v for k, v in params.items()}
    assert message in str(refusal('50_disease_classification.ipynb', **(dict(preset='smoke', run=run.name, diseases='cm', settings=SIZES) | params)))


def made_up(y, k, seed=0):
    "A task without cines, and what a method said of it."
    task = Task('made', None, np.arange(len(y)), y, tuple('abcd')[:k], fold_parts(y, stratified(y, 5))); g = np.random.default_rng(seed)
    return task, [dict(val=g.normal(size=(len(v), k)), test=g.normal(size=(len(t), k))) for _, v, t in task.folds]


@pytest.mark.parametrize('bad, message', [
    (lambda t, said: (replace(t, y=np.where(t.test_fold() == 0, 1, t.y)), said), 'one class only'),
    (lambda t, said: (t, said[:4]), '4 of 5 folds are there'),
    (lambda t, said: (t, [dict(o, test=np.full_like(o['test'], np.nan)) for o in said]), 'NaN or infinite')])
def test_tables_refuse_what_cannot_be_judged(bad, message):
    task, said = bad(*made_up(np.arange(60) % 2, 2))
    with pytest.raises(DataError, match=message): binary_row(task, said)


def test_labels_that_are_missing_are_counted():
    "Of each phenotype those that are there count; one without any is named."
    y = np.random.default_rng(0).normal(size=(60, 3)); y[30:42, 1] = np.nan; task = Task('phenotypes', None, np.arange(60), y, ('LVEDV', 'LVEF', 'LVM'), [(np.arange(20), np.arange(20, 30), np.arange(30, 60))])
    real = method_of('mae_real'); said = {('mae_real', 'phenotypes'): [dict(test=np.nan_to_num(y[30:]) + .5*np.random.default_rng(1).normal(size=(30, 3)))]}
    _, scores, _ = phenotype_table(task, [real], said, draws=100)
    assert scores['mae_real'].table()[['subjects', 'dropped']].values.tolist() == [[30, 0], [18, 12], [30, 0]]
    y[30:, 1] = np.nan
    with pytest.raises(DataError, match='labels of LVEF: 0 of 30'): phenotype_table(task, [real], said, draws=100)


def test_leaks_that_were_planted(tmp_path):
    "A generator or an encoder that has seen the test people; a generator of whom nobody knows what it has seen."
    real = build_virtual_cohort(tmp_path/'real', 40, seed=3, workers=1, progress=False, people='cm')
    other = build_virtual_cohort(tmp_path/'other', 20, seed=4, workers=1, progress=False)
    task = case_control(real, 'CM', k=3)
    g, bundle = toy(tmp_path/'bundle', real, trained_on=other.fingerprint)
    drawn = synthesise(g, bundle, real, tmp_path/'drawn', rows=real.index('train')[:4], per_subject=1, steps=1, progress=False)
    with pytest.raises(Leak, match='it is not known whom the generator'): pool_of(method_of('mae_synthetic:given:10'), real, [drawn])
    g, bundle = toy(tmp_path/'spy', real, trained_on_people=digest(sorted(real.table['subject']), 16))   # the same cohort, and its test split as well
    spied = synthesise(g, bundle, real, tmp_path/'spied', rows=real.index('train')[:4], per_subject=1, steps=1, progress=False)
    with pytest.raises(Leak, match='was trained on other people') as e: pool_of(method_of('mae_synthetic:given:10'), real, [spied])
    assert not re.search(r'v\d+-\d{6}', str(e.value))
    _, _, seen = pool_of(method_of('mae_real'), real)
    model = dict(width=48, depth=1, heads=2)
    with pytest.raises(Leak, match='test subjects were seen by the pre-training of mae_real') as e: tune(task, 0, method_of('mae_real'), None, tune_config('smoke'), tmp_path/'run', seen, model, device='cpu')
    assert not re.search(r'v\d+-\d{6}', str(e.value)) and not (tmp_path/'run').exists(), 'stopped before anything was trained'
    check_no_leak(set(real.table['subject'].iloc[held_back(real)]), seen)   # the people of the other splits are free
    assert 'v3' not in repr(Seen('x', people_of(real)))


JOB = '''
import sys, torch
torch.set_num_threads(1)
from ecgflowcmr.cohort import open_cohort
from ecgflowcmr.mixing import method_of
from ecgflowcmr.tasks import case_control, tune, tune_config
c = tune_config('smoke') | dict(epochs=12, precision='fp32', save_steps=3)
tune(case_control(open_cohort(sys.argv[1]), 'CAD', k=3), 0, method_of('vit'), None, c, sys.argv[2], [], dict(width=48, depth=1, heads=2), device='cpu')
'''


def test_a_killed_fold_goes_on(tmp_path):
    "SIGKILL after a resume state was written: the same outputs and the same choice of epoch as without."
    build_virtual_cohort(tmp_path/'sick', 30, seed=6, workers=1, progress=False, people='cad')
    start = lambda name: subprocess.Popen([sys.executable, '-c', JOB, str(tmp_path/'sick'), str(tmp_path/name)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    fold = lambda name: tmp_path/name/'tune'/'cad'/'vit-1'
    p, until = start('cut'), time.time() + 120
    while not (fold('cut')/'resume.safetensors').exists() and p.poll() is None and time.time() < until: time.sleep(.005)
    assert p.poll() is None, 'killed in the middle, not after the end'
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert not (fold('cut')/'done.json').exists()
    for name in ('cut', 'whole'):
        p = start(name)
        assert p.wait(timeout=300) == 0, p.stderr.read()
    a, b = (load_file(fold(o)/'predictions.safetensors') for o in ('cut', 'whole'))
    for k in ('val', 'test'): np.testing.assert_array_equal(a[k], b[k])
    one, two = (json.loads((fold(o)/'done.json').read_text()) for o in ('cut', 'whole'))
    assert one['curve'] == two['curve'] and one['figures'] == two['figures'] and len(one['curve']) == 12


# ---- the DAG ----

BIN = Path(sys.executable).parent
STAND_IN = '''#!{python}
"In papermill's place: leaves what the notebook would leave, and a line of what was asked."
import re, sys
from pathlib import Path
nb, *rest = sys.argv[1:]; said = {{k: v for p, k, v in zip(rest, rest[1:], rest[2:]) if p in ('-p', '-r')}}
if wrong := [k for p, k, v in zip(rest, rest[1:], rest[2:]) if p == '-p' and v.isdigit() and k != 'seed']: sys.exit(f'{{wrong}}: papermill reads numbers from -p')
n = re.search(r'(\\d\\d)_', nb)[1]; run = Path('runs')/said['run']
stage = {{'20': 'pamae', '25': 'vae', '30': 'amdf', '40': 'table1', '41': 'ablation', '42': 'noise_scale', '43': 'turing'}}.get(n)
if stage: (run/stage).mkdir(parents=True, exist_ok=True); (run/stage/'done.json').write_text('{{}}')
if n in ('50', '51', '52') and 'methods' not in said: (run/'figures').mkdir(parents=True, exist_ok=True); (run/'figures'/f'table{{int(n) - 48}}_all.csv').write_text(said['ratios'] + ' ' + said['controls'])
with open('asked.txt', 'a') as f: f.write(n + ' ' + ' '.join(f'{{k}}={{said[k]}}' for k in ('system', 'methods', 'diseases', 'folds', 'ratios', 'controls', 'publish') if k in said) + '\\n')
'''


@pytest.fixture
def dag(tmp_path):
    "Snakemake in a folder of its own, with a stand-in for papermill; returns what was asked of it, notebook by notebook."
    for o in ('nbs', 'ecgflowcmr', 'Snakefile'): (tmp_path/o).symlink_to(ROOT/o)
    (tmp_path/'bin').mkdir(); (tmp_path/'bin'/'papermill').write_text(STAND_IN.format(python=sys.executable)); (tmp_path/'bin'/'papermill').chmod(0o755)
    def run(*words, ok=True):
        asked = tmp_path/'asked.txt'; asked.write_text('')
        p = subprocess.run([BIN/'snakemake', '--cores', '2', *words], cwd=tmp_path, env=os.environ | {'PATH': f'{tmp_path/"bin"}{os.pathsep}{os.environ["PATH"]}'}, capture_output=True, text=True, timeout=300)
        assert (p.returncode == 0) == ok, (p.stdout + p.stderr)[-3000:]
        return asked.read_text().splitlines() if ok else p.stdout + p.stderr
    run.folder = tmp_path
    return run


def test_rows_of_the_dag_are_those_of_the_table(dag):
    "Controls reach the notebooks, one for each ratio; the encoders of the jobs are the rows of the table."
    asked = dag('table2', 'table3', '--config', 'preset=demo', 'run=x', 'ratios=300', 'systems=harmonic videogpt', 'controls=longer augmented')
    assert sorted(o.split('methods=')[1] for o in asked if o.startswith('51 methods=')) == sorted(m.key for m in methods_of('harmonic videogpt', '300', 'longer augmented'))
    assert {'50 ratios=300 controls=longer augmented', '51 ratios=300 controls=longer augmented'} <= set(asked)
    assert sorted(o for o in asked if o.startswith('50 methods=vit ')) == [f'50 methods=vit diseases={d} folds={f}' for d in ('cad', 'cm', 'hf') for f in ('1 2', '3 4 5')]
    assert sorted(o for o in asked if o.startswith('31')) == ['31 system=harmonic', '31 system=videogpt'], 'a generator is trained once'
    for bad, says in (('controls=more', 'valid are longer, augmented, none'), ('systems=given', 'needs synthetic=FOLDER')):
        assert says in dag('-n', 'table3', '--config', 'preset=demo', bad, ok=False)


def test_a_second_configuration_finds_its_own_tables(dag):
    "Other ratios, and the first ones again: nothing is trained twice, and figures/ holds what was asked for last."
    small = ('--config', 'preset=smoke', 'run=x', 'seed=3'); shown = lambda: [(dag.folder/'runs'/'x'/'figures'/f'table{k}_all.csv').read_text() for k in '234']
    first = dag('paper', *small, 'ratios=100')
    systems = [o for o in first if o.startswith('31')]
    assert len(systems) == len(set(systems)) == 8 and first[-1] == '90 publish=False' and shown() == ['100 longer']*3
    assert first.index('30 ') < min(first.index(o) for o in ('31 system=harmonic', '41 ', '42 ')), "the run's own generator has the plain name"
    second = dag('paper', *small, 'ratios=100 200', 'controls=longer augmented')
    assert not [o for o in second if o[:2] in ('20', '25', '30', '31', '40', '41', '42', '43')] and shown() == ['100 200 longer augmented']*3
    assert sorted(o.split('methods=')[1] for o in second if o.startswith('51 methods=')) == sorted(['mae_real_longer:200', 'mae_real_augmented:100', 'mae_real_augmented:200', 'mae_synthetic:harmonic:200'])
    third = dag('paper', *small, 'ratios=100')
    assert sorted(third) == sorted([f'5{k} ratios=100 controls=longer' for k in '012'] + ['90 publish=False']) and shown() == ['100 longer']*3
    assert dag('paper', *small, 'ratios=100') == []
    assert dag('table3', *small, 'ratios=100', 'sizes=tune.epochs=1')[-1] == '51 ratios=100 controls=longer', 'other sizes: other encoders'


def test_who_may_write_to_figures(dag):
    "A demo run of virtual hearts does; one of patients does not by itself, nor a smoke run, as was seen above."
    for words, publish in ((['preset=demo'], True), (['preset=smoke', 'publish=True'], True), (['preset=demo', 'cohort=runs/cohorts/ukb'], False)):
        assert f'-p publish {publish}' in subprocess.run([BIN/'snakemake', '-n', '-p', '--cores', '2', 'paper', '--config', 'run=y', *words], cwd=dag.folder, capture_output=True, text=True).stdout
