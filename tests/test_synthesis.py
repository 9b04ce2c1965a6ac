"""A synthetic cohort: killed at any moment it ends the same, several processes make the same, memory stays flat, and nobody's held-out ECG is mixed into a training."""
import os, signal, socket, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from pydicom.data import get_testdata_file
from ecgflowcmr.bundle import ECGFlowCMR
from ecgflowcmr.cohort import audit, audit_together, build_virtual_cohort, open_cohort, read_table
from ecgflowcmr.ecg import FS, DataError, r_peaks, read_ecg
from ecgflowcmr.synthesis import bundle_hash, model_card, shipped_bundle, synthesise

TOY = dict(pamae=dict(width=16, depth=1), vae=dict(width=8, deep=8, blocks=1), dit=dict(width=16, depth=1, heads=2, features=16, patch=2, components=8), harmonics={}, pixel_mm=1.83)


class Toy(ECGFlowCMR):
    "Random weights; beats from R peaks, none where the heart is slower than 50; cines of noise, which only depends on the seed, or through the real flow and decoder."
    quick = True

    def read_beat(self, mv):
        rr = torch.tensor([np.diff(r_peaks(m.numpy())).mean()/FS for m in mv], dtype=torch.float32)
        return self.pamae.encode(mv)[:, :50].detach(), rr, (rr < 1.2).long()

    def sample(self, f, rr, seeds=None, **options):
        if not self.quick: return super().sample(f, rr, seeds=seeds, **options)
        return torch.stack([torch.rand(50, 96, 96, generator=torch.Generator().manual_seed(s))*2 - 1 for s in seeds])


def toy():
    torch.manual_seed(0)
    return Toy(TOY).eval()


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a cohort of 20 and a bundle."
    home = tmp_path_factory.mktemp('synthesis')
    build_virtual_cohort(home/'real', 20, workers=1, progress=False)
    toy().save_pretrained(home/'bundle', kind='virtual', subjects=0, cohort='toy', config=dict(recipe='harmonic', train=dict(seed=0)))
    return home


def draw(place, name, **kw):
    return synthesise(toy(), place/'bundle', open_cohort(place/'real'), place/name, **(dict(per_subject=2, steps=1, guidance=1., chunk=2, batch=3, progress=False) | kw))


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


SCRIPT = '''
import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])
import test_synthesis as t
place, name, kw = Path(sys.argv[2]), sys.argv[3], eval(sys.argv[4])
if at := os.environ.get('KILL_AT'):  # this process kills itself as soon as such a file is there
    replace = os.replace
    def watched(*a, **k):
        replace(*a, **k)
        if list(place.glob(at)): os.kill(os.getpid(), signal.SIGKILL)
    os.replace = watched
print('begun', flush=True)
t.draw(place, name, **kw)
print('peak', int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])//1024, flush=True)
'''


def start(place, name, env=None, **kw):
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(Path(__file__).parent), str(place), name, repr(kw)], stdout=subprocess.PIPE, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'} | (env or {}))


def test_what_is_written(place):
    c, real = draw(place, 'plain'), open_cohort(place/'real')
    assert c.manifest['synthetic'] and c.manifest['kind'] == 'synthetic' and c.manifest['bundle'] == bundle_hash(place/'bundle') and c.manifest['labels_of'] == 'parent'
    t = c.table
    assert t['subject'].is_unique and set(t['bundle']) == {bundle_hash(place/'bundle')} and (t.groupby('parent').size() == 2).all() and t['noise_seed'].is_unique
    at = [real.table.index[real.table['subject'] == p][0] for p in t['parent']]
    assert (t['split'].to_numpy() == real.table['split'].to_numpy()[at]).all() and set(t['split']) == {'train'}
    assert np.array_equal(c.ecg, real.ecg[at]) and (t['diagnoses'].to_numpy() == real.table['diagnoses'].to_numpy()[at]).all()
    assert len(c)//2 + len(read_table(c.folder/'quarantine.csv')) == len(real.index('train'))
    assert audit(c)['ok'] and audit_together([real, c], progress=False)['ok']
    assert not [p for p in place.iterdir() if p.name.startswith('plain.')]


@pytest.mark.timeout(600)
@pytest.mark.parametrize('when', ['blocks/*-la.npy', 'rows/*.json', 'rows/0000002*.json', 'la.npy', 'ecg.npy', 'table.csv', 'manifest.json', 'audit.json'])
def test_killed_and_begun_again(place, when):
    "SIGKILL when a file of the half-drawn cohort appears; the second start ends with the bytes of an uninterrupted one."
    whole, name = files(draw(place, 'plain').folder), 'killed-' + ''.join(ch for ch in when if ch.isalnum())
    part = place/f'{name}.partial'
    assert start(place, name, env=dict(KILL_AT=f'{part.name}/{when}')).wait(300) == -signal.SIGKILL
    assert part.exists() and not (place/name).exists()
    with pytest.raises(DataError, match='unfinished'): open_cohort(place/name)
    with pytest.raises(DataError, match='seed is 0 there and 3 here'): draw(place, name, seed=3)
    with pytest.raises(DataError, match='steps is 1 there and 2 here'): draw(place, name, steps=2)
    assert files(draw(place, name).folder) == whole and not part.exists()


def test_another_bundle_is_refused(place):
    draw(place, 'plain')
    torch.manual_seed(7); other = Toy(TOY).eval(); other.save_pretrained(place/'other', kind='virtual', subjects=0)
    with pytest.raises(DataError, match='bundle is .* there and .* here'): synthesise(other, place/'other', open_cohort(place/'real'), place/'plain', per_subject=2, steps=1, guidance=1.)


@pytest.mark.timeout(300)
def test_two_processes_make_the_same(place):
    whole = files(draw(place, 'plain').folder)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    jobs = [start(place, 'shared', env=dict(RANK=str(r), WORLD_SIZE='2', LOCAL_RANK=str(r), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))) for r in range(2)]
    assert [j.wait(240) for j in jobs] == [0, 0]
    assert files(place/'shared') == whole and not (place/'shared.partial').exists()


def test_the_place_in_the_list_does_not_matter(place):
    "The same ECG and seed give the same cine, whoever else is drawn."
    real, c = open_cohort(place/'real'), draw(place, 'plain')
    p = c.table['parent'].iloc[-1]; row = real.table.index[real.table['subject'] == p][0]
    one = draw(place, 'one', rows=[int(row)], per_subject=1)
    k = c.table.index[(c.table['parent'] == p) & (c.table['sample'] == 0)][0]
    assert one.table['subject'].iloc[0] == c.table['subject'].iloc[k] and np.array_equal(one.la[0], c.la[k])


@pytest.mark.timeout(300)
def test_memory_does_not_grow(place):
    "Peak memory of a few cines and of thirty times as many, about 13 and 380 MB on the disk."
    peaks = []
    for name, per in (('few', 2), ('many', 60)):
        job = start(place, name, per_subject=per, chunk=1, batch=2); said = job.communicate()[0]
        assert job.returncode == 0; peaks.append(int(said.split('peak')[1]))
    n = [len(open_cohort(place/k)) for k in ('few', 'many')]
    print(f'\n{n[0]} cines: {peaks[0]} MB; {n[1]} cines: {peaks[1]} MB')
    assert n[1] == 30*n[0] and peaks[1] - peaks[0] < 70   # a block of 60 cines, mapped while it is gathered, is 28 MB


def test_held_out_parents_are_not_mixed(place):
    real = open_cohort(place/'real')
    for split in ('val', 'test'):
        c = draw(place, f'of-{split}', split=split)
        found = audit_together([real, c], progress=False)
        assert not found['ok'] and found['synthetic_of_held_out'] == len(c) and found['in_two_splits'] == 0
    other = build_virtual_cohort(place/'elsewhere', 30, seed=1, workers=1, progress=False)
    assert audit_together([other, draw(place, 'plain')], progress=False)['ok'], 'nobody of the other cohort is a parent'


def test_the_same_ecg_under_another_parent_is_found(place, tmp_path):
    "A synthetic row whose ECG is that of somebody else in the real cohort: the twin search still looks across cohorts."
    import shutil
    from ecgflowcmr.build import write_csv
    from ecgflowcmr.cohort import fingerprint_of
    from ecgflowcmr.files import read_json, sha256_file, write_json
    f = tmp_path/'renamed'; shutil.copytree(draw(place, 'plain').folder, f)
    t = read_table(f/'table.csv'); t['parent'] = 'x' + t['parent']; write_csv(f/'table.csv', t)
    m = {k: v for k, v in read_json(f/'manifest.json').items() if k not in ('fingerprint', 'made_by')}
    m['files']['table.csv'] = dict(bytes=(f/'table.csv').stat().st_size, sha256=sha256_file(f/'table.csv'))
    write_json(f/'manifest.json', m | dict(fingerprint=fingerprint_of(m), made_by='a test'))
    found = audit_together([open_cohort(place/'real'), open_cohort(f, audited=False)], progress=False)
    assert not found['ok'] and len(found['ecg']) == t['parent'].nunique() and found['in_two_splits'] == 0


def test_with_the_real_flow_and_decoder(place, monkeypatch):
    monkeypatch.setattr(Toy, 'quick', False)
    c = draw(place, 'flow', rows=open_cohort(place/'real').index('train')[:4])
    assert c.la.shape[1:] == (50, 96, 96) and c.la.std() > 0 and (c.la[0] != c.la[1]).any()


def test_model_card(place):
    card = model_card(place/'bundle', {'On real ECGs': {'recordings drawn from': 23, 'median R-R error, ms': 9.04, 'obedience': None}})
    words = ('## Data', '## Recipe', '## Figures', '## Limits', '## Provenance', 'Virtual hearts only', 'Not for clinical use',
             '| recordings drawn from | 23 |', '| median R-R error, ms | 9.04 |', '| obedience | not measured |', bundle_hash(place/'bundle'), '`harmonic`')
    for o in words: assert o in card, o


def shipped():
    try: return shipped_bundle()
    except DataError: pytest.skip('no bundle comes with this checkout yet')


def test_the_shipped_bundle_draws_at_once():
    cine = ECGFlowCMR.from_pretrained(shipped()).generate(get_testdata_file('waveform_ecg.dcm'))
    assert cine.shape == (50, 96, 96) and np.isfinite(cine).all() and cine.std() > .1
    assert sum(f.stat().st_size for f in shipped().iterdir()) < 25e6
    assert bundle_hash(shipped()) in (shipped()/'MODEL_CARD.md').read_text(), 'the card is of another bundle: papermill nbs/37_ship.ipynb -p ship True'


def test_the_shipped_bundle_takes_every_real_ecg(fixtures):
    "No recording is refused, and the rate is that of the R peaks."
    from ecgflowcmr.build import good_window
    generator, found = ECGFlowCMR.from_pretrained(shipped()), []
    names = [f for d in ('ptb', 'ptbxl', 'cinc2021') for f in sorted((fixtures/'ecg'/d).glob('*.hea'))] + [f for d in ('muse', 'hl7', 'sierra') for f in sorted((fixtures/'ecg'/d).iterdir()) if f.suffix.lower() == '.xml']
    assert len(names) == 22
    for f in names:
        mv = good_window(read_ecg(f))
        _, rr, count = generator.read_beat(torch.from_numpy(mv)[None])
        assert count[0] > 0, f.name
        found.append(abs(60/float(rr[0]) - 60*FS/np.diff(r_peaks(mv)).mean()))
    print(f'\nrate, difference to R peaks: median {np.median(found):.1f}, at most {max(found):.1f} a minute')
    assert np.median(found) < 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_notebook_35_writes_a_synthetic_cohort(place, root, papermill_run, cells):
    "A bundle of a smoke training, in a run of its own."
    import shutil
    from ecgflowcmr.pamae import fit_pamae, pamae_config
    run = f'test-synthetic-{os.getpid()}'; out = root/'runs'/run; real = open_cohort(place/'real')
    try:
        g = ECGFlowCMR(TOY | dict(pamae=pamae_config('smoke')['model'], dit=TOY['dit'] | dict(features=64)))
        g.pamae = fit_pamae(real, pamae_config('smoke'), out)[0]; g.save_pretrained(place/'smoke', kind='virtual', subjects=14, cohort=real.fingerprint, config=dict(recipe='harmonic', train=dict(seed=0)))
        for again in (papermill_run, cells): again('35_generate.ipynb', bundle=str(place/'smoke'), cohort=str(place/'real'), per_subject=2, split='train', run=run, preset='smoke', steps=1)
        made = [p for p in (out/'synthetic').iterdir() if p.is_dir()]
        assert len(made) == 1 and (out/'synthetic'/'done.json').exists() and (out/'synthetic'/'synthetic.png').exists()
        c = open_cohort(made[0]); assert c.manifest['synthetic'] and len(c) and audit_together([real, c], progress=False)['ok']
    finally: shutil.rmtree(out, ignore_errors=True)
