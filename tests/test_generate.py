"The bundle and what it refuses: a missing, altered or half-written file, another format, an ECG that is none; never random weights."
import json
import numpy as np, pydicom.data, pytest, torch
from ecgflowcmr.bundle import ECGFlowCMR, PARTS
from ecgflowcmr.cohort import build_virtual_cohort
from ecgflowcmr.ecg import DataError
from ecgflowcmr.files import digest
from ecgflowcmr.stages import fit_generator
from ecgflowcmr.virtual.people import virtual_subject

TOY = dict(pamae=dict(width=32, depth=1), vae=dict(width=16, deep=16, blocks=1), dit=dict(width=32, depth=1, features=32, components=8), harmonics={}, pixel_mm=1.83)


@pytest.fixture
def bundle(tmp_path):
    torch.manual_seed(0)
    return ECGFlowCMR(TOY).save_pretrained(tmp_path/'bundle', kind='untrained', subjects=0)


def refused(folder, *words):
    with pytest.raises(DataError) as err: ECGFlowCMR.from_pretrained(folder)
    for w in words: assert w in str(err.value), str(err.value)


def test_a_whole_bundle_loads_and_is_the_same(bundle):
    a, b = ECGFlowCMR.from_pretrained(bundle), ECGFlowCMR.from_pretrained(bundle)
    f, rr = torch.randn(1, 50, 32), torch.tensor([.9])
    assert torch.equal(a.sample(f, rr, steps=2, seeds=[5]), b.sample(f, rr, steps=2, seeds=[5]))


@pytest.mark.parametrize('part', PARTS)
def test_a_missing_part_is_named(bundle, part):
    (bundle/f'{part}.safetensors').unlink()
    refused(bundle, f'{part}.safetensors', 'is missing')


@pytest.mark.parametrize('part', PARTS)
def test_an_altered_part_is_named(bundle, part):
    path = bundle/f'{part}.safetensors'
    raw = bytearray(path.read_bytes()); raw[-3] ^= 1; path.write_bytes(raw)
    refused(bundle, f'{part}.safetensors', 'altered')


def test_a_part_of_another_bundle_is_named(bundle, tmp_path):
    torch.manual_seed(1)
    other = ECGFlowCMR(TOY).save_pretrained(tmp_path/'other', kind='untrained', subjects=0)
    (bundle/'pamae.safetensors').write_bytes((other/'pamae.safetensors').read_bytes())
    refused(bundle, 'pamae.safetensors', 'altered')


def test_half_written_or_foreign_json(bundle):
    text = (bundle/'bundle.json').read_text()
    (bundle/'bundle.json').write_text(text[:len(text)//2]); refused(bundle, 'bundle.json')
    (bundle/'bundle.json').write_text(json.dumps(json.loads(text) | dict(format=99))); refused(bundle, 'bundle.json', 'format 99')
    (bundle/'bundle.json').write_text('{}'); refused(bundle, 'bundle.json', 'lacks')
    (bundle/'bundle.json').unlink(); refused(bundle, 'bundle.json is missing')


def test_a_full_disk_leaves_the_earlier_bundle(bundle, monkeypatch):
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    import ecgflowcmr.files as files
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(files.os, 'replace', full)
    with pytest.raises(OSError): ECGFlowCMR(TOY).save_pretrained(bundle, kind='untrained', subjects=0)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
    ECGFlowCMR.from_pretrained(bundle)


@pytest.mark.parametrize('ecg,words', [
    (np.zeros((12, 5000), 'f4'), 'flat'), (np.zeros((3, 5000), 'f4'), '12'), (np.full((12, 5000), np.nan, 'f4'), 'NaN'), (__file__, 'test_generate.py'), ('nowhere.dcm', 'nowhere.dcm')],
    ids=['flat', 'three leads', 'NaN', 'no ECG', 'no file'])
def test_an_ecg_that_is_none(bundle, ecg, words):
    with pytest.raises(DataError, match=words): ECGFlowCMR.from_pretrained(bundle).generate(ecg)


@pytest.mark.parametrize('options,word', [(dict(steps=0), 'steps'), (dict(steps=2.5), 'steps'), (dict(guidance=-1), 'guidance'), (dict(guidance=float('nan')), 'guidance')])
def test_options_out_of_range(bundle, options, word):
    with pytest.raises(DataError, match=word): ECGFlowCMR.from_pretrained(bundle).generate(virtual_subject(0).ecg, **options)


def test_an_encoder_that_finds_no_beat_says_so(bundle):
    "The untrained phase head of this toy finds no cycle; nothing is drawn from a made-up one."
    with pytest.raises(DataError, match='no complete heart beat'): ECGFlowCMR.from_pretrained(bundle).generate(pydicom.data.get_testdata_file('waveform_ecg.dcm'))


@pytest.mark.slow
def test_the_stages_alone_are_loaded_the_second_time(tmp_path):
    "Without notebook 30: trained once, then loaded, weight for weight; nothing that done.json lists is gone."
    cohort = build_virtual_cohort(tmp_path/'cohort', 40, workers=1, progress=False)
    (a, folder), (b, again) = (fit_generator(cohort, 'smoke', 'harmonic', tmp_path) for _ in range(2))
    assert folder == again and not list(folder.glob('*cache*')) and not list(folder.glob('paths*'))
    assert a.provenance['trained_on_people'] == digest(sorted(cohort.table.loc[cohort.table['split'] == 'train', 'subject']), 16), 'the bundle says of whom it knows, without a name'
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
