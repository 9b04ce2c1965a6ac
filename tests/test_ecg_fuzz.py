"Damaged and hostile ECG files, thousands of them, in every format: each is read or refused with a DataError, soon, within a gigabyte of memory."
import json, os, re, resource, signal, subprocess, sys, tempfile, time, warnings
from itertools import chain
from pathlib import Path
import numpy as np
import pytest

SECONDS = 5  # for one file, on a busy machine


# ---- undamaged files, one of each kind --------------------------------------------------------------------------

def originals(folder):
    "The recording of pydicom in every format; what is damaged later is the first file of each list, its neighbours stay whole."
    import wfdb
    from pydicom.data import get_testdata_file
    from ecgflowcmr.ecg import LEADS, read_ecg
    from ecgflowcmr.ecg_files import write_wfdb
    from ecgflowcmr.ecg_xml import write_aecg, write_cardiosoft, write_muse, write_sierra
    dcm = get_testdata_file('waveform_ecg.dcm', download=False)
    rest,kinds = read_ecg(dcm),{}
    def new(kind):
        (folder/kind).mkdir()
        return folder/kind
    for kind,write in (('cardiosoft', write_cardiosoft), ('muse', write_muse), ('aecg', write_aecg), ('sierra', write_sierra)):
        write(f := new(kind)/'rest.xml', rest)
        kinds[kind] = f
    write_sierra(f := new('sierra103')/'rest.xml', rest, version='1.03', compress=False)
    kinds['sierra103'] = f
    write_wfdb(new('header')/'rest', rest)
    kinds['header'] = folder/'header'/'rest.hea'
    write_wfdb(new('samples')/'rest', rest)
    kinds['samples'] = folder/'samples'/'rest.dat'
    wfdb.wrsamp('rest', fs=500, units=['mV']*12, sig_name=list(LEADS), p_signal=rest.mv.T.astype(float), fmt=['212']*12, write_dir=str(new('format212')))
    kinds['format212'] = folder/'format212'/'rest.hea'
    kinds['dicom'] = new('dicom')/'rest.dcm'
    kinds['dicom'].write_bytes(Path(dcm).read_bytes())
    kinds['csv'] = new('csv')/'rest.csv'
    np.savetxt(kinds['csv'], rest.mv.T, '%.3f', ',', header='# fs=500 unit=mV\n' + ','.join(LEADS), comments='')
    for kind in ('npy', 'json'):
        np.save(new(kind)/'rest.npy', rest.mv)
        (folder/kind/'rest.json').write_text(json.dumps(dict(fs=500, unit='mV', leads=LEADS)))
        kinds[kind] = folder/kind/f'rest.{kind}'
    return kinds, rest

HUGE = [b'99999999999', b'-1', b'0', b'nan', b'1e308', b'2147483648', b'18446744073709551615', b'', b'5000000', b'0.0000001']

def damaged(data, rng, k):
    "Copy number `k` of `data`, damaged in one of eight ways; much of the damage falls into the head."
    b,n = bytearray(data),len(data)
    at = lambda: int(rng.integers(0, min(n, 3000) if rng.random() < .6 else n))
    way = k % 8
    if way == 0: return bytes(b[:at()])
    if way in (1, 2):
        for _ in range(rng.integers(1, 12)): b[at()] ^= 1 << rng.integers(0, 8)
    if way == 3: b[(i := at()):i] = rng.bytes(rng.integers(1, 200))
    if way == 4: del b[(i := at()):i + rng.integers(1, 400)]
    if way == 5: b[(i := at()):i+4] = rng.choice([b'\xff\xff\xff\xff', b'\0\0\0\0', b'\xff\xff\xff\x7f', rng.bytes(4)])
    if way == 6: b[(i := at()):i] = b[(j := at()):j + rng.integers(1, 3000)]
    if way == 7:  # a number in the text becomes an impossible one
        found = [o.span() for o in re.finditer(rb'\d+(?:\.\d+)?', data[:4000])] or [(0, 1)]
        i,j = found[rng.integers(len(found))]
        b[i:j] = HUGE[rng.integers(len(HUGE))]
    return bytes(b)

def bombs():
    "Files that are made to hurt."
    laughs = '<!DOCTYPE r [<!ENTITY a "' + 'ha'*50 + '">' + ''.join(f'<!ENTITY a{k} "{("&a" + str(k-1 or "") + ";")*10}">' for k in range(1, 10)) + ']>'
    many = ' '.join(f'a{k}="1"' for k in range(200_000))
    for root in ('RestingECG', 'CardiologyXML', 'restingecgdata', 'AnnotatedECG'):
        yield f'{laughs}<{root}>&a9;</{root}>'.encode()
        yield f'<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><{root}>&x;</{root}>'.encode()
        yield f'<!DOCTYPE r [<!ENTITY % x SYSTEM "file:///dev/zero"> %x;]><{root}/>'.encode()
        yield f'<!DOCTYPE r SYSTEM "file:///dev/zero"><{root}/>'.encode()
        for n in (1000, 140_000, 2_000_000): yield f'<{root}>{"<a>"*n}{"</a>"*n}</{root}>'.encode()
        yield f'<{root} {many}/>'.encode()
        yield f'<{root}>{"<!--"*100_000}</{root}>'.encode()
        yield f'<{root}>{"x"*30_000_000}</{root}>'.encode()
        yield f'<{root} {"x"*4_000_000}="1"/>'.encode()
        yield f'{laughs}<{root}>&a9;</{root}>'.encode('utf-16')
    strip = '<CardiologyXML><StripData><SampleRate>{}</SampleRate><ChannelSampleCountTotal>{}</ChannelSampleCountTotal><Resolution units="uVperLsb">5</Resolution><WaveformData lead="I">{}</WaveformData></StripData></CardiologyXML>'
    for fs,n,x in ((500, 10**12, '1,2'), (1e-9, 5000, '1,2'), (500, 5_000_000, '1,'*5_000_000), (500, 2, '9'*5_000_000), ('nan', 5000, '1'), ('inf', 'inf', '1')): yield strip.format(fs, n, x).encode()
    yield b'rest 999999999 500 5000\n' + b'rest.dat 16 200 16 0 0 0 0 I\n'*12
    yield b'rest 12 500 5000\n' + b'rest.dat 16:999999999 200 16 0 0 0 0 I\n'*12
    yield b'rest 12 500 5000\n' + b'rest.dat 16x999999999 200 16 0 0 0 0 I\n'*12
    yield b'rest 12 500 5000\n' + b'/dev/zero 16 200 16 0 0 0 0 I\n'*12
    yield b'rest/999999999 12 500 5000\n'
    yield b'rest 12 500 5000\n' + b'a'*5_000_000
    yield b'I,II,V1\n' + b'1,2,3\n'*3_000_000
    yield b'I,II,' + b'V1,'*100_000 + b'\n1,2\n'
    yield b'# fs=500 unit=mV\nI,II,V1\n' + b'1,'*2_000_000
    yield b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (12, 99999999999), }".ljust(127) + b'\n' + bytes(1000)
    yield b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (12, 5000), }".ljust(127) + b'\n' + bytes(1000)
    yield b'\x1f\x8b' + bytes(100)
    yield b'#' * 4_000_000
    yield b'\n' * 4_000_000
    yield b' ' * 4_000_000


# ---- the worker: a process of its own ---------------------------------------------------------------------------

class TooSlow(BaseException): "Not an Exception: no reader may catch it."

def alarm(*_): raise TooSlow

def attempt(path, read_ecg, DataError, whole=None):
    "'read', 'refused', or what went wrong; and the seconds it took. What bears checksums must have those of the `whole` file."
    t = time.perf_counter()
    signal.alarm(SECONDS)
    try:
        ecg = read_ecg(path)
        ok = ecg.mv.shape[0] == 12 and ecg.mv.shape[1] >= 5000 and ecg.mv.dtype == np.float32 and np.isfinite(ecg.mv).all() and abs(ecg.mv).max() <= 1000
        json.dumps(ecg.meta)
        sums = lambda mv: np.rint(200*mv.astype(float)).sum(1) % 65536  # two flips may cancel: then the format cannot know
        ok = ok and (whole is None or np.array_equal(sums(ecg.mv), sums(whole)))
        out = 'read' if ok else f'wrongly read: {ecg.mv.shape}, {abs(ecg.mv).max()}'
    except DataError as e: out = 'refused' if 'rest' in str(e) and e.remedy else f'no name or remedy: {e}'
    except BaseException as e: out = f'{type(e).__name__}: {e}'
    finally: signal.alarm(0)
    return out, time.perf_counter() - t

def peak_mb():
    "Of this program alone: what `getrusage` says includes the process that started it."
    status = Path('/proc/self/status')
    return int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])/1024 if status.exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def worker(seed, share):
    "Damage every kind `share[kind]` times and throw the bombs; print what happened as JSON."
    from ecgflowcmr.ecg import DataError, read_ecg
    warnings.simplefilter('ignore')
    signal.signal(signal.SIGALRM, alarm)
    rng,counts,bad,slowest = np.random.default_rng(seed),{},[],('', 0)
    with tempfile.TemporaryDirectory() as d:
        kinds,_ = originals(Path(d))
        todo = ((kind, f, damaged(f.read_bytes(), rng, k)) for kind,f in kinds.items() for k in range(share))
        hurt,undamaged = Path(d)/'header'/'rest.hea',read_ecg(kinds['samples']).mv
        for kind,f,data in chain(todo, (('bomb', hurt, o) for o in bombs())):
            whole = f.read_bytes()
            f.write_bytes(data)
            target = f.with_suffix('.npy') if kind == 'json' else f
            out,t = attempt(target, read_ecg, DataError, undamaged if kind == 'samples' else None)
            if t > slowest[1]: slowest = (kind, t)
            if out not in ('read', 'refused'): bad.append((kind, out[:300], data[:200].hex()))
            counts.setdefault(kind, {}).setdefault(out if out in ('read', 'refused') else 'bad', 0)
            counts[kind][out if out in ('read', 'refused') else 'bad'] += 1
            f.write_bytes(whole)
    print(json.dumps(dict(counts=counts, bad=bad[:20], n_bad=len(bad), slowest=slowest, peak_mb=peak_mb())))

def run(seed, share):
    env = os.environ | {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg'}
    res = subprocess.run([sys.executable, __file__, str(seed), str(share)], env=env, capture_output=True, text=True, timeout=600)
    assert res.returncode == 0, res.stderr[-3000:]
    return json.loads(res.stdout.splitlines()[-1])

@pytest.mark.timeout(300)
def test_every_damaged_file_is_read_or_refused():
    out = run(0, 170)
    total = sum(n for o in out['counts'].values() for n in o.values())
    print(total, 'files', out)
    assert total >= 2000 and not out['n_bad'], out['bad']
    assert out['peak_mb'] < 1000 and out['slowest'][1] < SECONDS
    for kind,o in out['counts'].items():  # damage is neither always fatal nor never seen
        assert o.get('refused', 0) and (o.get('read', 0) or kind in ('bomb', 'json', 'sierra', 'samples')), (kind, o)


if __name__ == '__main__': worker(int(sys.argv[1]), int(sys.argv[2]))
