"Damaged and hostile cine files: read, or refused with DataError; never a hang, a crash or a gigabyte."
import gzip, io, json, resource, signal, struct, subprocess, sys, zipfile, zlib
from pathlib import Path
import numpy as np, pydicom, pytest
from ecgflowcmr.cine import Cine, check_cine, read_cine, read_cines, write_cine, write_nifti
from ecgflowcmr.cine_dicom import classic_files, enhanced_file, write_ukb_zip
from ecgflowcmr.ecg import DataError

ROOT = Path(__file__).resolve().parents[1]
N = 6  # frames of the small cine


def small(view='4ch'): return Cine(np.random.default_rng(1).integers(0, 900, (N, 12, 14), dtype=np.uint16), 1.8, 8., np.arange(N)*150., 900., view)


def seeds(d):
    "One small file of each kind, and how it is given to the reader."
    c = small(); rle = pydicom.dcmread(io.BytesIO(classic_files(c)[0])); rle.compress(pydicom.uid.RLELossless); b = io.BytesIO(); rle.save_as(b)
    write_cine(d/'a.nii', c); write_cine(d/'a.nii.gz', c); write_nifti(d/'b.nii', (c.frames/4).astype('uint8'), 1.8, 18.); write_ukb_zip(d/'a.zip', [c, small('2ch')], private=0, manifest='manifest.cvs')
    return {'a.nii': (d/'a.nii').read_bytes(), 'a.nii.gz': (d/'a.nii.gz').read_bytes(), 'b.nii': (d/'b.nii').read_bytes(), 'a.zip': (d/'a.zip').read_bytes(),
            'e.dcm': enhanced_file(c), 'c.dcm': classic_files(c)[0], 'rle.dcm': b.getvalue()}


def mutate(data, r):
    "Flip bits, cut, blow numbers up, repeat or blank a piece; more often near the beginning, where headers are."
    b = bytearray(data); place = lambda: int(r.integers(len(b)) if r.random() < .4 else min(r.exponential(len(b)/8), len(b)-1))
    for _ in range(int(r.integers(1, 9))):
        kind, i = r.integers(6), place()
        if kind <= 1: b[i] ^= 1 << int(r.integers(8))
        elif kind == 2: b[i:i+4] = r.choice([b'\xff\xff\xff\xff', b'\xff\xff\xff\x7f', b'\0\0\0\x80', b'\xfe\xff\xff\xff', b'\0\0\0\0'])
        elif kind == 3: b[i:i+2] = struct.pack('<H', int(r.integers(65536)))
        elif kind == 4: b[i:i] = b[i:i+int(r.integers(1, 200))]
        else: b[i:i+int(r.integers(1, 40))] = bytes(int(r.integers(1, 40)))
        if not b: return b'\0'
    return bytes(b[:place()]) if r.random() < .15 else bytes(b)


def one(path):
    "Whether the file is read; anything but DataError is an error."
    def late(*a): raise TimeoutError('more than 10 s')
    signal.signal(signal.SIGALRM, late); signal.alarm(10)
    try:
        for c in read_cines(path): check_cine(c)
        return True
    except DataError as e:
        assert str(e) and e.remedy
        return False
    finally: signal.alarm(0)


def fuzz(folder, n, seed=0):
    "In a process of its own: its memory is its own."
    folder = Path(folder); r = np.random.default_rng(seed); base = seeds(folder); series = classic_files(small()); read = 0
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(n):
        name = list(base)[k % len(base)]
        if name == 'c.dcm':                            # a whole series, one or all files damaged
            d = folder/'s'; d.mkdir(exist_ok=True)
            for j, o in enumerate(series): (d/f'{j}').write_bytes(mutate(o, r) if j == k % N or k % 3 == 0 else o)
            read += one(d)
        else:
            (folder/name).write_bytes(mutate(base[name], r)); read += one(folder/name)
    print(json.dumps(dict(read=read, grown_mb=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)/1024)))


def test_mutated_files(tmp_path):
    "700 mutants of seven kinds of file."
    p = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT/"tests")!r}); from test_cine_fuzz import fuzz; fuzz({str(tmp_path)!r}, 700)'], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    got = json.loads(p.stdout.splitlines()[-1])
    assert got['grown_mb'] < 900 and 20 < got['read'] < 650, got


def pack(path, files, **kw):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items(): z.writestr(name, data)
    return path


def dcm(**kw):
    ds = pydicom.dcmread(io.BytesIO(classic_files(small())[0]))
    for k, v in kw.items(): setattr(ds, k, v)
    b = io.BytesIO(); ds.save_as(b)
    return b.getvalue()


@pytest.mark.parametrize('name', ['../../evil.dcm', '/etc/evil.dcm', 'a/../../b.dcm', '..\\evil.dcm', 'C:/evil.dcm'])
def test_traversal(tmp_path, name):
    good = {f'{k}.dcm': o for k, o in enumerate(classic_files(small()))}
    with pytest.raises(DataError, match='leads out of the zip'): read_cine(pack(tmp_path/'a.zip', {**good, name: b'x'}))
    assert [p.name for p in tmp_path.iterdir()] == ['a.zip']


def test_bombs(tmp_path):
    good = {f'{k}.dcm': o for k, o in enumerate(classic_files(small()))}
    with pytest.raises(DataError, match='would grow'): read_cine(pack(tmp_path/'a.zip', {**good, 'b.dcm': bytes(50 << 20)}))
    with pytest.raises(DataError, match='archive'): read_cine(pack(tmp_path/'b.zip', {**good, 'inner.zip': b'PK'}))
    raw = bytearray(pack(tmp_path/'c.zip', good).read_bytes())
    at = raw.find(b'PK\x01\x02'); raw[at+24:at+28] = struct.pack('<I', 1 << 31); (tmp_path/'c.zip').write_bytes(raw)
    with pytest.raises(DataError, match='declares 2,147,483,648 bytes'): read_cine(tmp_path/'c.zip')
    raw = bytearray(pack(tmp_path/'d.zip', good).read_bytes()); at = raw.find(b'PK\x01\x02'); raw[at+8] |= 1; (tmp_path/'d.zip').write_bytes(raw)
    with pytest.raises(DataError, match='encrypted'): read_cine(tmp_path/'d.zip')
    raw = bytearray(pack(tmp_path/'e.zip', good).read_bytes()); at = raw.find(b'PK\x01\x02'); raw[at+24:at+28] = struct.pack('<I', 20); (tmp_path/'e.zip').write_bytes(raw)
    assert one(tmp_path/'e.zip') in (True, False)                                # declares less than it holds
    with zipfile.ZipFile(tmp_path/'f.zip', 'w') as z:
        for k, o in good.items(): z.writestr(k, o)
        link = zipfile.ZipInfo('link.dcm'); link.external_attr = 0o120777 << 16; z.writestr(link, '/etc/passwd')
    assert len(read_cine(tmp_path/'f.zip').frames) == N
    many = pack(tmp_path/'g.zip', {f'{k}': b'' for k in range(50_001)})
    with pytest.raises(DataError, match='holds 50,001 files'): read_cine(many)


def test_links_in_folders_are_not_followed(tmp_path):
    (tmp_path/'d').mkdir(); (tmp_path/'else').mkdir()
    for k, o in enumerate(classic_files(small())): (tmp_path/'d'/f'{k}').write_bytes(o)
    for k, o in enumerate(classic_files(small('2ch'))): (tmp_path/'else'/f'{k}').write_bytes(o)
    (tmp_path/'d'/'loop').symlink_to(tmp_path/'d'); (tmp_path/'d'/'other').symlink_to(tmp_path/'else')
    assert [c.view for c in read_cines(tmp_path/'d')] == ['4ch']


def test_huge_counts(tmp_path):
    for k, kw in enumerate([dict(Rows=65535, Columns=65535), dict(NumberOfFrames='99999999'), dict(Rows=0), dict(BitsAllocated=32), dict(BitsStored=40)]):
        d = tmp_path/str(k); d.mkdir()
        for j, o in enumerate(classic_files(small())):
            ds = pydicom.dcmread(io.BytesIO(o))
            for a, b in kw.items(): setattr(ds, a, b)
            ds.save_as(d/str(j))
        with pytest.raises(DataError): read_cine(d)
    head = bytearray(348); head[:4] = struct.pack('<i', 348); head[40:56] = struct.pack('<8h', 4, 32767, 32767, 1, 50, 1, 1, 1); head[70:74] = struct.pack('<2h', 4, 16); head[344:348] = b'n+1\0'; head[108:112] = struct.pack('<f', 352)
    (tmp_path/'a.nii').write_bytes(bytes(head) + bytes(4000))
    with pytest.raises(DataError, match='promise'): read_cine(tmp_path/'a.nii')
    (tmp_path/'b.nii.gz').write_bytes(gzip.compress(bytes(head) + bytes(1 << 24)))
    with pytest.raises(DataError): read_cine(tmp_path/'b.nii.gz')


def test_deflated_and_rle_bombs(tmp_path):
    ds = pydicom.dcmread(io.BytesIO(classic_files(small())[0])); ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1.99'
    b = io.BytesIO(); pydicom.filewriter.write_file_meta_info(b, ds.file_meta)
    (tmp_path/'a.dcm').write_bytes(bytes(128) + b'DICM' + b.getvalue() + zlib.compress(bytes(200 << 20), 9)[2:-4])
    with pytest.raises(DataError, match='deflated'): read_cine(tmp_path/'a.dcm')
    d = tmp_path/'r'; d.mkdir()
    for j, o in enumerate(classic_files(small())):
        ds = pydicom.dcmread(io.BytesIO(o)); ds.compress(pydicom.uid.RLELossless)
        ds.PixelData = pydicom.encaps.encapsulate([struct.pack('<16I', 2, 64, 2000, *[0]*13) + b'\x81\0'*2_000_000]); ds.save_as(d/str(j))
    with pytest.raises(DataError, match='RLE bytes'): read_cine(d)


def test_garbage(tmp_path):
    for k, data in enumerate([b'', b'PK', b'PK\x03\x04' + bytes(100), b'\x1f\x8b' + bytes(20), bytes(5000), bytes(128) + b'DICM', b'<xml/>', b'II*\0' + bytes(50)]):
        (tmp_path/f'{k}.bin').write_bytes(data)
        with pytest.raises(DataError): read_cine(tmp_path/f'{k}.bin')
    (tmp_path/'empty').mkdir()
    with pytest.raises(DataError, match='no DICOM cine'): read_cine(tmp_path/'empty')
    with pytest.raises(DataError, match='missing'): read_cine(tmp_path/'nowhere')
