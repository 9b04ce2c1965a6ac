"The store under several processes, kills and full disks."
import errno, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from ecgflowcmr.cohort import SPLITS, Cohort, audit, build_virtual_cohort, check_splits, cohort_at, open_cohort
from ecgflowcmr.ecg import DataError
from ecgflowcmr.virtual.people import virtual_subject

HERE = Path(__file__).parent


def plain_subject(i, seed=0, coupling='strong', pause=0.):
    "A quick subject of the right shapes."
    time.sleep(pause)
    r = np.random.default_rng([seed, i, len(coupling)])
    grey = lambda n: r.integers(0, 256, (50,n,n), dtype=np.uint8)
    exact = dict(LVEDV=r.normal(150, 30), LVEF=r.normal(60, 6))
    return SimpleNamespace(ecg=r.normal(size=(12,5000)).astype('float32'), la=grey(96), sa=grey(80), la_mask=grey(96) % 7, sa_mask=grey(80) % 4, pixel_mm=1.83, rr_s=r.uniform(.6, 1.2),
                           exact=exact, measured={k: v + r.normal() for k,v in exact.items()}, diagnoses=['I42.0','I50.0'] if i % 5 == 0 else [],
                           covariates=dict(age=r.normal(64, 8), sex='F' if i % 2 else 'M', smoking=None if i % 7 == 0 else i % 3, tense=None))


def no_ecg_subject(i, seed=0): return SimpleNamespace(**vars(plain_subject(i, seed)) | dict(ecg=np.zeros((12,5000 - (i > 3)))))


def twin_subject(i, seed=0): return plain_subject(min(i, 12), seed)


def maskless_subject(i, seed=0): return SimpleNamespace(**{k: v for k,v in vars(plain_subject(i, seed)).items() if not k.endswith('mask')})


def other_columns(i, seed=0):
    s = plain_subject(i, seed)
    if i == 13: s.covariates['height'] = 170.
    return s


NAMES = [f'phenotype_{k}' for k in range(82)]
def wide_subject(i, seed=0):
    "No work, but arrays and tables as large as a virtual subject's."
    r = np.random.default_rng([seed, i])
    tile = r.integers(0, 256, 7200, dtype=np.uint8)
    grey = lambda n: np.resize(tile, (50,n,n))
    many = lambda: dict(zip(NAMES, r.normal(size=82).tolist()))
    return SimpleNamespace(ecg=np.resize(r.normal(size=7000).astype('float32'), (12,5000)), la=grey(96), sa=grey(80), la_mask=grey(96) % 7, sa_mask=grey(80) % 4, pixel_mm=1.83, rr_s=1.,
                           exact=many(), measured=many(), diagnoses=[], covariates={f'covariate_{k}': r.normal() for k in range(20)})


def files(folder):
    "Every file of a folder and its bytes."
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob('*')) if p.is_file()}


def build(folder, n=20, **kw):
    kw = dict(workers=1, progress=False, chunk=3, subject=plain_subject) | kw
    return build_virtual_cohort(folder, n, **kw)


def start(folder, **kw):
    "The same in a process of its own."
    subject = kw.pop('subject', 'plain_subject')
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_cohort import *; import test_cohort; print(build({str(folder)!r}, subject=test_cohort.{subject}, **{kw!r}).fingerprint)"
    return subprocess.Popen([sys.executable, '-c', code], cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what, seconds=60):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, 'timed out'
        time.sleep(.02)


def children(pid): return [int(p) for p in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def alive(pid):
    try: return 'State:\tZ' not in Path(f'/proc/{pid}/status').read_text()
    except (FileNotFoundError, ProcessLookupError): return False


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A small cohort, built without interruption."
    return build(tmp_path_factory.mktemp('whole')/'c')


def test_workers_and_chunks_do_not_matter(tmp_path, whole):
    two = build(tmp_path/'two', workers=2, chunk=7)
    assert files(two.folder) == files(whole.folder)
    more = build(tmp_path/'more', n=30, chunk=64)
    np.testing.assert_array_equal(more.ecg[:20], whole.ecg)
    assert more.table['split'][:20].tolist() == whole.table['split'].tolist()
    assert more.fingerprint != whole.fingerprint


def test_what_comes_back_is_what_was_put_in(whole):
    s = plain_subject(7)
    for k in ('ecg','la','sa'): np.testing.assert_array_equal(getattr(whole, k)[7], getattr(s, k))
    for k in ('exact','measured'): assert {o: getattr(whole, k)[o][7] for o in getattr(s, k)} == getattr(s, k), 'to the last bit'
    assert whole.table.loc[7, 'age'] == s.covariates['age'] and np.isnan(whole.table.loc[7, 'smoking']) and whole.table.loc[8, 'smoking'] == 2
    assert whole.table['tense'].isna().all() and whole.table.loc[5, 'diagnoses'] == 'I42.0;I50.0' and whole.table.loc[6, 'diagnoses'] == ''
    b = whole.batch([3,1])
    assert [b[k].shape for k in ('ecg','la','sa')] == [(2,12,5000), (2,50,96,96), (2,50,80,80)] and b['sa'].dtype == np.uint8
    np.testing.assert_array_equal(b['sa'][1], plain_subject(1).sa)
    assert set(whole.batch([0], ('ecg',))) == {'ecg','rr_s','pixel_mm'}


def test_masks_on_request(tmp_path, whole):
    assert whole.la_mask is None and whole.sa_mask is None
    c = build(tmp_path/'c', masks=True)
    np.testing.assert_array_equal(c.la_mask[4], plain_subject(4).la_mask); np.testing.assert_array_equal(c.sa_mask[4], plain_subject(4).sa_mask)
    assert c.fingerprint != whole.fingerprint
    more = sum(f.stat().st_size for f in c.folder.glob('*_mask.npy'))
    assert more == 20*50*(96**2 + 80**2) + 2*128   # .78 MB a subject, and two headers
    with pytest.raises(DataError, match='masks is True there and False here'): build(c.folder)
    with pytest.raises(DataError, match='no masks'): build(tmp_path/'d', masks=True, subject=maskless_subject)
    assert not list(tmp_path.glob('d*'))


def test_other_columns_are_refused(tmp_path):
    with pytest.raises(DataError, match='different columns'): build(tmp_path/'c', subject=other_columns)
    with pytest.raises(DataError, match='different columns'): build(tmp_path/'d', subject=other_columns, chunk=1)
    with pytest.raises(DataError, match='different columns'): build(tmp_path/'e', subject=other_columns, workers=2)   # the same from another process
    assert not any((tmp_path/o).exists() for o in 'cde')


def test_a_store_of_format_1(tmp_path):
    c = build(tmp_path/'c', n=10)
    m = c.folder/'manifest.json'
    m.write_text(m.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(DataError, match='format 1. This version reads format 2: build the cohort again'): open_cohort(c.folder)
    with pytest.raises(DataError, match='format is 1 there and 2 here.*Name another folder, or remove this one'): build(c.folder, n=10)


def memory(pid): # bytes
    "Resident memory of a process and its children, each counted in full (what they share is counted again)."
    total = 0
    for p in (pid, *children(pid)):
        try: total += int(Path(f'/proc/{p}/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')
        except (FileNotFoundError, ProcessLookupError): pass
    return total


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc')
def test_memory_does_not_grow(tmp_path):
    "Two workers, masks too: the peak of all processes together, for 48 and for 160 subjects, taken on to 10,000."
    peaks = []
    for n in (48, 160):
        p = start(tmp_path/f'{n}', n=n, workers=2, masks=True, chunk=16, subject='wide_subject')
        peak = 0
        while p.poll() is None:
            try: peak = max(peak, memory(p.pid))
            except FileNotFoundError: break
            time.sleep(.01)
        assert p.wait() == 0, p.stderr.read()
        peaks.append(peak)
        for f in (tmp_path/f'{n}').glob('*.npy'): f.unlink()
    growth = (peaks[1] - peaks[0])/112
    print(f'peak {peaks[0]/1e6:.0f} MB for 48, {peaks[1]/1e6:.0f} MB for 160: {growth/1e3:.1f} kB a subject')
    assert peaks[1] + max(growth, 0)*9840 < 2e9 and peaks[1] < 1e9


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='looks for processes in /proc')
def test_killed_and_resumed(tmp_path, whole):
    p = start(tmp_path/'c', workers=2)   # killed twice: with some chunks done, and as soon as it has begun again
    rows = lambda: len(list((tmp_path/'c.partial'/'rows').glob('0*.json')))
    wait_for(lambda: rows() >= 1)
    workers = children(p.pid)
    p.send_signal(signal.SIGKILL); p.wait()
    wait_for(lambda: not any(map(alive, workers)), 20)   # no orphans
    done = rows()
    with pytest.raises(DataError, match='unfinished.*once more'): open_cohort(tmp_path/'c')
    with pytest.raises(DataError, match='n is 20 there and 30 here'): build(tmp_path/'c', n=30)
    assert rows() == done
    c = build(tmp_path/'c')
    assert files(c.folder) == files(whole.folder)
    assert [f.name for f in tmp_path.iterdir() if not f.name.startswith('.lock')] == ['c']


@pytest.mark.parametrize('step', ['begin_store', 'fill_store', 'write_manifest', 'finish_store', 'audit'])
def test_stopped_between_any_two_steps(tmp_path, whole, monkeypatch, step):
    import ecgflowcmr.cohort as m
    real = getattr(m, step)
    def stop(*a, **k): real(*a, **k); raise KeyboardInterrupt
    monkeypatch.setattr(m, step, stop)
    with pytest.raises(KeyboardInterrupt): build(tmp_path/'c')
    monkeypatch.undo()
    assert files(build(tmp_path/'c').folder) == files(whole.folder)


def test_two_at_once(tmp_path, whole):
    ps = [start(tmp_path/'c'), start(tmp_path/'c')]
    for p in ps:
        out,err = p.communicate(timeout=60)
        assert p.returncode == 0, err
        assert out.strip() == whole.fingerprint


def test_another_request_is_refused(tmp_path):
    c = build(tmp_path/'c')
    before = files(c.folder)
    for kw,says in [(dict(n=21), 'n is 20 there and 21 here'), (dict(seed=1), 'seed is 0 there and 1 here'), (dict(coupling='none'), 'population.*none'),
                    (dict(subject=virtual_subject), 'generator')]:
        with pytest.raises(DataError, match=says): build(c.folder, **kw)
    with pytest.raises(DataError, match='unknown copling. Valid: coupling'): build(c.folder, copling='none')
    assert files(c.folder) == before
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('do not lose')
    with pytest.raises(DataError, match='something else'): build(tmp_path/'mine')
    assert files(tmp_path/'mine') == {'thesis.txt': b'do not lose'}


def test_a_changed_virtual_heart_is_noticed(tmp_path, monkeypatch):
    c = build(tmp_path/'c')
    real = plain_subject.__globals__['np'].random.default_rng
    monkeypatch.setattr(np.random, 'default_rng', lambda s: real([9, *s]))   # another subject 0 under the same name
    with pytest.raises(DataError, match='ecg: subject 0 differs'): build(c.folder)
    with pytest.raises(DataError, match='ecg: subject 0 differs'): build(c.folder, n=20)


ILL = dict(shift=0)
def ill_subject(i, seed=0):
    "As ever, but every fifth heart changes with `ILL`."
    s = plain_subject(i, seed)
    s.diagnoses = ['I42.0'] if i % 5 == 4 else []
    if s.diagnoses: s.measured['LVEF'] -= ILL['shift']
    return s


def test_a_changed_disease_is_noticed(tmp_path, monkeypatch):
    "Subject 0 is healthy and as it was; the first one who is ill is not."
    c = build(tmp_path/'c', subject=ill_subject)
    assert build(c.folder, subject=ill_subject).fingerprint == c.fingerprint
    monkeypatch.setitem(ILL, 'shift', 1)
    with pytest.raises(DataError, match='measured: LVEF: subject 4 differs'): build(c.folder, subject=ill_subject)


@pytest.mark.parametrize('name', ['ecg.npy', 'la.npy', 'sa.npy', 'table.csv', 'exact.csv', 'measured.csv', 'hashes.csv', 'manifest.json'])
def test_missing_or_altered_files_are_named(tmp_path, name):
    c = build(tmp_path/'c', n=10)
    f = c.folder/name
    bytes_ = f.read_bytes()
    f.unlink()
    with pytest.raises(DataError, match=f'{name}.*missing'): open_cohort(c.folder)
    f.write_bytes(bytes_[:-9])
    with pytest.raises(DataError, match=name): open_cohort(c.folder)
    f.write_bytes(bytes_.replace(b'1', b'2'))
    if f.suffix != '.npy':   # the arrays' contents are the audit's affair
        with pytest.raises(DataError, match=name): open_cohort(c.folder)
    f.write_bytes(bytes_)
    assert len(open_cohort(c.folder)) == 10


def test_altered_arrays_fail_the_audit(tmp_path):
    c = build(tmp_path/'c', n=10)
    for k,i in (('la',3), ('sa',4)):
        x = np.load(c.folder/f'{k}.npy', mmap_mode='r+'); x[i,0,0,0] ^= 1; x.flush()
    found = audit(c)
    assert [found[k]['altered'] for k in ('ecg','la','sa')] == [0,1,1] and not found['ok'] and not any(found[k]['shared'] or found[k]['twins'] for k in ('ecg','la','sa'))
    with pytest.raises(DataError, match='audit.*failed'): open_cohort(c.folder)


def test_twins_fail_the_audit(tmp_path):
    with pytest.raises(DataError, match='audit failed'): build(tmp_path/'c', subject=twin_subject)
    assert not (tmp_path/'c').exists()


def test_overlapping_splits_are_refused(whole):
    t = whole.table
    both = t.assign(subject=t['subject'].where(t.index != whole.index('test')[0], t['subject'][whole.index('train')[0]]))
    with pytest.raises(DataError) as e: check_splits(both)
    assert '1 of 19 subjects' in str(e.value) and not any(i in str(e.value) for i in t['subject'])
    assert sum(len(whole.index(s)) for s in SPLITS) == len(whole)
    assert not any(i in repr(whole) for i in t['subject']) and str(whole.folder) not in repr(whole)


def test_full_disk_at_any_write(tmp_path, whole, monkeypatch):
    "The k-th fsync fails, for k = 0, 3, 6...: always an OSError, never a half-made cohort, and the next call goes on."
    real,count,failures = os.fsync,[0],0
    for k in range(0, 60, 3):
        def full(fd):
            count[0] += 1
            if count[0] > k: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd)
        count[0] = 0
        monkeypatch.setattr(os, 'fsync', full)
        try: build(tmp_path/'c', chunk=10); break
        except OSError as e: assert e.errno == errno.ENOSPC; failures += 1
        assert not (tmp_path/'c').exists() or count[0] > 1   # only the very last fsync, of the parent folder, may follow the rename
    monkeypatch.undo()
    assert failures > 3
    assert files(build(tmp_path/'c').folder) == files(whole.folder)


def test_no_room_for_the_arrays(tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(OSError, match='are needed'): build(tmp_path/'c')
    assert not list(tmp_path.glob('c*'))   # what was reserved is given back


def test_a_subject_of_another_shape(tmp_path):
    with pytest.raises((DataError, ValueError)): build(tmp_path/'c', subject=no_ecg_subject)
    assert not (tmp_path/'c').exists()


def test_cohort_at(tmp_path):
    with pytest.raises(DataError, match="no cohort 'ukb'.*Valid: virtual"): cohort_at('ukb', root=tmp_path)
    build(tmp_path/'runs'/'cohorts'/'mine', n=10)
    with pytest.raises(DataError, match='Valid: virtual, runs/cohorts/mine'): cohort_at('ukb', root=tmp_path)
    for name in ('runs/cohorts/mine', str(tmp_path/'runs'/'cohorts'/'mine')):
        assert isinstance(cohort_at(name, root=tmp_path), Cohort)
    for wrong in (dict(coupling='weak'), dict(people='martians'), dict(disease='gout'), dict(n=0)):
        with pytest.raises(DataError, match='weak|martians|gout|is 0'): cohort_at('virtual', root=tmp_path, **wrong)
    assert [f.name for f in (tmp_path/'runs'/'cohorts').iterdir() if not f.name.startswith('.lock')] == ['mine'], 'nothing was begun'
    c = cohort_at('virtual', root=tmp_path, n=10, progress=False, people='subtypes', masks=True)
    assert c.folder.name == 'virtual-n10-s0-strong-subtypes-masks' and c.la_mask.shape == (10,50,96,96)
    (tmp_path/'afile').write_text('mine')
    with pytest.raises(DataError, match='is a file'): build(tmp_path/'afile')
    assert (tmp_path/'afile').read_text() == 'mine'
