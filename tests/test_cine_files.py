"Cines and small files under kills, full disks and foreign eyes."
import errno, io, os, signal, subprocess, sys, time, warnings, zipfile
from pathlib import Path
import imageio_ffmpeg, nibabel as nib, numpy as np, pydicom, pytest
from PIL import Image
from ecgflowcmr.cine import Cine, Plane, middle_slice, name_views, read_cine, read_cines, read_nifti, to_float, to_uint8, write_cine, write_nifti
from ecgflowcmr.cine_dicom import write_ukb_zip
from ecgflowcmr.ecg import DataError
from ecgflowcmr.film import write_video, write_webp
from ecgflowcmr.files import locked, read_json, write_json
from ecgflowcmr.virtual.people import virtual_subject

ROOT = Path(__file__).resolve().parents[1]
WRITERS = dict(
    nifti=('x.nii.gz', lambda p, x: write_nifti(p, x, 1.83, 18.)),
    video=('x.mp4',    lambda p, x: write_video(p, x[:10], 50, loops=1)),
    webp =('x.webp',   lambda p, x: write_webp(p, [x[:5]], 50)),
    json =('x.json',   lambda p, x: write_json(p, dict(n=int(x[0,0,0])))))


@pytest.fixture(scope='module')
def cine(): return np.random.default_rng(0).integers(0, 256, (50,96,96), dtype=np.uint8)


@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_full_disk_leaves_the_earlier_file(tmp_path, cine, monkeypatch, writer, call):
    name,write = WRITERS[writer]
    write(tmp_path/name, cine)
    before = (tmp_path/name).read_bytes()
    def full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match='No space left'): write(tmp_path/name, 255 - cine)
    assert (tmp_path/name).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_killed_writer_leaves_the_earlier_file(tmp_path):
    f = tmp_path/'x.json'
    write_json(f, dict(n=1))
    code = f"""
import sys, time
from ecgflowcmr.files import atomic_write, locked
with locked({str(f)!r}), atomic_write({str(f)!r}) as tmp:
    tmp.write_text('{{"n": 2'); print('half', flush=True); time.sleep(60)
"""
    p = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'half\n'
    p.send_signal(signal.SIGKILL); p.wait()
    assert read_json(f) == dict(n=1)
    begin = time.time()
    with locked(f): write_json(f, dict(n=3))   # the killed holder's lock is free
    assert time.time() - begin < 5 and read_json(f) == dict(n=3)


@pytest.mark.parametrize('shape', [(50,96,96), (25,208,256), (1,1,3)])
@pytest.mark.parametrize('name', ['a.nii', 'a.nii.gz'])
def test_nifti_there_and_back(tmp_path, shape, name):
    r = np.random.default_rng(1)
    for x in (r.integers(0, 256, shape, dtype=np.uint8), r.uniform(-1, 1, shape).astype('float32')):
        for pixel,ms in [(1.83, 1000/55), (1.40625, 36.), (.7, 16.4)]:
            write_nifti(tmp_path/name, x, pixel, ms)
            y,p,m = read_nifti(tmp_path/name)
            assert y.dtype == x.dtype and (y == x).all()
            assert p == pytest.approx(pixel, rel=1e-7) and m == pytest.approx(ms, rel=1e-6)
    img = nib.load(tmp_path/name)
    assert img.shape == (shape[2], shape[1], 1, shape[0])
    np.testing.assert_allclose(img.affine, img.get_qform(), atol=1e-4)
    centre = img.affine @ [(shape[2]-1)/2, (shape[1]-1)/2, 0, 1]
    np.testing.assert_allclose(centre[:3], 0, atol=1e-4)


@pytest.mark.parametrize('size', [0, 10, 200, 352, 1000])
def test_cut_nifti_is_named(tmp_path, cine, size):
    for name in ('a.nii', 'a.nii.gz'):
        write_nifti(tmp_path/name, cine, 1.83, 18.)
        os.truncate(tmp_path/name, size)
        with pytest.raises(DataError, match=name): read_nifti(tmp_path/name)


def test_flipped_bits_in_nifti_give_one_kind_of_error(tmp_path, cine):
    "Right or refused, whatever bit is wrong."
    write_nifti(tmp_path/'a.nii', cine[:2], 1.83, 18.)
    whole,r = (tmp_path/'a.nii').read_bytes(),np.random.default_rng(0)
    for _ in range(300):
        b = bytearray(whole); b[r.integers(352)] ^= 1 << r.integers(8)
        (tmp_path/'b.nii').write_bytes(b)
        try: x = read_nifti(tmp_path/'b.nii')[0]
        except DataError: continue
        assert x.ndim == 3


def test_virtual_pair_is_small_and_plays(tmp_path):
    a,b = virtual_subject(0).la, virtual_subject(1).la
    write_webp(tmp_path/'x.webp', [a, to_float(b)], 50, titles=['one', 'another'])
    assert (tmp_path/'x.webp').stat().st_size < 600_000
    w = Image.open(tmp_path/'x.webp')
    assert (w.n_frames, w.info['loop']) == (50, 0)
    w.seek(7); still = np.asarray(w.convert('L').resize((w.width//3, w.height//3), Image.BOX))[-96:,:96]
    assert np.abs(still.astype(int) - a[7])[3:-3,3:-3].mean() < 12
    write_video(tmp_path/'x.mp4', a, 50, loops=3)
    film = imageio_ffmpeg.read_frames(str(tmp_path/'x.mp4'))
    assert next(film)['pix_fmt'].startswith('yuv420p') and sum(1 for _ in film) == 150


def test_real_cine(tmp_path, fixtures):
    "A real 4-chamber cine, 25 frames of 208 x 256, passes through all writers."
    ds = sorted((pydicom.dcmread(f) for f in (fixtures/'cine'/'bivme_patient1'/'Se6_4ch').rglob('*') if f.suffix in ('.dcm','.IMA','')and f.is_file()), key=lambda d: float(d.TriggerTime))
    x = np.stack([d.pixel_array for d in ds]).astype('float32')
    x = to_uint8(np.clip(x/np.percentile(x, 99.5), 0, 1)*2 - 1)
    ms = (float(ds[-1].TriggerTime) - float(ds[0].TriggerTime))/(len(ds) - 1)
    write_nifti(tmp_path/'x.nii.gz', x, float(ds[0].PixelSpacing[0]), ms)
    y,pixel,t = read_nifti(tmp_path/'x.nii.gz')
    assert (y == x).all() and pixel == 1.40625 and abs(t - ms) < 1e-3
    write_video(tmp_path/'x.mp4', x, 1000/ms, zoom=2)
    write_webp(tmp_path/'x.webp', x, 1000/ms, zoom=1)


# ---- reading what scanners and UK Biobank write ----

FIX = 'bivme_patient1'


def copy_series(src, dst, names=None, edit=None, shuffle=0):
    "Files of a series under meaningless names; `edit(ds, k)` changes one, or drops it by returning False."
    dst.mkdir(parents=True, exist_ok=True)
    files = sorted(src.glob('*.dcm'), key=lambda f: float(pydicom.dcmread(f, specific_tags=['TriggerTime']).TriggerTime))
    order = np.random.default_rng(shuffle).permutation(len(files))
    for k, j in enumerate(order):
        ds = pydicom.dcmread(files[j])
        if edit and edit(ds, int(j)) is False: continue
        if ds.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRBigEndian:
            new = pydicom.Dataset(); new.file_meta = ds.file_meta
            for e in ds: new.add(e)
            ds = new
        ds.save_as(dst/(names(k) if names else f'{k:03d}_{j*7919 % 1000}.IMA'))
    return dst


def zipped(folder, path):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for f in sorted(folder.rglob('*')):
            if f.is_file(): z.write(f, f.relative_to(folder))
    return path


@pytest.fixture(scope='module')
def study(fixtures, tmp_path_factory):
    "Both series of the real study in one folder and in one zip, names shuffled."
    d = tmp_path_factory.mktemp('study')
    copy_series(fixtures/'cine'/FIX/'Se2_sax_mid', d/'folder'/'deep'/'er', lambda k: f'IM{k}', shuffle=1)
    copy_series(fixtures/'cine'/FIX/'Se6_4ch', d/'folder'/'deep', lambda k: f'IM{k}', shuffle=2)
    (d/'folder'/'notes.txt').write_text('no DICOM')
    zipped(d/'folder', d/'study.zip')
    return d


def truth(folder):
    ds = sorted((pydicom.dcmread(f) for f in folder.glob('*.dcm')), key=lambda d: float(d.TriggerTime))
    return np.stack([d.pixel_array for d in ds]), np.array([float(d.TriggerTime) for d in ds]), float(ds[0].NominalInterval)


@pytest.mark.parametrize('form', ['folder', 'study.zip'])
def test_real_study(study, fixtures, form):
    "Two series in one heap are told apart, and the frames are those of the files in order of time."
    four, sax = read_cine(study/form), read_cine(study/form, 'sax')
    for c, name, view in ((four, 'Se6_4ch', '4ch'), (sax, 'Se2_sax_mid', 'sax')):
        x, t, rr = truth(fixtures/'cine'/FIX/name)
        assert c.view == view and c.frames.dtype == np.uint16 and (c.frames == x).all()
        np.testing.assert_allclose(c.trigger_ms, t)
        assert (c.rr_ms, c.pixel_mm, c.slice_mm) == (rr, 1.40625, 6.0)
        assert c.meta['view_by'] == 'geometry' or 'says' in c.meta['view_by']
        assert c.meta['repaired'] == [] and c.meta['format'] == 'DICOM'
    assert sorted(c.view for c in read_cines(study/form)) == ['4ch', 'sax']
    with pytest.raises(DataError, match='not 2ch'): read_cine(study/form, '2ch')
    one = read_cine(fixtures/'cine'/FIX/'Se6_4ch')
    assert one.view == '4ch' and (one.frames == four.frames).all()


@pytest.mark.parametrize('lie', ['2CH', 'CINE_segmented_SAX_b3', '3CH', 'LVOT', ''])
def test_description_lies(fixtures, tmp_path, lie):
    def edit(ds, k): ds.SeriesDescription = ds.ProtocolName = lie
    c = read_cine(copy_series(fixtures/'cine'/FIX/'Se6_4ch', tmp_path/'x', edit=edit))
    assert c.view == '4ch'
    if lie not in ('LVOT', ''): assert 'the description says' in c.meta['view_by']


def test_without_geometry_the_description_names_the_view(fixtures, tmp_path):
    def edit(ds, k): del ds.ImageOrientationPatient
    c = read_cine(copy_series(fixtures/'cine'/FIX/'Se6_4ch', tmp_path/'x', edit=edit))
    assert c.view == '4ch' and 'no orientation' in c.meta['view_by'] and len(c.frames) == 25


def test_published_planes_are_recognised():
    "The three example studies of biv-me: the planes that its slice lists name, together and two by two."
    studies = [dict(sax=(.792067,0,.610434,.377686,.785613,-.490067), **{'4ch': (.9954,0,.0958042,.0787602,-.569348,-.818315), '3ch': (.198338,.966008,.165804,.64138,0,-.767224), '2ch': (-.621421,.783462,-.00474517,.0391428,.0249969,-.998921)}),
               dict(sax=(.536,.819,-.205,-.548,.153,-.822), **{'4ch': (.965,0,-.26,-.188,-.692,-.697), '2ch': (-.591,.727,.35,-.201,.287,-.937), '3ch': (.096,.977,-.192,.599,-.211,-.772)}),
               dict(sax=(.4883,.7639,-.4219,-.6538,0,-.7567), **{'4ch': (.9925,0,-.1222,.0776,.7726,.6301), '3ch': (-.0799,.9945,-.0682,.6493,0,-.7606), '2ch': (-.5621,.8271,0,0,0,-1)})]
    for s in studies:
        for views in ([*s], ['4ch','2ch','3ch'], ['4ch','2ch'], ['4ch','3ch'], ['2ch','3ch'], ['sax','4ch'], *([v] for v in s)):
            planes = name_views([Plane((0,0,0), s[v], '', None) for v in views])
            assert [p.view for p in planes] == views, (views, [(p.view, p.fit) for p in planes])


def test_a_whole_study_with_other_planes():
    "Study 1 with its stack, two right-heart planes and a 3-chamber series called 4CH: nothing is named that is not sure."
    sax = (.792067,0,.610434,.377686,.785613,-.490067)
    stack = [Plane((-202.214+8.4888*k, -79.6032-10.951*k, -70.5046-11.014*k), sax, '', None) for k in range(6)]
    rest = [((-180.784,116.78,78.6807), (.9954,0,.0958042,.0787602,-.569348,-.818315), '4ch'), ((-152.157,-125.99,94.6486), (.198338,.966008,.165804,.64138,0,-.767224), '4ch'),
            ((86.4403,-91.9405,153.513), (-.621421,.783462,-.00474517,.0391428,.0249969,-.998921), ''), ((-177.502,70.0554,131.214), (.747047,-.664755,.00463412,.149484,.161188,-.975537), ''),
            ((-30.6926,-140.019,198.673), (-.0607402,.998143,-.00470711,.134511,.00351246,-.990906), '')]
    planes = name_views([*stack, *(Plane(*o, None) for o in rest)])
    assert [p.view for p in planes] == ['sax']*6 + ['4ch','3ch','2ch','','']
    assert 'the description says 4ch' in planes[7].note


def test_turned_hearts():
    "The heart of study 1 turned by 8 degrees (standard deviation) about each axis of the body: named right, or not at all."
    from scipy.spatial.transform import Rotation
    s = {'sax': (.792067,0,.610434,.377686,.785613,-.490067), '4ch': (.9954,0,.0958042,.0787602,-.569348,-.818315), '3ch': (.198338,.966008,.165804,.64138,0,-.767224), '2ch': (-.621421,.783462,-.00474517,.0391428,.0249969,-.998921)}
    r = np.random.default_rng(0)
    for views, least in ((('sax','4ch','2ch','3ch'), .99), (('4ch','2ch','3ch'), .98), (('4ch',), .92), (('sax',), .92)):
        got = []
        for _ in range(150):
            q = Rotation.from_euler('xyz', r.normal(0, 8, 3), degrees=True).as_matrix()
            got += [(p.view, v) for p, v in zip(name_views([Plane((0,0,0), (*(q @ s[v][:3]), *(q @ s[v][3:])), '', None) for v in views]), views)]
        assert np.mean([a == b for a, b in got]) > least and not [o for o in got if o[0] not in ('', o[1])], views


def test_dropped_and_doubled_frames(fixtures, tmp_path):
    src = fixtures/'cine'/FIX/'Se6_4ch'; x, t, rr = truth(src)
    c = read_cine(copy_series(src, tmp_path/'a', edit=lambda ds, k: k not in (4, 11)))
    keep = [k for k in range(25) if k not in (4, 11)]
    assert (c.frames == x[keep]).all() and '2 of 25 frames missing, first at 140 ms' in c.meta['repaired'][0] and c.rr_ms == rr
    np.testing.assert_allclose(c.trigger_ms, t[keep])
    c = read_cine(copy_series(src, tmp_path/'b', edit=lambda ds, k: k != 24))
    assert '1 of 25 frames missing' in c.meta['repaired'][0]
    with pytest.raises(DataError, match='8 of 25 frames missing'): read_cine(copy_series(src, tmp_path/'c', edit=lambda ds, k: k % 3 != 1))
    copy_series(src, tmp_path/'d'); copy_series(src, tmp_path/'d', lambda k: f'again{k}', edit=lambda ds, k: k in (3, 9))
    c = read_cine(tmp_path/'d'); assert (c.frames == x).all() and 'files that are there twice: 2' in c.meta['repaired'][0]
    def twin(ds, k):
        ds.SOPInstanceUID = f'1.2.3.{k}'
        return k == 5
    copy_series(src, tmp_path/'e'); copy_series(src, tmp_path/'e', lambda k: f'again{k}', edit=twin)
    c = read_cine(tmp_path/'e'); assert (c.frames == x).all() and 'duplicated frames left out: 1' in c.meta['repaired'][0]
    def stray(ds, k):
        ds.SOPInstanceUID = f'1.2.4.{k}'; ds.TriggerTime = f'{float(ds.TriggerTime) + 15:.4f}'
        return k == 5
    copy_series(src, tmp_path/'f'); copy_series(src, tmp_path/'f', lambda k: f'again{k}', edit=stray)
    c = read_cine(tmp_path/'f'); assert (c.frames == x).all() and 'extra frames left out: 1, at 190 ms' in c.meta['repaired'][0]


def test_without_trigger_times(fixtures, tmp_path):
    src = fixtures/'cine'/FIX/'Se6_4ch'; x, t, rr = truth(src)
    def edit(ds, k): del ds.TriggerTime
    c = read_cine(copy_series(src, tmp_path/'a', edit=edit))
    assert (c.frames == x).all() and 'no trigger times' in c.meta['repaired'][0] and c.rr_ms == rr
    np.testing.assert_allclose(c.trigger_ms, np.arange(25)*rr/25)
    def edit(ds, k): del ds.TriggerTime; del ds.NominalInterval
    c = read_cine(copy_series(src, tmp_path/'b', edit=edit))
    assert (c.frames == x).all() and np.isnan(c.rr_ms)


def test_repeated_acquisition_the_last_counts(fixtures, tmp_path):
    src = fixtures/'cine'/FIX/'Se6_4ch'; x, t, rr = truth(src)
    def again(ds, k):
        ds.SeriesInstanceUID, ds.SOPInstanceUID, ds.SeriesNumber = '1.2.3.4', f'1.2.3.4.{k}', 14002
        ds.PixelData = (ds.pixel_array + 7).astype('<u2').tobytes()
    copy_series(src, tmp_path/'a'); copy_series(src, tmp_path/'a', lambda k: f'again{k}', again)
    c = read_cine(tmp_path/'a'); assert (c.frames == x + 7).all() and '1 earlier acquisition of this plane left out' in c.meta['repaired']
    def cut(ds, k):
        again(ds, k)
        return k < 12
    copy_series(src, tmp_path/'b'); copy_series(src, tmp_path/'b', lambda k: f'again{k}', cut)
    assert (read_cine(tmp_path/'b').frames == x).all(), 'a cut repetition does not count'
    def vf(ds, k): again(ds, k); ds.SeriesDescription += '_InlineVF'
    copy_series(src, tmp_path/'c'); copy_series(src, tmp_path/'c', lambda k: f'again{k}', vf)
    c = read_cine(tmp_path/'c'); assert (c.frames == x).all() and 'frames of inline ventricular function results: 25' in c.meta['skipped']
    def phase(ds, k): again(ds, k); ds.ImageType = ['ORIGINAL', 'PRIMARY', 'P', 'RETRO']
    copy_series(src, tmp_path/'d'); copy_series(src, tmp_path/'d', lambda k: f'again{k}', phase)
    assert (read_cine(tmp_path/'d').frames == x).all()
    def same(ds, k): uid = ds.SeriesInstanceUID; again(ds, k); ds.SeriesInstanceUID, ds.AcquisitionNumber, ds.TriggerTime = uid, 2, f'{float(ds.TriggerTime)*1.01:.4f}'
    copy_series(src, tmp_path/'e'); copy_series(src, tmp_path/'e', lambda k: f'again{k}', same)
    c = read_cine(tmp_path/'e'); assert (c.frames == x + 7).all() and '2 acquisitions in one series' in c.meta['repaired'][0]


def test_perfusion_and_inversion_scouts_are_no_cine(fixtures, tmp_path):
    "Other series in the same plane that have as many pictures, taken later."
    src = fixtures/'cine'/FIX/'Se2_sax_mid'; x, t, rr = truth(src)
    def later(ds, k):
        ds.SeriesInstanceUID, ds.SOPInstanceUID, ds.SeriesNumber = '1.2.3.5', f'1.2.3.5.{k}', 9900
        ds.PixelData = bytes(len(ds.PixelData))
    def perfusion(ds, k): later(ds, k); ds.TriggerTime = '120'
    def scout(ds, k): later(ds, k); ds.ScanningSequence = ['GR', 'IR']
    for name, edit in (('perfusion', perfusion), ('scout', scout)):
        copy_series(src, tmp_path/name); copy_series(src, tmp_path/name, lambda k: f'later{k}', edit)
        assert (read_cine(tmp_path/name).frames == x).all(), name


def test_two_people_are_refused(fixtures, tmp_path):
    def other(ds, k): ds.PatientID = ds.PatientName = 'Jane^Doe'
    copy_series(fixtures/'cine'/FIX/'Se6_4ch', tmp_path/'a'); copy_series(fixtures/'cine'/FIX/'Se2_sax_mid', tmp_path/'a', lambda k: f'b{k}', other)
    with pytest.raises(DataError, match='files of 2 people') as e: read_cine(tmp_path/'a')
    assert 'Doe' not in str(e.value)


def test_nothing_of_the_person_is_kept(fixtures, tmp_path):
    secret = 'Wiedemann'
    def edit(ds, k):
        ds.PatientName = ds.PatientID = ds.SeriesDescription = ds.ImageComments = ds.StudyID = ds.InstitutionName = secret
        ds.private_block(0x29, 'ACME', create=True).add_new(0x10, 'LO', secret)
    src = copy_series(fixtures/'cine'/FIX/'Se6_4ch', tmp_path/'a', edit=edit)
    c = read_cine(src)
    assert secret not in repr(c.meta) and '4232746890' not in repr(c.meta)
    for name in ('a.nii', 'x.dcm', 'y'):
        write_cine(tmp_path/name, c, subject=secret, salt='a long one')
        for f in [tmp_path/name] if (tmp_path/name).is_file() else (tmp_path/name).iterdir():
            raw = f.read_bytes()
            assert secret.encode() not in raw and b'4232746890' not in raw and b'ACME' not in raw


def test_hashed_ids(tmp_path, ukb_cines):
    c = ukb_cines[0][0]
    with pytest.raises(DataError, match='salt'): write_cine(tmp_path/'a', c, subject='1000001')
    ids = []
    for k, salt in enumerate(['my own salt', 'my own salt', 'another salt']):
        write_cine(tmp_path/f'{k}.dcm', c, subject='1000001', salt=salt); ids.append(pydicom.dcmread(tmp_path/f'{k}.dcm').PatientID)
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 16 and '1000001' not in ids[0]
    write_cine(tmp_path/'n.dcm', c); assert pydicom.dcmread(tmp_path/'n.dcm').PatientID == ''


def change_pixels(ds, x, **more):
    ds.PixelData = x.tobytes()
    for k, v in more.items(): setattr(ds, k, v)


@pytest.mark.parametrize('case', ['rle', 'mono1', 'rescaled', 'signed', 'eight', 'wide', 'overlay', 'implicit', 'big'])
def test_pixel_kinds(fixtures, tmp_path, case):
    src = fixtures/'cine'/FIX/'Se6_4ch'; x, t, rr = truth(src)
    def edit(ds, k):
        p = ds.pixel_array
        if case == 'rle': ds.compress(pydicom.uid.RLELossless)
        if case == 'mono1': change_pixels(ds, (4095 - p).astype('<u2'), PhotometricInterpretation='MONOCHROME1')
        if case == 'rescaled': ds.RescaleSlope, ds.RescaleIntercept = '2.5', '-10'
        if case == 'signed': change_pixels(ds, p.astype('<i2'), PixelRepresentation=1, BitsStored=16, HighBit=15)
        if case == 'eight': change_pixels(ds, (p >> 3).clip(0, 255).astype('u1'), BitsAllocated=8, BitsStored=8, HighBit=7)
        if case == 'wide': change_pixels(ds, np.repeat(p, 2, 0).astype('<u2'), Rows=416, PixelSpacing=['0.703125', '1.40625'])
        if case == 'overlay': change_pixels(ds, (p | 0x1000).astype('<u2'))
        if case in ('implicit', 'big'):
            if case == 'big': ds.PixelData = p.astype('>u2').tobytes()
            ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if case == 'implicit' else pydicom.uid.ExplicitVRBigEndian
    c = read_cine(copy_series(src, tmp_path/'x', edit=edit))
    want = dict(rescaled=x*2.5 - 10, eight=(x >> 3).clip(0, 255))
    if case == 'wide':
        assert c.pixel_mm == .703125 and c.frames.shape == (25, 416, 512) and 'resampled' in c.meta['repaired'][0]
        assert np.corrcoef(c.frames.reshape(25, 208, 2, 256, 2).mean((2, 4)).ravel(), x.ravel())[0, 1] > .99
        return
    assert (c.frames == want.get(case, x)).all()
    assert c.frames.dtype == dict(rescaled='float32', eight='uint8').get(case, 'uint16')


def test_jpeg_without_decoder_is_refused_clearly(fixtures, tmp_path):
    def edit(ds, k):
        ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.4.70'
        ds.PixelData = pydicom.encaps.encapsulate([b'\xff\xd8\xff' + bytes(2000)]); ds['PixelData'].VR = 'OB'
        ds['PixelData'].is_undefined_length = True
    with pytest.raises(DataError, match='Export it uncompressed'): read_cine(copy_series(fixtures/'cine'/FIX/'Se6_4ch', tmp_path/'x', edit=edit))


def test_truncated_pixels_are_refused(fixtures, tmp_path):
    d = copy_series(fixtures/'cine'/FIX/'Se6_4ch', tmp_path/'x')
    f = sorted(d.iterdir())[7]; os.truncate(f, f.stat().st_size - 5000)
    with pytest.raises(DataError, match='cut off') as e: read_cine(d)
    assert f.name in str(e.value) and 'Pixel Data' in str(e.value)


# ---- UK Biobank ----

@pytest.fixture(scope='module')
def ukb_cines():
    "Three long-axis planes and a stack of six, as one heart has them."
    o = {'4ch': (.9954,0,.0958042,.0787602,-.569348,-.818315), '3ch': (.198338,.966008,.165804,.64138,0,-.767224), '2ch': (-.621421,.783462,-.00474517,.0391428,.0249969,-.998921)}
    sax = (.792067,0,.610434,.377686,.785613,-.490067)
    r = np.random.default_rng(3)
    new = lambda v, o, p, k: Cine(r.integers(0, 2000, (20, 40, 42), dtype=np.uint16), 1.826, 8., np.arange(20)*48.5, 970., v, dict(orientation=o, position=p))
    la = [new(v, o[v], (10.*k, 5., 3.), k) for k, v in enumerate(o)]
    sa = [new('sax', sax, tuple(np.array([1., 2, 3]) + 10*k*np.cross(sax[:3], sax[3:])), k) for k in range(6)]
    return la, sa


@pytest.mark.parametrize('manifest', ['manifest.csv', 'manifest.cvs', None])
@pytest.mark.parametrize('mixed', [False, True])
def test_ukb_zips(tmp_path, ukb_cines, manifest, mixed):
    la, sa = ukb_cines
    write_ukb_zip(tmp_path/'la.zip', la, manifest=manifest, mixed=mixed, inline_vf=not mixed)
    got = {c.view: c for c in read_cines(tmp_path/'la.zip')}
    assert len(got) == 3
    for c in la:
        g = got[c.view]
        assert (g.frames == c.frames).all() and g.rr_ms == 970 and g.pixel_mm == 1.826
        assert '1000001' not in repr(g.meta)
        if not mixed: assert any('inline' in o for o in g.meta['skipped'])
    assert read_cine(tmp_path/'la.zip').view == '4ch'
    write_ukb_zip(tmp_path/'sa.zip', sa[::-1], manifest=manifest, mixed=mixed)
    got = read_cines(tmp_path/'sa.zip')
    base_to_apex = sorted(sa, key=lambda c: -np.dot(c.meta['position'], np.cross(c.meta['orientation'][:3], c.meta['orientation'][3:])))
    assert [c.view for c in got] == ['sax']*6
    for c, g in zip(base_to_apex, got): assert (g.frames == c.frames).all()
    mid = read_cine(tmp_path/'sa.zip')
    assert (mid.frames == base_to_apex[3].frames).all() and (middle_slice(got).frames == mid.frames).all() and (mid.meta['slices'], mid.meta['slice']) == (6, 3)


def test_ukb_zip_whose_headers_say_nothing(tmp_path, ukb_cines):
    "Orientation and description gone: the manifest names the view, its broken date notwithstanding."
    write_ukb_zip(tmp_path/'a.zip', ukb_cines[0][0], manifest='manifest.cvs')
    z = zipfile.ZipFile(tmp_path/'a.zip'); out = zipfile.ZipFile(tmp_path/'b.zip', 'w')
    for m in z.infolist():
        data = z.read(m)
        if m.filename.endswith('.dcm'):
            ds = pydicom.dcmread(io.BytesIO(data)); del ds.ImageOrientationPatient, ds.SeriesDescription
            b = io.BytesIO(); ds.save_as(b); data = b.getvalue()
        out.writestr(m.filename, data)
    out.close()
    c = read_cine(tmp_path/'b.zip'); assert c.view == '4ch' and (c.frames == ukb_cines[0][0].frames).all()


# ---- there and back ----

@pytest.mark.parametrize('name', ['a.nii', 'a.nii.gz', 'a.dcm', 'a.zip', 'folder'])
@pytest.mark.parametrize('kind', ['uint8', 'uint16', 'float32'])
def test_write_cine_there_and_back(tmp_path, ukb_cines, name, kind):
    src = ukb_cines[0][1]
    x = (src.frames % 256 if kind == 'uint8' else src.frames.astype('uint32')*32 if kind == 'uint16' else src.frames*.37 - 100).astype(kind)
    t = np.delete(np.arange(21)*48.37, 9)
    c = Cine(x, 1.826, 8.5, t, 1021., src.view, src.meta)
    write_cine(tmp_path/name, c, subject='someone', salt='a long one')
    g = read_cine(tmp_path/name)
    assert g.frames.dtype == x.dtype
    if kind == 'float32' and 'nii' not in name: np.testing.assert_allclose(g.frames, x, atol=(x.max() - x.min())/65535)
    else: assert (g.frames == x).all()
    np.testing.assert_allclose(g.trigger_ms, t, rtol=1e-12)
    assert (g.pixel_mm, g.slice_mm, g.rr_ms, g.view) == (1.826, 8.5, 1021., '3ch')
    np.testing.assert_allclose(g.meta['position'], c.meta['position'], atol=1e-4); np.testing.assert_allclose(g.meta['orientation'], c.meta['orientation'], atol=1e-5)


def test_others_read_what_we_write(tmp_path, ukb_cines):
    "nibabel and pydicom, without our code: values, order, size, time and place; and the mandatory elements are there."
    c = ukb_cines[0][0]
    write_cine(tmp_path/'a.nii.gz', c); img = nib.load(tmp_path/'a.nii.gz')
    assert (np.asarray(img.dataobj)[:, :, 0].transpose(2, 1, 0) == c.frames).all() and img.header.get_xyzt_units() == ('mm', 'sec')
    np.testing.assert_allclose(img.header.get_zooms(), (1.826, 1.826, 8., .0485), rtol=1e-5)
    np.testing.assert_allclose((np.diag([-1, -1, 1, 1]) @ img.affine)[:3, 3], c.meta['position'], atol=1e-4)
    write_cine(tmp_path/'d', c); write_cine(tmp_path/'a.dcm', c)
    ds = [pydicom.dcmread(f) for f in sorted((tmp_path/'d').iterdir())]
    assert len({d.SOPInstanceUID for d in ds}) == 20 and len({d.SeriesInstanceUID for d in ds}) == 1 and all(d.SOPInstanceUID.is_valid for d in ds)
    assert (np.stack([d.pixel_array for d in ds]) == c.frames).all() and [d.InstanceNumber for d in ds] == list(range(1, 21))
    for d in ds[:1]:
        for k in ('SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality FrameOfReferenceUID ImageType PixelSpacing ImageOrientationPatient ImagePositionPatient SamplesPerPixel '
                  'PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation ScanningSequence SequenceVariant NominalInterval CardiacNumberOfImages').split(): assert d[k].value not in ('', None), k
        for k in 'PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber SeriesNumber PositionReferenceIndicator Manufacturer ScanOptions MRAcquisitionType EchoTime EchoTrainLength SliceThickness InstanceNumber'.split(): assert k in d, k
    e = pydicom.dcmread(tmp_path/'a.dcm')
    assert (e.pixel_array == c.frames).all() and e.SOPClassUID.name == 'Enhanced MR Image Storage' and len(e.PerFrameFunctionalGroupsSequence) == 20
    with warnings.catch_warnings():                                              # nibabel's own DICOM reader, which is experimental
        warnings.simplefilter('ignore')
        from nibabel.nicom.dicomwrappers import wrapper_from_file
        w = wrapper_from_file(tmp_path/'a.dcm')
    assert w.image_shape == (40, 42, 1, 20) and (w.get_data()[:, :, 0].transpose(2, 0, 1) == c.frames).all()
    np.testing.assert_allclose((np.diag([-1, -1, 1, 1]) @ img.affine)[:3, 3], w.affine[:3, 3], atol=1e-3)
    write_cine(tmp_path/'d', c)                                                  # our own folder may be written again
    (tmp_path/'d'/'mine.txt').write_text('x')
    with pytest.raises(DataError, match='other files'): write_cine(tmp_path/'d', c)


def test_multiframe_of_old(tmp_path, ukb_cines):
    "One classic multi-frame file with a frame time vector; a stack in one enhanced file."
    c = ukb_cines[0][0]; write_cine(tmp_path/'d', c)
    ds = pydicom.dcmread(sorted((tmp_path/'d').iterdir())[0]); del ds.TriggerTime
    ds.NumberOfFrames, ds.PixelData = 20, c.frames.tobytes(); ds.FrameTimeVector = [0.] + [48.5]*19; ds.save_as(tmp_path/'m.dcm')
    g = read_cine(tmp_path/'m.dcm'); assert (g.frames == c.frames).all() and g.meta['format'] == 'DICOM multi-frame'; np.testing.assert_allclose(g.trigger_ms, c.trigger_ms)
    write_cine(tmp_path/'e.dcm', c); ds = pydicom.dcmread(tmp_path/'e.dcm')
    two = [f for f in ds.PerFrameFunctionalGroupsSequence] + [pydicom.Dataset(f) for f in pydicom.dcmread(tmp_path/'e.dcm').PerFrameFunctionalGroupsSequence]
    n = np.cross(c.meta['orientation'][:3], c.meta['orientation'][3:])
    for f in two[20:]: f.PlanePositionSequence[0].ImagePositionPatient = [f'{o:.4f}' for o in np.array(c.meta['position']) + 10*n]
    ds.PerFrameFunctionalGroupsSequence = two; ds.NumberOfFrames = 40; ds.PixelData = np.concatenate([c.frames, c.frames[:, ::-1]]).tobytes(); ds.save_as(tmp_path/'s.dcm')
    a, b = sorted(read_cines(tmp_path/'s.dcm'), key=lambda g: np.dot(g.meta['position'], n))
    assert (a.frames == c.frames).all() and (b.frames == c.frames[:, ::-1]).all()


def test_autofd_stacks(fixtures):
    "Stacks of one phase: a cine of one frame for each slice."
    for k in 'ABCD':
        f = fixtures/'cine'/'autofd'/k/'sa_ED.nii.gz'
        cines = read_cines(f); x = np.asarray(nib.load(f).dataobj)
        assert len(cines) == x.shape[2] == 12 and {c.view for c in cines} == {'sax'}
        with pytest.raises(DataError, match='2 files show sax'): read_cine(f.parent)
        for z, c in enumerate(sorted(cines, key=lambda c: c.meta['position'][2])): assert (c.frames[0] == x[:, :, z, 0].T).all() and abs(c.pixel_mm - 1.2307693) < 1e-5 and abs(c.slice_mm - 10) < 1e-3


def test_speed(tmp_path):
    "At least three UK Biobank-like 4-chamber zips a second on one core (measured: 26 alone, 17 with the two other views in the zip)."
    x = np.random.default_rng(0).integers(0, 800, (50, 208, 210), dtype=np.uint16)
    write_ukb_zip(tmp_path/'a.zip', Cine(x, 1.826, 8., np.arange(50)*19.4, 970., '4ch'), private=1 << 16)
    read_cine(tmp_path/'a.zip'); times = []
    for _ in range(3): begin = time.process_time(); c = read_cine(tmp_path/'a.zip', '4ch'); times.append(time.process_time() - begin)
    assert (c.frames == x).all() and min(times) < 1/3, times
