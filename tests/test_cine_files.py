"Cines and small files under kills, full disks and foreign eyes."
import errno, os, signal, subprocess, sys, time
from pathlib import Path
import imageio_ffmpeg, nibabel as nib, numpy as np, pydicom, pytest
from PIL import Image
from ecgflowcmr.cine import read_nifti, to_float, to_uint8, write_nifti, write_video, write_webp
from ecgflowcmr.ecg import DataError
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
