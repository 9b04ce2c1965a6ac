"Real files to a cohort: kills, crashes, changed sources, made-up archives, real recordings, and the audit."
import hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from ecgflowcmr.build import build_cohort
from ecgflowcmr.cohort import audit, audit_together, build_virtual_cohort, check_fitted, cohort_at, fit_scaler, labels_among, open_cohort, read_table, train_rows
from ecgflowcmr.diagnoses import GROUPS, groups_of
from ecgflowcmr.ecg import DataError, read_ecg
from ecgflowcmr.ecg_files import write_wfdb
from ecgflowcmr.hospital import build_hospital
from ecgflowcmr.mimic import build_mimic
from ecgflowcmr.trees import write_mimic_tree, write_ukbiobank_tree
from ecgflowcmr.twins import cine_likeness, ecg_signature, find_twins
from ecgflowcmr.ukbiobank import build_ukbiobank
from ecgflowcmr.virtual.ecg import virtual_ecg
from ecgflowcmr.virtual.people import virtual_person
from test_cohort import plain_subject

HERE = Path(__file__).parent


def read_made_up(source, row, need):
    "A quick record: arrays from a seed in a text file; some files are worse than others."
    text = (Path(source)/row['ecg']).read_text()
    if text == 'crash': os.kill(os.getpid(), signal.SIGKILL)
    if text == 'bad': raise DataError('is flat', file=Path(source)/row['ecg'], field='lead II')
    if text == 'odd': raise KeyError(row['subject'])
    if text.startswith('slow'): time.sleep(.1)
    r = np.random.default_rng(int(text.split()[-1]))
    grey = lambda n: r.integers(0, 256, (50,n,n), dtype=np.uint8)
    return {k: dict(ecg=lambda: r.normal(size=(12,5000)).astype('float32'), la=lambda: grey(96), sa=lambda: grey(80))[k]() for k in need}, dict(rr_s=1.)


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def source_of(folder, n=20, **special):
    "Text files with seeds, some special; and the table."
    folder.mkdir()
    for i in range(n): (folder/f'{1000 + i}_file.txt').write_text(special.get(f'r{i}', f'slow {i}'))
    f = [f'{1000 + i}_file.txt' for i in range(n)]
    return pd.DataFrame(dict(subject=[str(1000 + i) for i in range(n)], ecg=f, la=f, age=np.arange(n)))


def build(folder, source, table, **kw): return build_cohort(folder, source, table, **(dict(workers=1, progress=False, chunk=3, read=read_made_up) | kw))


def start(folder, source, n, **kw):
    "The same in a process of its own."
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_build import *; import test_build; f = [f'{{1000 + i}}_file.txt' for i in range({n})]; " \
           f"t = pd.DataFrame(dict(subject=[str(1000 + i) for i in range({n})], ecg=f, la=f, age=np.arange({n}))); print(build({str(folder)!r}, {str(source)!r}, t, read=test_build.read_made_up, **{kw!r}).fingerprint)"
    return subprocess.Popen([sys.executable, '-c', code], cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_workers_kills_and_resuming_give_the_same_bytes(tmp_path):
    table = source_of(tmp_path/'s', r4='bad', r7='odd', r11='slow 10')   # 10 and 11 are one recording
    whole = build(tmp_path/'a', tmp_path/'s', table)
    assert len(whole) == 16 and read_table(whole.folder/'quarantine.csv')['subject'].tolist() == ['1004', '1007', '1010', '1011']
    assert '1007' not in read_table(whole.folder/'quarantine.csv')['reason'][1] and (read_table(whole.folder/'hashes.csv')['ecg'].str.len() == 16).all()
    p = start(tmp_path/'b', tmp_path/'s', 20, workers=2)
    end = time.time() + 120
    while not list((tmp_path/'b.partial'/'rows').glob('*.json')): assert time.time() < end and p.poll() is None, p.stderr.read(); time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait(); time.sleep(.5)
    done = len(list((tmp_path/'b.partial'/'rows').glob('*.json')))
    with pytest.raises(DataError, match='unfinished'): open_cohort(tmp_path/'b')
    with pytest.raises(DataError, match='another plan'): build(tmp_path/'b', tmp_path/'s', table.assign(age=3))
    assert done < 7 and files(build(tmp_path/'b', tmp_path/'s', table, chunk=50).folder) == files(whole.folder)
    assert not list(tmp_path.glob('*.partial'))


@pytest.mark.parametrize('step', ['begin_blocks', 'fill_blocks', 'block_twins', 'gather', 'write_store', 'finish_store'])
def test_stopped_after_any_step(tmp_path, monkeypatch, step):
    import ecgflowcmr.build as m
    table = source_of(tmp_path/'s', 8, r3='bad', **{f'r{i}': str(i) for i in range(8) if i != 3})
    whole = build(tmp_path/'a', tmp_path/'s', table)
    real = getattr(m, step)
    def stop(*a, **k): real(*a, **k); raise KeyboardInterrupt
    monkeypatch.setattr(m, step, stop)
    with pytest.raises(KeyboardInterrupt): build(tmp_path/'b', tmp_path/'s', table)
    monkeypatch.undo()
    assert files(build(tmp_path/'b', tmp_path/'s', table).folder) == files(whole.folder)


def test_stopped_in_the_middle_of_the_gathering(tmp_path, monkeypatch):
    import ecgflowcmr.build as m
    table = source_of(tmp_path/'s', 9, **{f'r{i}': str(i) for i in range(9)})
    whole = build(tmp_path/'a', tmp_path/'s', table)
    real,count = m.write_block,[0]
    def stop(f, *a):
        count[0] += Path(f).parent.name != 'blocks'
        if count[0] == 9: raise OSError(28, 'No space left on device')
        real(f, *a)
    monkeypatch.setattr(m, 'write_block', stop)
    with pytest.raises(OSError, match='No space'): build(tmp_path/'b', tmp_path/'s', table)
    monkeypatch.undo()
    assert files(build(tmp_path/'b', tmp_path/'s', table).folder) == files(whole.folder)


def test_a_record_that_ends_its_process_is_set_aside(tmp_path):
    table = source_of(tmp_path/'s', 6, r2='crash', **{f'r{i}': str(i) for i in (0,1,3,4,5)})
    c = build(tmp_path/'c', tmp_path/'s', table, workers=2, chunk=6)
    q = read_table(c.folder/'quarantine.csv')
    assert q['subject'].tolist() == ['1002'] and 'ended the process' in q['reason'][0] and len(c) == 5


def test_changed_sources_are_noticed(tmp_path, monkeypatch, capsys):
    import ecgflowcmr.build as m
    table = source_of(tmp_path/'s', 9, **{f'r{i}': str(i) for i in range(9)})
    real = m.judge
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(m, 'judge', stop)
    with pytest.raises(KeyboardInterrupt): build(tmp_path/'c', tmp_path/'s', table)
    monkeypatch.setattr(m, 'judge', real)
    (tmp_path/'s'/'1004_file.txt').write_text('7777')
    c = build(tmp_path/'c', tmp_path/'s', table)
    assert '1 blocks are read anew' in capsys.readouterr().err
    np.testing.assert_array_equal(c.ecg[4], read_made_up(tmp_path/'s', dict(ecg='1004_file.txt'), ['ecg'])[0]['ecg'])
    assert build(c.folder, tmp_path/'s', table).fingerprint == c.fingerprint
    (tmp_path/'s'/'1004_file.txt').write_text('123456')
    with pytest.raises(DataError, match='source files have changed'): build(c.folder, tmp_path/'s', table)
    shutil.rmtree(tmp_path/'s')
    assert len(build(c.folder, tmp_path/'s', table)) == 9, 'the source is gone, the cohort is whole'


def test_ids_never_leave(tmp_path):
    table = source_of(tmp_path/'s', 20, r4='bad', r7='odd', r10='11', **{f'r{i}': str(i) for i in range(20) if i not in (4,7,10)})
    c = build(tmp_path/'c', tmp_path/'s', table, hash_ids=True, salt='a long secret')
    for name,data in files(c.folder).items():
        if not name.endswith('.npy'): assert not any(s.encode() in data for s in table['subject']) and b'secret' not in data and str(tmp_path).encode() not in data, name
    with pytest.raises(DataError, match='another hashed'): build(c.folder, tmp_path/'s', table, hash_ids=True, salt='another secret')
    with pytest.raises(DataError) as e: build(tmp_path/'d', tmp_path/'s', table.assign(split=['train','test']*10, subject='1000'))
    assert '1000' not in str(e.value)


@pytest.fixture(scope='module')
def ukb(tmp_path_factory):
    "A made-up UK Biobank of 12 with both views, and its cohort with hashed ids."
    f = tmp_path_factory.mktemp('ukb')
    truth = write_ukbiobank_tree(f/'tree', 12)
    return f, truth, build_ukbiobank(f/'c', f/'tree'/'bulk', f/'tree'/'table.csv', hash_ids=True, salt='a long secret', workers=1, progress=False)


def test_a_made_up_ukbiobank(ukb):
    f,truth,c = ukb
    name = {hashlib.sha256(f'a long secret:{s}'.encode()).hexdigest()[:16]: s for s in truth['subject']}
    q,t = read_table(c.folder/'quarantine.csv'),truth.set_index('subject')
    assert {(name[s], w) for s,w in zip(q['subject'], q['what'])} == {(s, r['where']) for s,r in t.iterrows() if r['where']}
    assert sorted(name[s] for s in c.table['subject']) == sorted(s for s,r in t.iterrows() if not r['where'] for _ in range(r['visits']))
    assert c.table.groupby('subject')['split'].nunique().max() == 1 and c.table['visit'].tolist().count(3) == 1
    for i,s in enumerate(c.table['subject']):
        r,row = t.loc[name[s]],c.table.loc[i]
        for k in ('la','sa'): assert cine_likeness(getattr(c, k)[i], r['middle'][k], 16) > .8, k
        if row['visit'] == 3:
            assert c.measured.loc[i].drop('subject').isna().all(), 'the table has no phenotypes of the second visit'
            continue
        np.testing.assert_allclose(c.ecg[i], r['mv'], atol=.0026)
        for k in ('LVEDV', 'LVM', 'RVEF', 'WT_AHA_7', 'Ecc_global', 'Ell_6'): assert c.measured[k][i] == pytest.approx(r['truth']['measured'][k], rel=1e-4)
        for k in ('age', 'height', 'hr', 'smoking', 'pork'): assert row[k] == pytest.approx(r['truth']['covariates'][k], rel=1e-4) or r['truth']['covariates'][k] is None
        assert row['sex'] == r['truth']['covariates']['sex'] and row['diagnoses'] == ';'.join(sorted(r['truth']['before'])) and row['rr_s'] == pytest.approx(r['truth']['rr_s'], abs=.002)
    for p in c.folder.iterdir():
        data = p.read_bytes()
        assert not any(s.encode() in data for s in t.index), f'{p.name} names a participant'


def test_timing_is_explicit(ukb):
    f,truth,c = ukb
    after = build_ukbiobank(f/'after', f/'tree'/'bulk', f/'tree'/'table.csv', timing='after', need=('ecg',), instances=(2,), workers=1, progress=False)
    t = truth.set_index('subject')
    assert [d.split(';') if d else [] for d in after.table['diagnoses']] == [sorted(t['truth'][s]['after']) for s in after.table['subject']]
    assert after.la is None and len(after) == 8   # a cine that is broken matters to nobody who needs none


@pytest.fixture(scope='module')
def mimic(tmp_path_factory):
    f = tmp_path_factory.mktemp('mimic')
    truth = write_mimic_tree(f/'tree', 34, people='cm')
    return truth, build_mimic(f/'c', f/'tree', workers=1, progress=False)


def test_a_made_up_mimic(mimic):
    truth,c = mimic
    t = truth.set_index('subject')
    q = read_table(c.folder/'quarantine.csv').fillna('')
    assert sorted(zip(q['subject'], q['what'])) == sorted((s, r['where']) for s,r in t.iterrows() if r['trouble'])
    good = t.loc[c.table['subject']]
    got,want = (groups_of(d)[list(GROUPS)].to_numpy() for d in (c.table['diagnoses'], [';'.join(r['diagnoses']) for r in good['truth']]))
    np.testing.assert_array_equal(got, want)
    assert got.sum() > 10 and c.table.groupby('subject')['split'].nunique().max() == 1
    assert c.table['age'].tolist() == [int(r['covariates']['age']) for r in good['truth']] and c.table['sex'].tolist() == [r['covariates']['sex'] for r in good['truth']]
    first = c.table['visit'] == 1
    np.testing.assert_allclose(c.ecg[np.flatnonzero(first)], np.stack(good['mv'][first.to_numpy()]), atol=.0026)   # leads by name: the files have aVF before aVL


def test_an_experiment_trains_on_it_and_refuses_what_it_lacks(mimic, papermill_run, tmp_path, root):
    _,c = mimic
    with pytest.raises(DataError, match='has no 4-chamber cines'): cohort_at(str(c.folder), root, need=('ecg','la'))
    run = f'test-{tmp_path.name}'
    try:
        papermill_run('20_pamae_train.ipynb', preset='smoke', cohort=str(c.folder), run=run)
        assert (root/'runs'/run/'pamae'/'done.json').exists()
    finally: shutil.rmtree(root/'runs'/run, ignore_errors=True)


def test_a_build_notebook_needs_no_data(papermill_run, tmp_path, root):
    run = f'test-{tmp_path.name}'
    try:
        papermill_run('22_build_ukbiobank.ipynb', preset='smoke', need='ecg', cohort=run, run=run, workers=1)
        assert json.loads((root/'runs'/run/'build_ukbiobank'/'done.json').read_text())['figures']['audit_ok']
    finally:
        for o in (root/'runs'/run, root/'runs'/'cohorts'/run): shutil.rmtree(o, ignore_errors=True)


def test_a_pair_in_a_public_sample_is_found(fixtures, tmp_path):
    "Fourteen records of CinC 2021 (no two of these are one), and one of them again under another id, byte by byte and with another gain."
    for f in (fixtures/'ecg'/'cinc2021').glob('*.[hm]*'): shutil.copy(f, tmp_path)
    names = sorted(p.stem for p in tmp_path.glob('*.hea'))
    for end in ('hea', 'mat'): (tmp_path/f'HR06009.{end}').write_bytes((tmp_path/f'HR06001.{end}').read_bytes().replace(b'HR06001', b'HR06009'))
    write_wfdb(tmp_path/'E07600', read_ecg(tmp_path/'E07504.hea').mv*.8)
    every = [*names, 'HR06009', 'E07600']
    table = pd.DataFrame(dict(subject=every, ecg=[f'{n}.hea' for n in every]))
    c = build_hospital(tmp_path/'c', tmp_path, table, workers=1, progress=False)
    q = read_table(c.folder/'quarantine.csv')
    assert sorted(q['subject'][q['reason'].str.contains('under another id')]) == ['E07504', 'E07600', 'HR06001', 'HR06009'], q.to_dict('records')
    with pytest.raises(DataError, match='2 recordings stand under two ids'): build_hospital(tmp_path/'d', tmp_path, table, twins='refuse', workers=1, progress=False)


def test_a_hospital_of_real_files(fixtures, tmp_path):
    "ECGs of six formats and one pair of real cines."
    e = {'wfdb': 'ecg/ptb/s0010_re.hea', 'ptbxl': 'ecg/ptbxl/00001_lr.hea', 'two leads': 'ecg/mitdb/100.hea'} | {k: str(next((fixtures/'ecg'/k).rglob('*.xml')).relative_to(fixtures)) for k in ('hl7','muse','sierra')}
    table = pd.DataFrame(dict(subject=list(e), file=list(e.values()), sex='F'))
    c = build_hospital(tmp_path/'c', fixtures, table, ecg='file', covariates=['sex'], workers=1, progress=False)
    q = read_table(c.folder/'quarantine.csv').set_index('subject')['reason']
    assert 'two leads' in q.index and 'wfdb' not in q.index and len(c) >= 3, q.to_dict()
    at = c.table['subject'].tolist().index('wfdb')
    np.testing.assert_array_equal(c.ecg[at], read_ecg(fixtures/e['wfdb']).mv[:,:5000])
    study = pd.DataFrame(dict(subject=['1'], ecg=[e['wfdb']], cine='cine/bivme_patient1/Se6_4ch', sax='cine/bivme_patient1/Se2_sax_mid'))
    both = build_hospital(tmp_path/'both', fixtures, study, la='cine', sa='sax', workers=1, progress=False)
    assert both.la.shape == (1,50,96,96) and both.sa.shape == (1,50,80,80) and .8 < both.table['rr_s'][0] < 1. and both.la[0].std() > 20


def test_false_alarms():
    "300 virtual ECGs are 44,850 pairs of different people. (All three arrays of 1,500 realistic ones, 3.4 million pairs: no false alarm; the most alike of two people reached .943 of .98 (ECG), and no cine was worth a look.)"
    strips = [virtual_ecg(p.electrics, rng['noise'])[0] for p,rng in (virtual_person(i, coupling='realistic') for i in range(300))]
    copy = 1.3*np.round(np.roll(strips[50], 13, 1)/.01)*.01
    assert [p[:2] for p in find_twins('ecg', [ecg_signature(x) for x in [*strips, copy]], range(301), [*strips, copy].__getitem__)] == [(50, 300)]


def test_the_audit_refuses(tmp_path):
    virtual = lambda name, seed=0: build_virtual_cohort(tmp_path/name, 20, seed, workers=1, progress=False, subject=plain_subject)
    c = virtual('c')
    assert audit_together([c])['ok'] and audit(c)['ok']
    # somebody of another cohort is in another split there
    other = virtual('o', 1)
    assert audit_together([c, other])['ok']
    other.table.loc[0, 'subject'] = c.table['subject'][c.index('train' if other.table['split'][0] != 'train' else 'test')[0]]
    assert audit_together([c, other])['in_two_splits'] == 1
    same = virtual('same')
    same.table['subject'] = [f'x{i}' for i in range(20)]   # the same recordings, other names
    found = audit_together([c, same])
    assert not found['ok'] and [len(found[k]) for k in ('ecg','la','sa')] == [20]*3 and found['la'][0][:2] == [[0,0],[1,0]]
    # never audited
    (c.folder/'audit.json').unlink()
    with pytest.raises(DataError, match='never audited'): open_cohort(c.folder)
    assert virtual('c').fingerprint == c.fingerprint, 'a virtual cohort of an earlier version is audited anew'
    # an audit of another cohort does not count
    shutil.copy(other.folder/'audit.json', c.folder/'audit.json')
    with pytest.raises(DataError, match='never audited'): open_cohort(c.folder)


def test_labels_and_scalers(tmp_path):
    r = np.random.default_rng(0)
    y = pd.DataFrame(dict(LVEF=r.normal(60, 6, 50), LVM=r.normal(90, 20, 50)))
    clean = pd.DataFrame(dict(age=r.normal(60, 8, 50), sex=['F','M']*25))
    assert labels_among(clean, y) == []
    assert labels_among(clean.assign(LVEF=1., fraction=y['LVEF']/100), y) == ['LVEF = LVEF', 'fraction = LVEF']
    c = build_virtual_cohort(tmp_path/'c', 40, workers=1, progress=False, subject=plain_subject)
    c.table['ejection'] = c.measured['LVEF']
    assert audit(c)['labels_among_covariates'] == ['ejection = LVEF']
    with pytest.raises(DataError, match='audit of this cohort failed'): open_cohort(c.folder)
    x = c.measured[['LVEDV','LVEF']].to_numpy()
    s = fit_scaler(c, x)
    np.testing.assert_allclose(s(x)[c.index('train')].mean(0), 0, atol=1e-9); np.testing.assert_allclose(s.back(s(x)), x)
    assert check_fitted(s, c) is s and s.fitted_on == dict(cohort=c.fingerprint, split='train', rows=len(c.index('train')))
    with pytest.raises(DataError, match='not in the training split'): fit_scaler(c, x, np.arange(40))
    with pytest.raises(DataError, match='12 of 12'): train_rows(c, c.table.index[c.table['split'] != 'train'])
    s.fitted_on['split'] = 'all'
    with pytest.raises(DataError, match='was fitted on'): check_fitted(s, c)
