"CardiacNets' figures 2 to 4 at the smoke preset, in one folder: 60 people to pre-train on, 30 to screen."
import json, os, re, shutil
from pathlib import Path
import matplotlib, pandas as pd
import pytest
from ecgflowcmr.cohort import cohort_at

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(preset='smoke', settings='train.epochs=1')


@pytest.fixture(scope='module')
def run():
    "A run of its own, and its clinic, which the disease table has too."
    out = ROOT/'runs'/f'test-cardiacnets-{os.getpid()}'
    out.mkdir(parents=True)
    yield out, str(cohort_at('virtual', ROOT, n=30, seed=101, people='cm', progress=False).folder)
    shutil.rmtree(out, ignore_errors=True)


@pytest.fixture
def here(cells, capsys):
    "Run a notebook here; what it showed."
    matplotlib.use('agg')
    def run(nb, **params):
        shown = []
        cells(nb, display=lambda *o: shown.append(' '.join(map(str, o))), **params)
        return '\n'.join(shown) + capsys.readouterr().out
    return run


@pytest.mark.slow
def test_screening_labels_and_subtypes(run, here):
    run, clinic = run
    said = here('62_screening.ipynb', run=run.name, clinic=clinic, diseases='CM', hospitals='', draws=100, **SMALL)
    table, r = (pd.read_csv(run/'figures'/f'{o}.csv') for o in ('screening', 'screening_r'))
    assert table['way'].tolist() == r['way'].tolist() == ['ecg', 'aligned', 'harmonic', 'cmr', 'conv']
    assert table['p (Holm)'].notna().tolist() == [False, True, True, True, True]
    assert ((table['AUROC: low'] <= table['AUROC']) & (table['AUROC'] <= table['AUROC: high'])).all()
    assert r['phenotypes'].tolist() == [82]*5 and r['UK Biobank, as published'].dropna().tolist() == [.351, .426, .612]
    kept = {o: o.stat().st_mtime_ns for o in run.glob('screen/*/best.safetensors')}
    assert len(kept) == 10
    labels = here('63_label_efficiency.ipynb', run=run.name, clinic=clinic, fractions='50 100', **SMALL)
    assert {o: o.stat().st_mtime_ns for o in kept} == kept, 'what chapter 62 trained on all labels is read'
    few = pd.read_csv(run/'figures'/'label_efficiency.csv')
    assert few['what'].tolist() == ['50 %']*3 + ['100 %']*3 and few['labels'].iloc[0] < few['labels'].iloc[3]
    assert few['AUROC'].iloc[3:].tolist() == table['AUROC'].iloc[:3].tolist()
    kinds = here('64_subtypes.ipynb', run=run.name, clinic='subtypes', ways='ecg', hospital='', **SMALL)
    absent = json.loads((run/'figures'/'subtypes.json').read_text())['made_by']['absent']
    assert set(pd.read_csv(run/'figures'/'subtypes.csv')['what']) == {'HCM', 'DCM', 'RCM'} - set(absent)
    text = said + labels + kinds + ''.join(o.read_text() for o in run.glob('figures/*.[cj]s*'))
    assert not re.search(r'v\d+-\d{6}', text), 'no subject id in an output or a table'


@pytest.mark.slow
def test_phenotypes_of_generated_cines(smoke, here):
    "Both views drawn and read; asked again, nothing is drawn anew."
    run = ROOT/'runs'/smoke[0]
    asked = dict(preset='smoke', run=run.name, subjects=6, seconds=.5, settings='train.epochs=1')
    here('65_phenotypes_from_generated.ipynb', **asked)
    every = pd.read_csv(run/'figures'/'phenotypes_generated_all.csv', index_col=0)
    assert len(every) == 82 and every['n'].max() == 6 and {'generated, long axis', 'generated, short axis', 'true cine, short axis'} <= set(every)
    assert ((every['generated, long axis: low'] <= every['generated, long axis']) & (every['generated, long axis'] <= every['generated, long axis: high'])).all()
    drawn = {o: o.stat().st_mtime_ns for o in run.glob('phenotypes-*/cines.npy')}
    assert len(drawn) == 4
    said = here('65_phenotypes_from_generated.ipynb', **asked)
    assert {o: o.stat().st_mtime_ns for o in drawn} == drawn and 'mean r of 82 phenotypes' in said


@pytest.mark.parametrize('name, params, message', [
    ('62_screening', dict(diseases='CM FLU'), 'names of preset, CAD, CM, PC, HF, PH'),
    ('62_screening', dict(diseases='CM', settings='train.epoch=1'), "'train.epoch=1' names no setting"),
    ('63_label_efficiency', dict(disease='PC'), 'nobody of 30 people has PC'),
    ('63_label_efficiency', dict(fractions='1 100'), '1 % of 9 training people'),
    ('64_subtypes', dict(ways='mri'), 'names of ecg, aligned, harmonic')])
def test_the_notebook_stops(run, refusal, name, params, message):
    assert message in str(refusal(f'{name}.ipynb', **(SMALL | dict(run=run[0].name, clinic=run[1]) | params)))
