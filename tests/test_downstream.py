"Tables 2 to 4: the disease table at the smoke preset in a fresh kernel, planted leaks, a job that is killed, and bad input."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from ecgflowcmr.bundle import ECGFlowCMR
from ecgflowcmr.cohort import COHORT_SIZE, build_virtual_cohort, cohort_at
from ecgflowcmr.mixing import Leak, Seen, check_no_leak, method_of, people_of, pool_of
from ecgflowcmr.synthesis import synthesise
from ecgflowcmr.tasks import case_control, held_back, tune, tune_config

ROOT = Path(__file__).resolve().parents[1]
SIZES = 'tune.epochs=1'
ROWS = 'vit mae_real mae_synthetic:given:50'


class Toy(ECGFlowCMR):
    "Random weights; a beat of one second in every strip."
    def read_beat(self, mv): return self.pamae.encode(mv)[:, :50].detach(), torch.ones(len(mv)), torch.ones(len(mv), dtype=torch.long)


def toy(folder, cohort, trained_on=None):
    "An untrained generator that says what it was trained on, and its bundle."
    torch.manual_seed(0)
    g = Toy(dict(pamae=dict(width=16, depth=1), vae=dict(width=8, deep=8, blocks=1), dit=dict(width=16, depth=1, heads=2, features=16, patch=2, components=8), harmonics={}, pixel_mm=1.83)).eval()
    return g, g.save_pretrained(folder, kind='untrained toy', subjects=0, cohort=trained_on or cohort.fingerprint)


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


@pytest.mark.parametrize('params, message', [
    (dict(methods='mae_synthetic:given:10', synthetic='{run}/test'), 'drawn from held-out people'),
    (dict(methods='mae_synthetic:given:500', synthetic='{run}/train'), 'only 24 were drawn'),
    (dict(methods='mae'), 'no such method'),
    (dict(diseases='flu'), 'cad')])
def test_the_notebook_stops(run, refusal, params, message):
    params = {k: v.format(run=run) for k, v in params.items()}
    assert message in str(refusal('50_disease_classification.ipynb', **(dict(preset='smoke', run=run.name, diseases='cm', settings=SIZES) | params)))


def test_leaks_that_were_planted(tmp_path):
    "A generator or an encoder that has seen the test people; a generator of whom nobody knows what it has seen."
    real = build_virtual_cohort(tmp_path/'real', 40, seed=3, workers=1, progress=False, people='cm')
    other = build_virtual_cohort(tmp_path/'other', 20, seed=4, workers=1, progress=False)
    task = case_control(real, 'CM', k=3)
    g, bundle = toy(tmp_path/'bundle', real, trained_on=other.fingerprint)
    drawn = synthesise(g, bundle, real, tmp_path/'drawn', rows=real.index('train')[:4], per_subject=1, steps=1, progress=False)
    with pytest.raises(Leak, match='it is not known whom the generator'): pool_of(method_of('mae_synthetic:given:10'), real, [drawn])
    _, _, seen = pool_of(method_of('mae_real'), real)
    model = dict(width=48, depth=1, heads=2, tube=(50, 16, 16))
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
tune(case_control(open_cohort(sys.argv[1]), 'CAD', k=3), 0, method_of('vit'), None, c, sys.argv[2], [], dict(width=48, depth=1, heads=2, tube=(50, 16, 16)), device='cpu')
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
