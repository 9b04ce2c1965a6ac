"Virtual people: what outside checks rely on, sameness whoever asks, what is refused, and the experiment that reports on them."
import re, shutil, subprocess, sys
from pathlib import Path
import nbformat
import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_limits
from ecgflowcmr.cohort import audit, build_virtual_cohort
from ecgflowcmr.delineate import measure
from ecgflowcmr.ecg import DataError
from ecgflowcmr.virtual.disease import DISEASES
from ecgflowcmr.virtual.heart import Heart, geometry
from ecgflowcmr.virtual.people import PEOPLE, virtual_subject
from ecgflowcmr.virtual.phenotypes import NAMES
from ecgflowcmr.virtual.report import FIFTEEN, TARGETS

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ARRAYS = dict(ecg=((12,5000), 'float32'), la=((50,96,96), 'uint8'), sa=((50,80,80), 'uint8'), la_mask=((50,96,96), 'uint8'), sa_mask=((50,80,80), 'uint8'))


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ARRAYS) and all(getattr(a, k) == getattr(b, k) for k in ('exact','measured','covariates','diagnoses','rr_s','pixel_mm'))


@pytest.fixture(scope='module')
def crowd():
    "A few subjects of the natural population, and one of every disease."
    return [virtual_subject(i, coupling='realistic') for i in range(4)] + [virtual_subject(k, coupling='realistic', disease=d, severity=.9) for k,d in enumerate(DISEASES)]


def test_contract(crowd):
    for s in crowd:
        for k,(shape,dtype) in ARRAYS.items(): assert (getattr(s, k).shape, getattr(s, k).dtype.name) == (shape, dtype), k
        assert np.isfinite(s.ecg).all() and .3 < abs(s.ecg).max() < 8, 'millivolt'
        assert s.la.max() > 200 and s.sa.max() > 200 and s.la.min() < 20, 'the whole range of grey'
        for d in (s.exact, s.measured): assert list(d) == list(NAMES) and np.isfinite(list(d.values())).all()
        assert len(NAMES) == 82 and s.exact != s.measured
        assert s.pixel_mm == pytest.approx(1.83, abs=.05) and .4 < s.rr_s < 1.7
        assert set(FIFTEEN) <= set(s.covariates) and s.covariates['sex'] in ('male','female')
        assert all(re.fullmatch(r'[A-Z]\d\d(\.\d)?', c) for c in s.diagnoses)
    assert all(s.diagnoses for s in crowd[4:])


def test_masks(crowd):
    "0 background, 1 LV, 2 myocardium, 3 RV, 4 LA, 5 RA, 6 aorta; what a view must show it shows in every frame."
    for s in crowd:
        for mask,allowed,must in ((s.la_mask, range(7), (0,1,2,3,4,5)), (s.sa_mask, (0,1,2,3,6), (0,1,2,3))):
            assert set(np.unique(mask)) <= set(allowed)
            for frame in mask[::7]: assert set(must) <= set(np.unique(frame))
        inside,wall = (s.sa[0][s.sa_mask[0] == k].mean() for k in (1,2))
        assert inside > 1.5*wall, 'bSSFP: blood is bright'


def test_same_with_any_number_of_threads():
    "Products of large matrices differ in their last bits with the number of threads; a subject must not."
    with threadpool_limits(1): one = virtual_subject(0, coupling='realistic')
    with threadpool_limits(2): assert same(one, virtual_subject(0, coupling='realistic'))


def test_r_peak_is_frame_0(crowd):
    for s in crowd:
        lv = (s.sa_mask == 1).sum((1,2))
        assert lv[0] >= .97*lv.max(), 'end-diastole'
        assert 10 <= lv.argmin() <= 30, 'end-systole in the first part of the beat'
        if 'I48.9' in s.diagnoses: continue   # fibrillation: the mean is right, no single beat is
        assert np.diff(s.r_times).mean() == pytest.approx(s.rr_s, rel=.06)
        assert measure(s.ecg)['RR']/1000 == pytest.approx(s.rr_s, rel=.06), 'as found in the ECG'


def test_same_whoever_asks(tmp_path):
    "1 and 4 processes, chunks of 5 and 3, other subjects before it, another state of numpy's own generator: the same bits."
    ask = dict(n=10, seed=3, masks=True, progress=False, coupling='realistic')
    one = build_virtual_cohort(tmp_path/'one', workers=1, chunk=5, **ask)
    four = build_virtual_cohort(tmp_path/'four', workers=4, chunk=3, **ask)
    assert one.fingerprint == four.fingerprint
    for f in one.folder.iterdir(): assert f.read_bytes() == (four.folder/f.name).read_bytes(), f.name
    np.random.seed(5)
    s = virtual_subject(7, seed=3, coupling='realistic')
    for k in ARRAYS: np.testing.assert_array_equal(getattr(one, k)[7], getattr(s, k))
    for k in ('exact','measured'): assert {c: getattr(one, k)[c][7] for c in NAMES} == getattr(s, k)
    assert np.random.get_state()[1][0] == 5 and np.random.get_state()[2] == 624, "numpy's own generator is left alone"
    assert audit(one)['ok']
    assert not same(s, virtual_subject(7, seed=4, coupling='realistic')) and not same(s, virtual_subject(8, seed=3, coupling='realistic'))


def test_couplings_change_the_ecg_alone():
    three = [virtual_subject(2, coupling=c) for c in ('strong','realistic','none')]
    for k in ('LVEDV','LVEF','LVM','RVEDV','LA_max_vol','WT_global'): assert three[0].exact[k] == pytest.approx(three[1].exact[k], rel=1e-9), k
    for k in ('LVEDV','LVM','RVEDV'): assert three[2].exact[k] == pytest.approx(three[0].exact[k], rel=.02), 'the rate may differ'
    assert len({s.ecg.tobytes() for s in three}) == 3
    np.testing.assert_array_equal(three[0].la_mask, three[1].la_mask)


def test_populations():
    four = {p: [virtual_subject(i, people=p) for i in range(4)] for p in ('healthy','cm','cad','hf','subtypes','hospital')}
    main = dict(cad=r'I2[0-5]', hf='I50', cm='I4[23]')
    for p,code in main.items():
        for case,control in (four[p][:2], four[p][2:]):
            assert any(re.match(code, c) for c in case.diagnoses) and not any(re.match(code, c) for c in control.diagnoses)
            assert case.covariates['sex'] == control.covariates['sex'] and case.covariates['age'] == pytest.approx(control.covariates['age'])
    assert all(s.covariates['smoking'] is None and s.covariates['sex'] for s in four['hospital']), 'nobody filled in a questionnaire'
    assert all(not re.match('I2[0-57]|I3[0-2]|I42|I50', c) for s in four['healthy'] for c in s.diagnoses)
    assert set(PEOPLE) == {*four, 'natural'}


def test_textbook_cases(crowd):
    sick = dict(zip(DISEASES, (s.exact for s in crowd[4:])))
    well = [s.exact for s in crowd[:4] if not s.diagnoses]
    walls = lambda e: max(e[f'WT_AHA_{k}'] for k in range(1,17))
    assert walls(sick['HCM']) >= 13 and sick['DCM']['LVEF'] < 40 < sick['HCM']['LVEF'] and sick['DCM']['LVEDV'] > 200
    assert sick['RCM']['LA_max_vol'] > 1.2*np.mean([e['LA_max_vol'] for e in well]) and sick['RCM']['LAEF'] < 40
    assert sick['PH']['RVEDV']/sick['PH']['LVEDV'] > 1.27, 'mild and more (sheet 4.1)'
    assert abs(sick['DCM']['Ecc_global']) < 16


@pytest.mark.parametrize('wrong, says', [
    (dict(lvef=95.), 'lvef'),                    # an ejection fraction of 95 %
    (dict(lvm=900., lvedv=60.), 'lvm|wall|wt'),  # a wall thicker than the cavity allows
    (dict(hr=400.), 'hr'),                       # RR shorter than systole
    (dict(lvedv=float('nan')), 'lvedv'), (dict(wt=(1.,)*15), 'wt'), (dict(pr_ms=2000.), 'pr_ms'),
], ids=lambda o: next(iter(o)) if isinstance(o, dict) else '')
def test_impossible_hearts(wrong, says):
    with pytest.raises(DataError, match=says): geometry(Heart(**wrong))


@pytest.mark.parametrize('wrong, says', [
    (dict(disease='gout'), 'gout.*CAD'), (dict(people='martians'), 'martians.*natural'), (dict(coupling='weak'), 'weak.*strong'), (dict(severity=1.5, disease='HCM'), '1.5.*0 to 1'),
], ids=lambda o: next(iter(o)) if isinstance(o, dict) else '')
def test_unknown_names(tmp_path, wrong, says):
    with pytest.raises(DataError, match=says): virtual_subject(0, **wrong)
    with pytest.raises(DataError, match=says): build_virtual_cohort(tmp_path/'c', 20, progress=False, **wrong)
    with pytest.raises(DataError, match='n: is 0'): build_virtual_cohort(tmp_path/'c', 0)
    assert not list(tmp_path.iterdir()), 'nothing was begun'


@pytest.mark.parametrize('i', [-1, 1.5])
def test_impossible_subjects(i):
    with pytest.raises((DataError, TypeError)): virtual_subject(i)


def test_second_hospital_in_the_store(tmp_path):
    c = build_virtual_cohort(tmp_path/'c', 10, workers=1, progress=False, people='hospital')
    assert c.table['smoking'].isna().all() and c.table['age'].notna().all() and c.measured is not None
    assert build_virtual_cohort(tmp_path/'c', 10, people='hospital').fingerprint == c.fingerprint
    with pytest.raises(DataError, match="population is.*hospital.*natural"): build_virtual_cohort(tmp_path/'c', 10)


@pytest.mark.slow
def test_the_experiment(tmp_path, papermill_run, monkeypatch):
    "21 with 30 subjects: every target has its rows, what holds by construction holds, and all pictures are there."
    shutil.copy(ROOT/'settings.ini', tmp_path)
    monkeypatch.setenv('ECGFLOWCMR_ROOT', str(tmp_path))
    nb = papermill_run('21_virtual_cohort.ipynb', preset='smoke', n=30, workers=2, run='t')
    out = tmp_path/'runs'/'t'/'virtual'
    table = pd.read_csv(out/'virtual_checks.csv')
    assert set(table['target']) == set(TARGETS)
    assert set(table.loc[table['target'].isin(['determinism','muscle','timing']), 'ok']) == {True}, 'by construction'
    lines = (out/'virtual_table.md').read_text().splitlines()
    assert lines[0] == '| check | target | source | reached | ok |' and len(lines) >= 2 + len(TARGETS) - 1
    assert {f.name for f in out.glob('*.png')} == {f'virtual_{k}.png' for k in ('distributions','correlations','ecg','signatures','beats','information','examples','table')}
    assert len(list(out.glob('features-*.csv'))) == 1 + 15 and (out/'done.json').exists() and not (tmp_path/'figures').exists()
    printed = ' '.join(o.get('text', '') for c in nb.cells for o in c.get('outputs', []) if o.get('name') == 'stdout')
    assert 'results: runs/t/virtual' in printed and str(tmp_path) not in printed
    assert not re.search(r'v0-\d{6}', nbformat.writes(nb)), "no subject's id in the report"


def test_help_of_the_experiment():
    res = subprocess.run([BIN/'papermill', '--help-notebook', 'nbs/21_virtual_cohort.ipynb'], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode == 0 and 'Unknown' not in res.stdout
    for k in ('preset','cohort','coupling','people','n','workers','masks','compare','publish','run','seed'): assert re.search(rf'\n  {k}: \w+ \(default .*\)\s+\S+', res.stdout), k
