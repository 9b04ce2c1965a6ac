"Real and damaged ECG files: what must be read is read, everything else is refused with a DataError that names file and lead."
import base64, gzip, json, os, re, shutil, time
from datetime import date, datetime
from fractions import Fraction
import numpy as np
import pydicom
import pytest
import wfdb
from pydicom.data import get_testdata_file
from scipy.signal import resample_poly
from ecgflowcmr.ecg import ECG, FS, LEADS, DataError, phase_at, r_peaks, read_ecg, window
from ecgflowcmr.ecg_files import MIMIC_LEADS, write_wfdb
from ecgflowcmr.ecg_xml import write_aecg, write_cardiosoft, write_muse, write_sierra

DCM = get_testdata_file('waveform_ecg.dcm', download=False)


@pytest.fixture(scope='module')
def rest():
    "The real recording that ships with pydicom."
    return read_ecg(DCM)


def bpm(ecg): return 60*FS/np.diff(r_peaks(ecg.mv[1])).mean()

def assert_standard(ecg):
    assert isinstance(ecg, ECG) and ecg.fs == 500 and ecg.leads == LEADS
    assert ecg.mv.shape[0] == 12 and ecg.mv.shape[1] >= 5000 and ecg.mv.dtype == np.float32 and np.isfinite(ecg.mv).all()
    spread = np.ptp(window(ecg).reshape(12, 5, 1000), axis=-1)
    assert spread.max() < 8 and .3 < np.median(spread) < 3  # mV
    assert np.isfinite(phase_at(r_peaks(ecg.mv[1]), ecg.mv.shape[1])).mean() > .6


# ---- real files -------------------------------------------------------------------------------------------------

def test_pydicom_recording(rest):
    assert_standard(rest)
    assert rest.mv.shape == (12, 5000) and rest.meta['source_fs'] == 1000 and 55 < bpm(rest) < 67
    raw = pydicom.dcmread(DCM).waveform_array(0).T / 1000  # mV, by pydicom's own calibration
    assert abs(rest.mv - resample_poly(raw, 1, 2, axis=1, padtype='line')).max() < 1e-4

@pytest.mark.parametrize('record,rate,n', [('ptb/s0010_re', 81, 19200), ('ptbxl/00001_lr', 64, 5000)])
def test_physionet(fixtures, record, rate, n):
    ecg = read_ecg(fixtures/'ecg'/record)
    assert_standard(ecg)
    assert ecg.mv.shape == (12, n) and abs(bpm(ecg) - rate) < 1.5
    sig = wfdb.rdrecord(str(fixtures/'ecg'/record))
    ratio = Fraction(500, sig.fs)
    for lead in ('II', 'aVR', 'V6'):
        k = [o.lower() for o in sig.sig_name].index(lead.lower())
        want = resample_poly(sig.p_signal[:,k], ratio.numerator, ratio.denominator, padtype='line')
        assert abs(ecg.mv[LEADS.index(lead)] - want).max() < 1e-4
    assert abs(ecg.mv[0] + ecg.mv[2] - ecg.mv[1]).max() < .02  # Einthoven, up to rounding

def test_ptb_frank_leads_are_not_needed(fixtures, tmp_path):
    for o in ('hea', 'dat'): shutil.copy(fixtures/f'ecg/ptb/s0010_re.{o}', tmp_path/f's0010_re.{o}')
    assert len(r_peaks(read_ecg(tmp_path/'s0010_re.hea').mv[1])) == 52

def test_cinc2021_all(fixtures):
    heads = sorted((fixtures/'ecg/cinc2021').glob('*.hea'))
    assert len(heads) == 14
    for h in heads:
        ecg = read_ecg(h)
        assert_standard(ecg)
        raw = np.fromfile(h.with_suffix('.mat'), '<i2', offset=24).reshape(-1, 12).T / 1000  # gain 1000/mV, unit spelt mV or mv
        assert abs(ecg.mv - raw).max() < 1e-5, h.name
        assert 40 < bpm(ecg) < 140, h.name
        for f in (h.with_suffix('.mat'), h.with_suffix('')): assert (read_ecg(f).mv == ecg.mv).all()

def test_mitdb_is_refused_by_its_leads(fixtures):
    with pytest.raises(DataError, match=r'100.*lead I, II, III, aVR, aVL, aVF, V1, V2, V3, V4, V6: missing.*MLII'): read_ecg(fixtures/'ecg/mitdb/100')

def test_other_formats_are_refused_not_misread(fixtures):
    others = [*fixtures.glob('ecg/sierra/*.[xX][mM][lL]'), *fixtures.glob('ecg/hl7/*'), *fixtures.glob('ecg/cpsc2019/*0014.mat'), *list(fixtures.glob('cine/**/*.dcm'))[:2],
              fixtures/'stats/aSAH.csv', fixtures/'README.md', fixtures/'cine/autofd/A/sa_ED.nii.gz', fixtures/'ecg/mitdb/100.atr']
    for f in others:
        if not f.is_file(): continue
        try: assert_standard(read_ecg(f))  # a later reader may know it; a wrong reading may not pass
        except DataError as e: assert f.name in str(e)

def test_it_is_fast(rest):
    r_peaks(rest.mv[1])
    t = time.perf_counter()
    for _ in range(10): r_peaks(rest.mv[1])
    assert (time.perf_counter() - t)/10 < .1  # about 2 ms on an idle core


# ---- the same recording in other dialects -----------------------------------------------------------------------

def write_wfdb_plain(folder, mv, names=LEADS, fs=500, unit='mV', fmt='16', name='rest', **kw):
    wfdb.wrsamp(name, fs=fs, units=[unit]*len(mv), sig_name=list(names), p_signal=np.asarray(mv, float).T, fmt=[fmt]*len(mv), write_dir=str(folder), **kw)
    return folder/f'{name}.hea'

def test_order_case_unit_and_extra_channels(rest, tmp_path):
    order = np.random.default_rng(1).permutation(12)
    mv = np.concatenate([rest.mv[order], rest.mv[:1]*3, rest.mv[1:2]*2])
    names = [LEADS[k].lower() for k in order] + ['vx', 'MLII']
    f = write_wfdb_plain(tmp_path, mv*1000, names, unit='uV')
    for o in (f, f.with_suffix('.dat'), f.with_suffix('')): assert abs(read_ecg(o).mv - rest.mv).max() < .001
    assert abs(read_ecg(str(f)).mv - rest.mv).max() < .001

def test_mimic_order(rest, tmp_path):
    names = ('I', 'II', 'III', 'aVR', 'aVF', 'aVL', 'V1', 'V2', 'V3', 'V4', 'V5', 'V6')
    f = write_wfdb_plain(tmp_path, rest.mv[[LEADS.index(o) for o in names]], names)
    assert abs(read_ecg(f).mv - rest.mv).max() < .001

@pytest.mark.parametrize('fmt', ['16', '24', '32', '80', '212'])
def test_wfdb_sample_formats(rest, tmp_path, fmt):
    tol = .03 if fmt in ('80', '212') else .001
    assert abs(read_ecg(write_wfdb_plain(tmp_path, rest.mv, fmt=fmt)).mv - rest.mv).max() < tol

@pytest.mark.parametrize('fs', [125, 240, 250, 360, 977, 1000])
def test_any_rate(rest, tmp_path, fs):
    x = resample_poly(rest.mv, *Fraction(fs, 500).as_integer_ratio(), axis=1, padtype='line')
    ecg = read_ecg(write_wfdb_plain(tmp_path, np.concatenate([x, x[:,::-1]], axis=1), fs=fs))
    assert ecg.meta['source_fs'] == fs and abs(ecg.mv.shape[1] - 10000) <= 1
    assert abs(len(r_peaks(ecg.mv[1,:5000])) - 10) <= 1
    if fs >= 250: assert np.corrcoef(ecg.mv[1,100:4900], rest.mv[1,100:4900])[0,1] > .99

def test_eight_leads(rest, tmp_path):
    keep = [0,1,6,7,8,9,10,11]
    ecg = read_ecg(write_wfdb_plain(tmp_path, rest.mv[keep], [LEADS[k] for k in keep]))
    assert ecg.meta['derived'] == ['III', 'aVR', 'aVL', 'aVF'] and abs(ecg.mv - rest.mv).max() < .01


# ---- what must be refused ---------------------------------------------------------------------------------------

def spoil(what, mv):
    mv,names,unit = mv.astype(float).copy(),list(LEADS),'mV'
    if what == 'missing': mv,names = np.delete(mv, 8, 0),names[:8] + names[9:]
    if what == 'missing I': mv,names = mv[1:],names[1:]
    if what == 'duplicated': names[8] = 'v2'
    if what == 'nan': mv[6,100:120] = np.nan
    if what == 'flat': mv[10] = .25
    if what == 'detached': mv[10,:2000] = .25
    if what == 'microvolt': mv *= 1000
    if what == 'one in microvolt': mv[3] *= 1000
    if what == 'volt': mv /= 1000
    if what == 'unit': unit = 'mmHg'
    if what == 'short': mv = mv[:,:4990]
    if what == 'two beats': mv = np.where((np.arange(5000) > 1050)[None], .02*np.random.default_rng(0).normal(size=mv.shape), mv)
    if what == 'noise': mv = .02*np.random.default_rng(0).normal(size=mv.shape)
    return mv,names,unit

REFUSED = {'missing': 'lead V3: missing', 'missing I': 'lead I: missing', 'duplicated': 'lead V2: is duplicated', 'nan': 'lead V1: has 20 missing', 'flat': 'lead V5: is flat', 'detached': 'lead V5: is flat',
           'microvolt': 'microvolts labelled as millivolts', 'one in microvolt': 'lead aVR: spreads', 'volt': 'volts labelled as millivolts', 'unit': "unit 'mmHg'", 'short': 'less than 10 s',
           'two beats': 'at least 3 are needed', 'noise': 'at least 3'}

@pytest.mark.parametrize('what', REFUSED)
def test_refused_wfdb(rest, tmp_path, what):
    mv,names,unit = spoil(what, rest.mv)
    f = write_wfdb_plain(tmp_path, mv, names, unit=unit, fmt='32')
    with pytest.raises(DataError) as e: read_ecg(f)
    assert 'rest.hea' in str(e.value) and REFUSED[what] in str(e.value), str(e.value)
    assert isinstance(e.value, ValueError) and e.value.remedy and e.value.remedy in str(e.value)

def as_dicom(path, mv, names=LEADS, unit='uV'):
    "The pydicom recording with other samples (millivolt) and lead names."
    ds = pydicom.dcmread(DCM)
    g = ds.WaveformSequence[0]
    x = np.repeat(mv, 2, axis=1)
    g.ChannelDefinitionSequence = g.ChannelDefinitionSequence[:len(mv)]
    g.WaveformData = np.ascontiguousarray(np.rint(x.T/1.25e-3).astype('<i2')).tobytes()
    g.NumberOfWaveformChannels,g.NumberOfWaveformSamples = x.shape
    for ch,name in zip(g.ChannelDefinitionSequence, names):
        src = ch.ChannelSourceSequence[0]
        src.CodeMeaning,src.CodeValue,src.CodingSchemeDesignator = f'Lead {name}','local','99LOCAL'
        ch.ChannelSensitivityUnitsSequence[0].CodeValue = unit
    ds.save_as(path)
    return path

@pytest.mark.parametrize('what', ['missing', 'missing I', 'duplicated', 'flat', 'detached', 'short', 'two beats', 'noise'])
def test_refused_dicom(rest, tmp_path, what):
    mv,names,_ = spoil(what, rest.mv)
    with pytest.raises(DataError) as e: read_ecg(as_dicom(tmp_path/'rest.dcm', mv, names))
    assert 'rest.dcm' in str(e.value) and REFUSED[what] in str(e.value), str(e.value)

def test_dicom_units(rest, tmp_path):
    assert abs(read_ecg(as_dicom(tmp_path/'a.dcm', rest.mv)).mv - rest.mv).max() < .2  # samples were doubled crudely
    with pytest.raises(DataError, match='microvolts labelled'): read_ecg(as_dicom(tmp_path/'b.dcm', rest.mv, unit='mV'))
    with pytest.raises(DataError, match="channel I: unit 'Pa'"): read_ecg(as_dicom(tmp_path/'c.dcm', rest.mv, unit='Pa'))

@pytest.mark.parametrize('name,content', [('empty.dcm', b''), ('noise.dcm', bytes(range(256))*50), ('zeros.hea', bytes(5000)), ('text.hea', b'not a header'), ('a.xml', b'<?xml version="1.0"?><ecg/>'),
                                          ('prefix.dcm', bytes(128)+b'DICM'), ('page.dat', b'<html>404</html>'), ('x.npy', b'\x93NUMPY\x01\x00')])
def test_no_ecg_at_all(tmp_path, name, content):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(DataError, match=name): read_ecg(tmp_path/name)

def test_paths(tmp_path):
    with pytest.raises(DataError, match='no such file'): read_ecg(tmp_path/'none.dcm')
    with pytest.raises(DataError, match='folder'): read_ecg(tmp_path)
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(DataError, match='no regular file'): read_ecg(tmp_path/'pipe')

def test_half_written_wfdb(rest, tmp_path):
    f = write_wfdb_plain(tmp_path, rest.mv)
    text,data = f.read_text(),f.with_suffix('.dat').read_bytes()
    for k in (0, 1, len(data)//2, len(data)-2):
        f.with_suffix('.dat').write_bytes(data[:k])
        with pytest.raises(DataError, match='rest'): read_ecg(f)
    f.with_suffix('.dat').unlink()
    with pytest.raises(DataError, match='rest.dat is missing'): read_ecg(f)
    f.with_suffix('.dat').write_bytes(data)
    for k in range(5, len(text)-12, 7):  # every cut of the header
        f.write_text(text[:k])
        with pytest.raises(DataError, match='rest'): read_ecg(f)
    f.write_text(text)
    assert abs(read_ecg(f).mv - rest.mv).max() < .001

def test_a_header_cannot_lead_elsewhere(rest, tmp_path):
    f = write_wfdb_plain(tmp_path, rest.mv)
    text = f.read_text()
    for there in ('../rest.dat', '/dev/zero', '/etc/passwd', '~', '.', '..'):
        f.write_text(text.replace('rest.dat', there))
        with pytest.raises(DataError): read_ecg(f)
    f.write_text(text.replace(' 5000', ' 50000000000000', 1))
    with pytest.raises(DataError, match='half-written'): read_ecg(f)
    for rate in ('0', '-500', 'nan', '1e30', '5'):
        f.write_text(text.replace(' 500 ', f' {rate} ', 1))
        with pytest.raises(DataError): read_ecg(f)


# ---- the carts' XML ---------------------------------------------------------------------------------------------

def test_muse_fixtures(fixtures):
    for f,rate in (('guangxi_teaching_sinus_rhythm', 97), ('synthetic_muse', 72)):
        ecg = read_ecg(fixtures/f'ecg/muse/{f}.xml')
        assert_standard(ecg)
        assert abs(bpm(ecg) - rate) < 1 and ecg.meta['measured']['rate_bpm'] == rate
        assert ecg.meta['derived'] == ['III', 'aVR', 'aVL', 'aVF'] and ecg.meta['sex'] == 'M'
    text = (fixtures/'ecg/muse/guangxi_teaching_sinus_rhythm.xml').read_text('utf-8')
    rhythm = text[text.index('<WaveformType>Rhythm'):]
    raw = np.frombuffer(base64.b64decode(re.search(r'<LeadID>V5</LeadID>.*?<WaveFormData>(.*?)</WaveFormData>', rhythm, re.S)[1]), '<i2')
    ecg = read_ecg(fixtures/'ecg/muse/guangxi_teaching_sinus_rhythm.xml')
    assert abs(ecg.mv[10] - raw*.00488).max() < 1e-5 and ecg.meta['age'] == 11 and ecg.meta['date'] == '2024-01-01T10:35:17'

def test_aecg_fixture(fixtures):
    ecg = read_ecg(fixtures/'ecg/hl7/example_aecg.xml')
    assert_standard(ecg)
    assert ecg.mv.shape == (12, 5000) and abs(ecg.mv[1] - ecg.mv[0] - ecg.mv[2]).max() < 1e-6 and ecg.meta['derived'] == []
    assert (ecg.meta['sex'], ecg.meta['age'], ecg.meta['date']) == ('M', 46, '2002-11-22T09:10:00')
    assert ecg.meta['filters'] == {'lowpass_hz': 150, 'notch_hz': 60}

MIDPOINTS = {'129DYPRG.XML': [-9, -17, -7, 13, -1, -12, 0, -1, -3, -4, -7, -6], '3191723_ZZDEMOPTONLY_1-04_orig.xml': [-11, -54, -43, 33, 16, -50, 7, -4, -14, -41, -35, -33],
             '2020-5-18_15-48-11.xml': [-12, 78, 90, -33, -51, 84, 14, 3, -24, -20, -13, -21]}  # sample 2750, as the sierra-ecg-tools project publishes them

@pytest.mark.parametrize('name', MIDPOINTS)
def test_sierra_fixtures(fixtures, name):
    ecg = read_ecg(fixtures/'ecg/sierra'/name)
    assert_standard(ecg)
    steps = ecg.mv/.005
    assert 5000 <= steps.shape[1] <= 5350 and abs(steps - np.rint(steps)).max() < 1e-3  # cut before the calibration pulse
    assert (np.ptp(steps[:,-100:], axis=0) > 0).any()
    assert np.rint(steps[:,2750]).tolist() == MIDPOINTS[name]
    assert abs(bpm(ecg) - ecg.meta['measured']['rate_bpm']) < 4

@pytest.mark.parametrize('name', MIDPOINTS)
def test_sierra_as_its_library_reads_it(fixtures, name):
    sierraecg = pytest.importorskip('sierraecg', reason='the reference reader of Philips files is not installed')
    ref = np.array([o.samples for o in sierraecg.read_file(str(fixtures/'ecg/sierra'/name)).leads])
    got = np.rint(read_ecg(fixtures/'ecg/sierra'/name).mv/.005)
    assert (got == ref[:,:got.shape[1]]).all()

def test_the_library_reads_what_is_written(rest, tmp_path):
    sierraecg = pytest.importorskip('sierraecg', reason='the reference reader of Philips files is not installed')
    write_sierra(tmp_path/'s.xml', rest)
    x = np.array([o.samples for o in sierraecg.read_file(str(tmp_path/'s.xml')).leads])
    assert x.shape == (12, 5200) and abs(x[:,:5000]*.005 - rest.mv).max() < .00251

def test_no_identifiers_in_meta(fixtures):
    files = [*fixtures.glob('ecg/muse/*.xml'), *fixtures.glob('ecg/hl7/*.xml'), *fixtures.glob('ecg/sierra/*.[xX][mM][lL]'), *fixtures.glob('ecg/cinc2021/*.hea'), fixtures/'ecg/ptb/s0010_re.hea']
    for f in files:
        meta = json.dumps(read_ecg(f).meta)
        for secret in ('SYNTH0001', 'Synthetic', 'Anonymous', '00000000', 'Clark', 'SBJ-123', 'KAB', 'ZZDEMOPTONLY', 'ADULT', '9999', 'xxxxxx', '1112010721168bdc', 'Doctor', 'Reader', 'ABC'):
            if secret != 'Synthetic' or 'muse' not in str(f): assert secret not in meta, (f.name, secret)

def edit(f, *changes, enc='utf-8', count=1):
    "Replace text in a file (a regular expression where it begins with `(?s)`)."
    text = f.read_text(enc)
    for a,b in changes:
        new = re.sub(a, b, text, count=count) if a.startswith('(?s)') else text.replace(a, b)
        assert new != text, a
        text = new
    f.write_text(text, enc)
    return f

WRITERS = dict(cardiosoft=write_cardiosoft, muse=write_muse, aecg=write_aecg, sierra=lambda f,e: write_sierra(f, e, version='1.03'))

@pytest.mark.parametrize('kind', WRITERS)
def test_encodings_prefixes_and_names(rest, tmp_path, kind):
    f = tmp_path/'a.xml'
    WRITERS[kind](f, rest)
    want = read_ecg(f).mv
    assert abs(want - rest.mv).max() < .011
    text = f.read_text('utf-8')
    body = text[text.index('?>')+2:]
    for decl in ('<?xml version="1.0" encoding="{}"?>', '<?xml version="1.0"?><!-- a <comment> --><!DOCTYPE r SYSTEM "r.dtd">'):
        for enc,mark in (('utf-8', b''), ('utf-8', b'\xef\xbb\xbf'), ('utf-16-le', b'\xff\xfe'), ('utf-16-be', b'\xfe\xff'), ('utf-16-le', b''), ('utf-16-be', b''), ('iso8859-1', b''), ('windows-1252', b'')):
            if '{}' not in decl and enc[:3] != 'utf': continue
            (tmp_path/'renamed.dat').write_bytes(mark + (decl.format('utf-16' if '16' in enc else enc) + body).encode(enc))
            assert (read_ecg(tmp_path/'renamed.dat').mv == want).all(), (decl, enc, mark)
    prefixed = re.sub(r'<(/?)(?=[A-Za-z])', r'<\1x:', re.sub(r'xmlns="[^"]*"', '', body)).replace('x:' + re.match(r'\s*<(\w+)', body)[1], 'x:' + re.match(r'\s*<(\w+)', body)[1] + ' xmlns:x="urn:a"', 1)
    f.write_text(prefixed)
    assert (read_ecg(f).mv == want).all()
    with gzip.open(tmp_path/'a.xml.gz', 'wb') as g: g.write(text.encode())
    with pytest.raises(DataError, match='gzip'): read_ecg(tmp_path/'a.xml.gz')

def test_cardiosoft(rest, tmp_path):
    f = tmp_path/'1000001_20205_2_0.xml'
    measured = dict(rate_bpm=61, pr_ms=160, qrs_ms=92, qt_ms=400, qtc_ms=405, p_axis=40, qrs_axis=-12, t_axis=30)
    for nested in (False, True):
        write_cardiosoft(f, rest, 'M', date(1950, 6, 1), datetime(2014, 5, 31, 9, 8, 7), ['Sinus rhythm', '---', 'Confirmed by Dr A. Person'], measured, pid=1000001, nested=nested)
        ecg = read_ecg(f)
        assert_standard(ecg)
        assert abs(ecg.mv - rest.mv).max() < .00251
        assert ecg.meta['measured'] == measured and ecg.meta['statements'] == ['Sinus rhythm'] and ecg.meta['filters'] == {'highpass_hz': .05, 'lowpass_hz': 150, 'notch_hz': 50}
        assert (ecg.meta['sex'], ecg.meta['age'], ecg.meta['date'], ecg.meta['format']) == ('M', 63, '2014-05-31T09:08:07', 'CardioSoft XML')
        assert '1000001' not in json.dumps(ecg.meta)
    write_cardiosoft(f, rest)
    whole = f.read_text()
    waves = re.findall(r'(?s)<WaveformData.*?</WaveformData>', whole[whole.index('<StripData>'):])
    shuffled = whole[:whole.index('<StripData>')] + re.sub(r'(?s)<WaveformData.*</WaveformData>', '\n'.join(waves[::-1]).replace('lead="aV', 'lead="AV').replace(',', ',\n\t\t'), whole[whole.index('<StripData>'):])
    f.write_text(shuffled)
    assert abs(read_ecg(f).mv - rest.mv).max() < .00251
    f.write_text(whole.replace('<StripData>', '<FullDisclosure><SampleRate>500</SampleRate></FullDisclosure><StripData>'))
    assert abs(read_ecg(f).mv - rest.mv).max() < .00251  # a resting ECG may keep one
    assert read_ecg(f).meta['age'] is None and read_ecg(f).meta['date'] == ''

BAD_CARDIOSOFT = {'exercise': ([('RestECG', 'StressECG')], 'no resting ECG'), 'full disclosure': ([('<ObservationType>RestECG</ObservationType>', '<FullDisclosure/>')], 'exercise test .FullDisclosure'),
    'no strip': ([('(?s)<StripData>.*</StripData>', '<FullDisclosure/>')], 'exercise test .FullDisclosure'), 'missing': ([('(?s)(<StripData>.*)<WaveformData lead="V3">.*?</WaveformData>', r'\1')], 'lead V3: missing'),
    'one short': ([('(?s)(<StripData>.*<WaveformData lead="V3">)[^,]*,', r'\1')], 'lead V3: 4,999 samples'), 'all short': ([('<ChannelSampleCountTotal>5000', '<ChannelSampleCountTotal>5001')], 'promises 5,001'),
    'empty': ([('(?s)(<StripData>.*<WaveformData lead="aVL">)[^<]*', r'\1')], 'lead aVL: holds no samples'), 'hole': ([('(?s)(<StripData>.*<WaveformData lead="aVL">[^,]*,)[^,]*', r'\1')], 'lead aVL: its samples are not all'),
    'unit': ([('uVperLsb', 'furlong')], "'furlong' is not known"), 'no unit': ([(' units="uVperLsb"', '')], 'no unit'), 'no rate': ([('(?s)(<StripData>.*)<SampleRate units="Hz">500</SampleRate>', r'\1')], 'SampleRate: is missing'),
    'twice': ([('lead="V4"', 'lead="V3"')], 'lead V3: is duplicated')}

@pytest.mark.parametrize('what', BAD_CARDIOSOFT)
def test_cardiosoft_refused(rest, tmp_path, what):
    write_cardiosoft(tmp_path/'ukb.xml', rest)
    edit(tmp_path/'ukb.xml', *BAD_CARDIOSOFT[what][0])
    with pytest.raises(DataError, match=BAD_CARDIOSOFT[what][1]) as e: read_ecg(tmp_path/'ukb.xml')
    assert 'ukb.xml' in str(e.value) and e.value.remedy

def test_cardiosoft_short_and_250_hz(rest, tmp_path):
    f = tmp_path/'a.xml'
    write_cardiosoft(f, rest.mv[:,:4500])
    with pytest.raises(DataError, match='9.00 s is less than 10 s'): read_ecg(f)
    write_cardiosoft(f, resample_poly(np.concatenate([rest.mv, rest.mv], 1), 1, 2, axis=1, padtype='line'))
    edit(f, ('>500<', '>250<'))
    ecg = read_ecg(f)
    assert ecg.meta['source_fs'] == 250 and ecg.mv.shape[1] == 10000 and np.corrcoef(ecg.mv[1,100:4900], rest.mv[1,100:4900])[0,1] > .99

def test_muse_variants(rest, tmp_path):
    f = tmp_path/'m.xml'
    write_muse(f, rest, 'F', 61, leads=LEADS[::-1])
    ecg = read_ecg(f)
    assert ecg.meta['derived'] == [] and abs(ecg.mv - rest.mv).max() < .00245 and (ecg.meta['sex'], ecg.meta['age']) == ('F', 61)
    write_muse(f, rest)
    whole = f.read_text()
    edit(f, ('MICROVOLTS', 'MILLIVOLTS'), ('>4.88<', '>0.00488<'), ('<PatientAge />', '<PatientAge>18</PatientAge>'), ('YEARS', 'MONTHS'))
    assert abs(read_ecg(f).mv[6:] - rest.mv[6:]).max() < .00245 and read_ecg(f).meta['age'] == 1.5
    rhythm = whole.index('Rhythm')
    b64 = re.search(r'(?s)<LeadID>V2.*?<WaveFormData>(.*?)<', whole[rhythm:])[1]
    raw = bytearray(base64.b64decode(b64))
    raw[5000] ^= 4
    for change,said in (((b64, base64.b64encode(raw).decode()), 'lead V2: differs from its checksum'), ((b64, b64[:4000]), 'lead V2: 1,500 samples, 5,000 are promised'), ((b64, '!' + b64[1:]), 'lead V2: is no base64'),
                        (('Rhythm', 'Mean'), 'no rhythm strip .waveforms: Median, Mean'), (('(?s)(Rhythm.*V5<.*?<LeadOff>)FALSE', r'\1TRUE'), 'lead V5: is off'), (('CONTINUOUS', 'DIFFERENCE'), 'SampleType'),
                        (('(?s)(Rhythm.*)<LeadAmplitudeUnitsPerBit>4.88</LeadAmplitudeUnitsPerBit>', r'\1'), 'UnitsPerBit: is missing'), (('4.88', '4.88e3'), 'microvolts labelled')):
        f.write_text(whole)
        with pytest.raises(DataError, match=said): read_ecg(edit(f, change))
    f.write_text(re.sub(r'<LeadDataCRC32>\d+', '<LeadDataCRC32>0', whole).replace(b64, base64.b64encode(raw).decode()))
    read_ecg(f)  # no checksum was kept

def test_aecg_variants(rest, tmp_path):
    f = tmp_path/'h.xml'
    write_aecg(f, rest, 'F', date(1953, 5, 8), datetime(2002, 11, 22, 9, 10))
    whole,ecg = f.read_text(),read_ecg(f)
    assert abs(ecg.mv - rest.mv).max() < .00126 and (ecg.meta['sex'], ecg.meta['age'], ecg.meta['date']) == ('F', 49, '2002-11-22T09:10:00')
    def again(*changes):
        f.write_text(whole)
        return read_ecg(edit(f, *changes))
    beat = '<series><code code="REPRESENTATIVE_BEAT"/>' + whole[whole.index('<code code="RHYTHM"'):whole.index('</series>')].split('>', 1)[1] + '</series></component><component>'
    for changes in ([('<series>', beat + '<series>')],                                                                    # several series, the beat first
                    [('TIME_ABSOLUTE', 'TIME_RELATIVE'), ('GLIST_TS', 'GLIST_PQ'), ('value="0.002" unit="s"', 'value="2" unit="ms"')],
                    [('value="2.5" unit="uV"', 'value="0.0025" unit="mV"')], [('MDC_ECG_LEAD_AVR', 'MDC_ECG_LEAD_aVR')], [('MDC_ECG_LEAD_V1"', '5.6.3-9-3"')]):
        assert abs(again(*changes).mv - rest.mv).max() < .00126, changes
    assert abs(again(('<origin value="0" unit="uV"', '<origin value="1" unit="mV"')).mv - 1 - rest.mv).max() < .00126
    split = again(('(?s)(<component>\\s*<sequence>\\s*<code code="MDC_ECG_LEAD_III.*?</component>)', '<component><sequence><code code="MDC_ECG_HEART_RATE"/></sequence></component>'))
    assert split.meta['derived'] == ['III']
    for changes,said in (([('<scale value="2.5" unit="uV"', '<scale nullFlavor="NI"')], r'scale: is null \(NI'), ([('unit="uV"', 'unit="Pa"')], "unit 'Pa'"), ([('RHYTHM', 'REPRESENTATIVE_BEAT')], 'no rhythm series'),
                         ([('unit="s"', 'unit="h"')], 'no time step'), ([('(?s)<sequence>\\s*<code code="TIME.*?</sequence>', '')], 'no rate'), ([('LEAD_V6', 'LEAD_V5')], 'V5: is duplicated'), ([('LEAD_V6', 'LEAD_V7')], 'lead V6: missing')):
        with pytest.raises(DataError, match=said): again(*changes)

def test_sierra_variants(rest, tmp_path):
    f,enc = tmp_path/'s.xml','utf-16'
    for version in ('1.03', '1.04', '1.04.01', '1.04.02'):
        for compress in (True, False):
            for pulse in (True, False):
                write_sierra(f, rest, 'F', 50, version, compress, pulse)
                ecg = read_ecg(f)
                assert ecg.mv.shape == (12, 5000) and abs(ecg.mv - rest.mv).max() < .00251 and (ecg.meta['sex'], ecg.meta['age']) == ('F', 50)
    write_sierra(f, rest, compress=False)
    text = f.read_text(enc)
    b64 = re.search(r'(?s)<parsedwaveforms[^>]*>([^<]*)<', text)[1]
    plain = ' '.join(map(str, np.frombuffer(base64.b64decode(b64), '<i2').tolist()))
    f.write_text(text.replace(b64, plain).replace('dataencoding="Base64"', 'dataencoding="Plain"').replace('compression="Uncompressed"', 'compressflag="False" compressmethod="XLI"'), enc)
    assert abs(read_ecg(f).mv - rest.mv).max() < .00251
    for change,said in ((('1.04', '1.05'), "version '1.05'"), (('Uncompressed', 'ZIP'), "compression 'ZIP'"), (('durationperchannel="10400"', 'durationperchannel="12000"'), '12 x 6,000 are promised'),
                        (('Base64', 'Hex'), "encoding 'hex'"), (('<samplingrate>500', '<samplingrate>0'), 'no rate'), (('(?s)<waveforms>.*</waveforms>', ''), 'has no waveforms')):
        f.write_text(text, enc)
        with pytest.raises(DataError, match=said): read_ecg(edit(f, change, enc=enc))

def test_xml_is_never_trusted(tmp_path):
    secret = tmp_path/'secret.txt'
    secret.write_text('1,2,3')
    for bomb in (f'<!DOCTYPE r [<!ENTITY x SYSTEM "{secret.as_uri()}">]><CardiologyXML>&x;</CardiologyXML>', '<!DOCTYPE r [<!ENTITY % x SYSTEM "http://localhost:9/x"> %x;]><RestingECG/>', '<a>'*400_000,
                 '<!DOCTYPE r [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><AnnotatedECG>&b;</AnnotatedECG>'):
        (tmp_path/'b.xml').write_text(bomb)
        with pytest.raises(DataError, match='b.xml: XML'): read_ecg(tmp_path/'b.xml')
    with open(tmp_path/'b.xml', 'wb') as f: f.truncate(100 << 20)
    with pytest.raises(DataError, match='no ECG in a format'): read_ecg(tmp_path/'b.xml')
    with open(tmp_path/'b.xml', 'r+b') as f: f.write(b'<RestingECG>')
    with pytest.raises(DataError, match='too many for an ECG'): read_ecg(tmp_path/'b.xml')


# ---- tables -----------------------------------------------------------------------------------------------------

def csv(path, mv, names=LEADS, above='# fs=500 unit=mV', sep=',', fmt='%.4f', columns=()):
    np.savetxt(path, np.column_stack([*columns, mv.T]), fmt, sep, header=(above + '\n')*bool(above) + sep.join(names), comments='')
    return path

def test_csv(rest, tmp_path):
    f,t = tmp_path/'a.csv',np.arange(5000)/500
    def same(**kw): assert abs(read_ecg(csv(f, **kw)).mv - kw.pop('want', rest.mv)).max() < .001
    same(mv=rest.mv); same(mv=rest.mv[::-1], names=LEADS[::-1]); same(mv=rest.mv*1000, above='# rate: 500 Hz, unit: uV')
    same(mv=rest.mv, names=('time_s', *LEADS), above='# unit=mV', columns=[t]); same(mv=rest.mv, names=('Time (ms)', *LEADS), above='# unit=mV', columns=[1000*t + 77])
    same(mv=rest.mv*1000, names=[f'{o} [uV]' for o in LEADS], above='# fs=500'); same(mv=rest.mv, names=['"I"', *LEADS[1:]], sep=';'); same(mv=rest.mv, sep='\t')
    same(mv=rest.mv, names=('', *[o.upper() for o in LEADS]), columns=[np.arange(5000)])  # a counter in an unnamed column
    csv(f, rest.mv, sep=';').write_text(f.read_text().replace('.', ','))
    assert abs(read_ecg(f).mv - rest.mv).max() < .001
    f.write_bytes(b'\xef\xbb\xbf' + csv(f, rest.mv).read_bytes().replace(b'\n', b'\r\n'))
    assert abs(read_ecg(f).mv - rest.mv).max() < .001
    csv(f, rest.mv, above='')
    f.with_suffix('.json').write_text(json.dumps(dict(fs=500, unit='mV', sex='F', age=61, date='2020-02-03')))
    ecg = read_ecg(f)
    assert abs(ecg.mv - rest.mv).max() < .001 and (ecg.meta['sex'], ecg.meta['age'], ecg.meta['date'], ecg.meta['format']) == ('F', 61, '2020-02-03', 'CSV')
    np.savetxt(f, rest.mv.T, '%.4f', ',')
    f.with_suffix('.json').write_text(json.dumps(dict(fs=500, unit='mV', leads=LEADS)))
    assert abs(read_ecg(f).mv - rest.mv).max() < .001
    f.with_suffix('.json').unlink()
    f.write_bytes(csv(f, rest.mv*1000, above='# fs=500 unit=uV').read_bytes().replace(b'uV', b'\xb5V'))  # as Windows writes it
    assert abs(read_ecg(f).mv - rest.mv).max() < .001
    x = resample_poly(np.concatenate([rest.mv]*2, 1), 18, 25, axis=1, padtype='line')
    ecg = read_ecg(csv(tmp_path/'b.csv', x, ('time_s', *LEADS), '# unit=mV', columns=[np.round(np.arange(x.shape[1])/360, 3)]))
    assert ecg.meta['source_fs'] == 360

BAD_CSV = {'rate': (dict(above='# unit=mV'), r'sampling rate: is not declared.*"# fs=500 unit=mV"'), 'unit': (dict(above='# fs=250'), r'unit: is not declared.*"# fs=250 unit=mV"'), 'nothing': (dict(above=''), r'\{"fs": 500, "unit": "mV"\} into a\.json'),
    'names': (dict(names=[str(k) for k in range(12)]), 'first row: names no leads'), 'wrong unit': (dict(above='# fs=500 unit=Pa'), "unit 'Pa'"), 'uV': (dict(above='# fs=500 unit=V'), 'microvolts labelled as millivolts'),
    'time without unit': (dict(above='# unit=mV', names=('time', *LEADS), columns=[np.arange(5000)/500]), 'name it time_s or time_ms'), 'gap': (dict(above='# unit=mV', names=('time_s', *LEADS), columns=[np.r_[0:2500, 2600:5100]/500]), 'does not grow evenly'),
    'contradiction': (dict(above='# fs=250 unit=mV', names=('time_s', *LEADS), columns=[np.arange(5000)/500]), 'declared as 250 Hz, but the time column says 500'), 'inverted': (dict(names=['-' + o if o == 'V2' else o for o in LEADS]), 'lead V2: missing')}

@pytest.mark.parametrize('what', BAD_CSV)
def test_csv_refused(rest, tmp_path, what):
    kw,said = BAD_CSV[what]
    with pytest.raises(DataError, match='(?i)' + said) as e: read_ecg(csv(tmp_path/'a.csv', rest.mv, **kw))
    assert 'a.csv' in str(e.value) and e.value.remedy

def test_csv_damaged(rest, tmp_path):
    f = csv(tmp_path/'a.csv', rest.mv)
    text = f.read_text()
    for change in (lambda s: s[:-30], lambda s: s.replace('\n0', '\nx', 1), lambda s: s.replace(',-', ',,', 1), lambda s: s + '1,2,3\n', lambda s: s[:-len(s)//3] + 'nan,'*11 + 'nan\n'):
        f.write_text(change(text))
        with pytest.raises(DataError, match='a.csv'): read_ecg(f)
    f.write_text(text)
    f.with_suffix('.json').write_text('{"fs": 250}')
    with pytest.raises(DataError, match='fs: is 500 in the file and 250 in a.json'): read_ecg(f)
    f.with_suffix('.json').write_text('{"fs": ')
    with pytest.raises(DataError, match='a.json: no valid JSON'): read_ecg(f)

def test_npy(rest, tmp_path):
    f,said = tmp_path/'a.npy',dict(fs=500, unit='mV', leads=list(LEADS))
    side = f.with_suffix('.json')
    for x in (rest.mv, rest.mv.T, np.asfortranarray(rest.mv), rest.mv.astype('>f8')):
        np.save(f, x); side.write_text(json.dumps(said))
        assert abs(read_ecg(f).mv - rest.mv).max() < 1e-6
    np.save(f, np.rint(rest.mv[list(range(2)) + list(range(6, 12))]*1000).astype(np.int16))
    side.write_text(json.dumps(said | dict(unit='uV', leads=[LEADS[k] for k in (0, 1, 6, 7, 8, 9, 10, 11)])))
    assert abs(read_ecg(f).mv - rest.mv).max() < .01
    np.save(f, rest.mv)
    for wrong,match in ((said | dict(leads=['I', 'II']), '2 leads are declared'), ({k: said[k] for k in ('fs', 'leads')}, 'unit: is not declared'), ({k: said[k] for k in ('unit', 'leads')}, 'sampling rate: is not declared'), (dict(fs=500, unit='mV'), 'leads: are not declared')):
        side.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=match): read_ecg(f)
    side.unlink()
    with pytest.raises(DataError, match='into a.json beside it'): read_ecg(f)
    side.write_text(json.dumps(said))
    for x in (np.array([[1, 'a']]*6, object), np.zeros(12), np.zeros((12, 10, 5)), rest.mv > 0, rest.mv.astype(complex)):
        np.save(f, x, allow_pickle=True)
        with pytest.raises(DataError, match='a.npy'): read_ecg(f)


# ---- more of WFDB and DICOM -------------------------------------------------------------------------------------

def test_write_wfdb_as_mimic(rest, tmp_path):
    f = write_wfdb(tmp_path/'files/p1000/p10000032/s40689238/40689238', rest, date=datetime(2180, 6, 27, 9, 13), comments=['<subject_id>: 10000032'])
    rec = wfdb.rdrecord(str(f))
    assert rec.sig_name == list(MIMIC_LEADS) and rec.adc_gain == [200.]*12 and rec.fs == 500
    ecg = read_ecg(f)
    assert abs(ecg.mv - rest.mv).max() < .0026 and ecg.meta['date'] == '2180-06-27T09:13:00' and '10000032' not in json.dumps(ecg.meta)

def test_wfdb_damage_is_seen(rest, tmp_path):
    f = write_wfdb(tmp_path/'r', rest).with_suffix('.dat')
    data = f.read_bytes()
    for b in (data[:5000] + bytes([data[5000] ^ 8]) + data[5001:], data[:5000] + b'abc' + data[5000:], data[:5000] + data[5024:] + bytes(48)):
        f.write_bytes(b)
        with pytest.raises(DataError, match='checksum'): read_ecg(f)
    head = f.with_suffix('.hea').read_text()
    f.with_suffix('.hea').write_text(re.sub(r'(r.dat 16 \S+ 16 0 \S+) \S+', r'\1 0', head))  # checksums never kept
    f.write_bytes(data[:5000] + bytes([data[5000] ^ 8]) + data[5001:])
    read_ecg(f)

def test_inverted_leads_are_not_leads(rest, tmp_path):
    mv,names = rest.mv.copy(),list(LEADS)
    names[3],mv[3] = 'aVR-',-mv[3]
    ecg = read_ecg(write_wfdb_plain(tmp_path, mv, names))
    assert ecg.meta['derived'] == ['aVR'] and abs(ecg.mv - rest.mv).max() < .01
    names[8] = '-V3'
    with pytest.raises(DataError, match='lead V3: missing'): read_ecg(write_wfdb_plain(tmp_path, mv, names))

def dicom_with(path, change):
    ds = pydicom.dcmread(DCM)
    change(ds)
    ds.save_as(path)
    return path

@pytest.mark.parametrize('bits,kind,dtype,shift', [(8, 'SB', 'i1', 0), (8, 'UB', 'u1', 128), (16, 'US', '<u2', 32768), (32, 'SL', '<i4', 0), (32, 'UL', '<u4', 1 << 31)])
def test_dicom_depths(rest, tmp_path, bits, kind, dtype, shift):
    step = 25 if bits == 8 else 1.25
    def change(ds):
        g = ds.WaveformSequence[0]
        raw = np.frombuffer(g.WaveformData, '<i2').reshape(-1, 12).astype(np.int64)
        x = np.clip(np.rint(raw*1.25/step), -127, 127) if bits == 8 else raw
        g.WaveformBitsAllocated,g.WaveformSampleInterpretation,g.WaveformData = bits,kind,(x + shift).astype(dtype).tobytes()
        g['WaveformData'].VR = 'OB' if bits == 8 else 'OW'
        for c in g.ChannelDefinitionSequence:
            c.ChannelSensitivity,c.ChannelBaseline,c.WaveformBitsStored = str(step),str(-shift*step),bits
            c.ChannelSensitivityCorrectionFactor = '1'
    assert abs(read_ecg(dicom_with(tmp_path/'a.dcm', change)).mv - rest.mv).max() < (.02 if bits == 8 else .001)

def test_dicom_groups_private_tags_and_lies(rest, tmp_path):
    def beat_first(ds):
        beat = pydicom.dcmread(DCM).WaveformSequence[0]
        beat.NumberOfWaveformSamples,beat.WaveformData = 1200,beat.WaveformData[:1200*24]
        ds.WaveformSequence.insert(0, beat)
    assert (read_ecg(dicom_with(tmp_path/'a.dcm', beat_first)).mv == rest.mv).all()
    def private(ds):
        ds.PatientName,ds.PatientID,ds.PatientSex,ds.PatientBirthDate,ds.AcquisitionDateTime = 'Secret^Name','ID123','F','19500601','20140531090807'
        del ds.PatientAge
        ds.private_block(0x0011, 'SECRET', create=True).add_new(1, 'LO', 'Secret')
        for c in ds.WaveformSequence[0].ChannelDefinitionSequence: c.FilterLowFrequency,c.FilterHighFrequency,c.NotchFilterFrequency = '0.05','150','50'
    meta = read_ecg(dicom_with(tmp_path/'a.dcm', private)).meta
    assert 'ecret' not in json.dumps(meta) and 'ID123' not in json.dumps(meta)
    assert (meta['sex'], meta['age'], meta['date'], meta['filters']) == ('F', 63, '2014-05-31T09:08:07', {'highpass_hz': .05, 'lowpass_hz': 150, 'notch_hz': 50})
    def huge(ds): ds.WaveformSequence[0].NumberOfWaveformSamples = 4_000_000_000
    def mulaw(ds): ds.WaveformSequence[0].WaveformSampleInterpretation = 'MB'
    def no_rate(ds): ds.WaveformSequence[0].SamplingFrequency = '0'
    for change in (huge, mulaw, no_rate):
        with pytest.raises(DataError, match='a.dcm'): read_ecg(dicom_with(tmp_path/'a.dcm', change))

def test_too_long(rest, tmp_path):
    f = write_wfdb(tmp_path/'r', np.tile(rest.mv, (1, 2)))
    edit(f.with_suffix('.hea'), ('r 12 500 10000', 'r 12 0.5 10000'))
    with pytest.raises(DataError, match='more than 40 minutes'): read_ecg(f)

@pytest.mark.parametrize('kind', ['cardiosoft', 'muse', 'aecg', 'sierra', 'mimic'])
def test_forty_files_a_second(rest, tmp_path, kind):
    f = tmp_path/'r'
    write_wfdb(f, rest) if kind == 'mimic' else WRITERS[kind](f, rest)
    read_ecg(f)
    took = []
    for _ in range(12):
        t = time.process_time()
        read_ecg(f)
        took.append(time.process_time() - t)
    print(f'{kind}: {1/min(took):.0f} files a second a core')
    assert min(took) < 1/40  # the others of the twelve may have shared their core
