"The reading room clicked through in Chromium, its blinding over many shuffles, and the reader-study experiments at the smoke preset."
import contextlib, json, os, shutil, socket, subprocess, time, urllib.error, urllib.request
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from ecgflowcmr.cohort import build_virtual_cohort
from ecgflowcmr.ecg import DataError
from ecgflowcmr.readers import read_answers, reader_study, turing_study, write_study

ROOT = Path(__file__).resolve().parents[1]
BINARY = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome')) if p), None)
DRIVER = shutil.which('chromedriver')
chromium = pytest.mark.skipif(not (BINARY and DRIVER), reason='no Chromium with ChromeDriver here (Debian: apt-get install chromium chromium-driver): the page is not clicked through')


class Browser:
    "Headless Chromium, by ChromeDriver's own protocol (W3C WebDriver)."
    def __init__(self, folder):
        with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
        self.url, self.base, self.downloads = f'http://127.0.0.1:{port}', '', folder/'downloads'
        self.process = subprocess.Popen([DRIVER, f'--port={port}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(150):
            with contextlib.suppress(OSError): urllib.request.urlopen(f'{self.url}/status', timeout=2); break
            time.sleep(.1)
        args = '--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --window-size=1280,900'.split()
        options = dict(args=[*args, f'--user-data-dir={folder/"profile"}'], binary=BINARY, prefs={'download.default_directory': str(self.downloads), 'download.prompt_for_download': False})
        caps = {'goog:chromeOptions': options, 'goog:loggingPrefs': {'browser': 'ALL'}}
        self.base = '/session/' + self.call('POST', '/session', dict(capabilities=dict(alwaysMatch=caps)))['sessionId']

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + self.base + path, data, {'Content-Type': 'application/json'}, method=method)
        try: return json.load(urllib.request.urlopen(request, timeout=60))['value']
        except urllib.error.HTTPError as e: raise RuntimeError(e.read().decode()[:400]) from None

    def do(self, path, **body): return self.call('POST', path, body)
    def js(self, script, *args): return self.do('/execute/sync', script=script, args=list(args))
    def element(self, css): return next(iter(self.do('/element', using='css selector', value=css).values()))
    def click(self, css): self.do(f'/element/{self.element(css)}/click')
    def type(self, css, text): self.do(f'/element/{self.element(css)}/value', text=text)
    def text(self, css): return self.js('return document.querySelector(arguments[0]).innerText', css)
    def keys(self, text): self.do('/actions', actions=[dict(type='key', id='k', actions=[dict(type=t, value=c) for c in text for t in ('keyDown', 'keyUp')])])

    def touch(self, css, dx=0):
        "Tap the middle of an element, or draw across it."
        x, y = self.js('const r = document.querySelector(arguments[0]).getBoundingClientRect(); return [Math.round(r.x + r.width/2), Math.round(r.y + r.height/2)]', css)
        moves = [dict(type='pointerMove', duration=0, x=x, y=y), dict(type='pointerDown', button=0)] + [dict(type='pointerMove', duration=30, x=x + dx*k//4, y=y) for k in range(1, 5) if dx] + [dict(type='pointerUp', button=0)]
        self.do('/actions', actions=[dict(type='pointer', id='finger', parameters=dict(pointerType='touch'), actions=moves)])

    def open(self, page):
        self.do('/url', url=page.as_uri())
        self.wait("return document.body.dataset.ready === 'yes' || !document.getElementById('broken').hidden")

    def wait(self, script):
        for _ in range(100):
            if (v := self.js(script)): return v
            time.sleep(.05)
        raise AssertionError(f'never true: {script}')

    def close(self):
        with contextlib.suppress(Exception): self.call('DELETE', '')
        self.process.terminate(); self.process.wait(10)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    b = Browser(tmp_path_factory.mktemp('chromium'))
    yield b
    b.close()


def discs(n, seed, t=10, side=24):
    "Beating discs `(n, t, side, side)` uint8."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    r = 6 + 2*np.cos(2*np.pi*np.arange(t)/t)[:, None, None]
    return np.stack([np.clip(150*(np.hypot(x - rng.normal(12, 1), y - rng.normal(12, 1)) < r) + 40 + 9*rng.normal(size=(t, side, side)), 0, 255) for _ in range(n)]).astype(np.uint8)


@chromium
def test_a_whole_session(browser, tmp_path):
    study = turing_study(discs(3, 0), discs(3, 1), seed=5, repeats=2, pixel_mm=1.8, fps=25.)
    page, items = write_study(study, tmp_path/'study'), study.protocol['sessions'][0]['items']
    browser.open(page)
    assert browser.js('return Array.from(cines)') == study.cines.swapaxes(0, 1).ravel().tolist(), 'the pixels arrive as they were'
    browser.type('#reader', 'Dr. Smith')
    assert browser.js("return document.getElementById('begin').disabled"), 'no names'
    browser.js("document.getElementById('reader').value = ''")
    browser.type('#reader', 'r1')
    browser.click('#begin')
    assert '5 cm' in browser.text('#scale') and abs(browser.js("return document.getElementById('scale').offsetWidth / document.getElementById('cine').clientWidth") - 50/1.8/24) < .02
    said = {}
    frame = lambda: browser.js('return frame')
    first = frame(); browser.wait(f'return frame !== {first}')                          # it plays
    browser.keys(' '); at = frame(); time.sleep(.25); assert frame() == at               # space: pause
    browser.keys(chr(0xE014)); assert frame() == (at + 1) % 10                           # right arrow
    browser.keys(chr(0xE012)*2); assert frame() == (at - 1) % 10                         # left arrow, twice
    browser.touch('#cine'); assert browser.js('return playing')                          # tap: play
    browser.touch('#cine', 40); assert not browser.js('return playing')                  # draw across: step
    browser.keys('3'); assert '0 of 8' in browser.text('#where'), 'a confidence without an answer is none'
    for k, item in enumerate(items[:4]):                                                 # by keyboard
        said[item['id']] = ('generated' if k % 2 else 'real', k + 1)
        browser.keys('g' if k % 2 else 'r'); browser.keys(str(k + 1))
    assert '4 of 8' in browser.text('#where') and browser.js("return document.getElementById('progress').value") == 4
    browser.keys('b'); browser.keys('g'); browser.keys('5'); said[items[3]['id']] = ('generated', 5)   # back, and another answer
    browser.open(page)                                                                   # the page is closed and opened again
    browser.type('#reader', 'r1')
    assert '4 of 8 answers' in browser.text('#found')
    browser.click('#begin')
    for item in items[4:]:                                                               # by mouse
        browser.click('#choices button[value=real]'); browser.click('#levels button[value="2"]'); said[item['id']] = ('real', 2)
    browser.wait("return !document.getElementById('done').hidden")
    browser.click('#save')
    for _ in range(100):
        if saved := list(browser.downloads.glob('answers_r1_*.csv')): break
        time.sleep(.05)
    assert saved[0].read_bytes().decode().replace('\r\n', '\n') == browser.js("return document.getElementById('csv').value.replaceAll('\\r\\n', '\\n')")
    (tmp_path/'answers').mkdir(); shutil.copy(saved[0], tmp_path/'answers')
    t = read_answers(tmp_path/'answers', tmp_path/'study').set_index('item')
    assert {i: (a, c) for i, a, c in zip(t.index, t['answer'], t['confidence'])} == said
    assert (t['truth'] == [study.key['items'][i]['truth'] for i in t.index]).all() and t['seconds'].between(0, 60).all() and t.loc[items[0]['id'], 'seconds'] > .25 and t['answered'].notna().all()
    log = browser.do('/se/log', type='browser')
    assert not log, log
    assert browser.js("return performance.getEntriesByType('resource').length") == 0, 'nothing was fetched'


@chromium
def test_wash_out_and_both_pictures(browser, tmp_path):
    strips = 200*np.random.default_rng(0).normal(size=(4, 12, 5000)).astype('f4')/1000
    study = reader_study(strips, discs(4, 1), discs(4, 0), [1, 1, 0, 0], seed=1, washout_days=28)
    page = write_study(study, tmp_path/'study')
    browser.open(page); browser.type('#reader', 'r2'); browser.click('#begin')
    assert browser.js("return document.getElementById('cine-view').hidden && !document.getElementById('ecg-view').hidden")
    drawn = browser.js("const c = document.getElementById('ecg'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return [c.width, c.height, d[0], d[1], d[2]]")
    colour = study.protocol['ecg']['palette'][study.ecgs[study.protocol['sessions'][0]['items'][0]['ecg'], 0, 0]]
    assert drawn == [1060, 440, *(int(colour[i:i+2], 16) for i in (1, 3, 5))]
    for _ in range(4): browser.keys('y'); browser.keys('4')
    assert browser.js("return !document.getElementById('pause').hidden && document.getElementById('go').disabled"), 'closed until the wash-out is over'
    assert '28 days' in browser.text('#pause-text')
    browser.js("const k = 'reading ' + HASH.slice(0, 16) + ' r2', a = JSON.parse(localStorage[k]); for (const v of Object.values(a)) v.answered = '2026-01-01T00:00:00Z'; localStorage[k] = JSON.stringify(a)")
    browser.open(page); browser.type('#reader', 'r2'); browser.click('#begin'); browser.click('#go')
    assert browser.js("return !document.getElementById('cine-view').hidden && !document.getElementById('ecg-view').hidden")
    assert browser.js("return document.getElementById('back').disabled"), 'an earlier session is closed'


@chromium
@pytest.mark.parametrize('change, said', [(('"fps":50.0', '"fps":5.0'), 'protocol was changed'), (('id="cines">eJ', 'id="cines">eK'), 'pictures are damaged')])
def test_an_edited_page_is_refused(browser, tmp_path, change, said):
    page = write_study(turing_study(discs(2, 0), discs(2, 1)), tmp_path)
    html = page.read_text()
    assert change[0] in html
    page.write_text(html.replace(*change)); browser.open(page)
    assert said in browser.text('#why') and not browser.js("return document.getElementById('start').offsetWidth")


def test_no_place_tells():
    "Over many seeds, generated items are anywhere: in the order of showing, in the file, in the alphabet of their names."
    real, made = discs(4, 0, 2, 8), discs(4, 1, 2, 8)
    counts = np.zeros(3)
    for seed in range(400):
        s = turing_study(real, made, seed=seed)
        items = s.protocol['sessions'][0]['items']
        is_made = [s.key['items'][i['id']]['truth'] == 'generated' for i in items]
        counts += [is_made[0], is_made[int(np.argmin([i['cine'] for i in items]))], is_made[int(np.argmin([i['id'] for i in items]))]]
        assert all(set(i) == {'id', 'cine'} for i in items)
    assert (abs(counts - 200) < 45).all(), counts                                        # 4.5 standard deviations


def test_same_pixels_same_page_but_for_the_key():
    "Real and generated exchanged: the page holds the same pictures, and only the key knows."
    a, b = discs(3, 0), discs(3, 1)
    one, two = turing_study(a, b), turing_study(b, a)
    assert sorted(x.tobytes() for x in one.cines) == sorted(x.tobytes() for x in two.cines)
    truth = lambda s: {s.cines[i['cine']].tobytes(): s.key['items'][i['id']]['truth'] for i in s.protocol['sessions'][0]['items']}
    assert all(truth(two)[k] != v for k, v in truth(one).items())


@pytest.fixture(scope='module')
def cohort(tmp_path_factory): return build_virtual_cohort(tmp_path_factory.mktemp('patients')/'c', 30, seed=7, people='cm', workers=1, progress=False).folder


@pytest.fixture(scope='module')
def run():
    name = f'test-readers-{os.getpid()}'
    yield ROOT/'runs'/name
    shutil.rmtree(ROOT/'runs'/name, ignore_errors=True)


@pytest.mark.slow
def test_turing_test(run, cohort, papermill_run, cells):
    knobs = dict(preset='smoke', run=run.name, cohort=str(cohort), bundle='shipped', n=2, repeats=1, machines=2, examples=6)
    papermill_run('43_turing_test.ipynb', **knobs)
    table = pd.read_csv(run/'figures'/'turing.csv')
    assert table['reader'].tolist() == ['machine 1', 'machine 2', 'all'] and set(table['read_by']) == {'machine readers'} and table['accuracy'].between(0, 1).all()
    people = run/'people'
    people.mkdir()
    for name, file in zip(('anna', 'bert'), sorted((run/'turing'/'machine_answers').glob('*.csv'))):   # people's answers drop in
        pd.read_csv(file, dtype=str).assign(reader=name, answer='real', confidence='1').to_csv(people/f'{name}.csv', index=False)
    cells('43_turing_test.ipynb', **knobs, answers=str(people))
    table = pd.read_csv(run/'figures'/'turing.csv')
    assert table['reader'].tolist() == ['reader 1', 'reader 2', 'all'] and set(table['read_by']) == {'people'} and (table['accuracy'] == .5).all()
    note = json.loads((run/'figures'/'turing.json').read_text())['made_by']
    assert note['readers'] == 2 and 'anna' not in json.dumps(note), 'readers are numbered in what is kept'
    file = run/'turing'/'protocol.json'
    file.write_text(file.read_text().replace('"fps": 50.0', '"fps": 20.0'))
    with pytest.raises(DataError, match='was edited'): read_answers(people, run/'turing')


@pytest.mark.slow
def test_reader_study(run, cohort, papermill_run):
    papermill_run('66_reader_study.ipynb', preset='smoke', run=run.name, cohort=str(cohort), bundle='shipped', n=6, machines=2)
    table = pd.read_csv(run/'figures'/'reader_study.csv')
    assert len(table) == 3*(2 + 1) and table['reader'].unique().tolist() == ['machine 1', 'machine 2', 'all'] and table['AUC'].between(0, 1).all()
    key = json.loads((run/'reader_study'/'key.json').read_text())['items']
    assert len(key) == 18 and len({k['case'] for k in key.values()}) == 6


def test_more_cines_than_there_are(run, cohort, refusal):
    assert 'Ask for at most' in str(refusal('43_turing_test.ipynb', preset='smoke', run=run.name, cohort=str(cohort), bundle='shipped', n=400))
