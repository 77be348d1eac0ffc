"""The report in a real browser: no message on its console, every image shown, nothing wider than a phone."""

import json
import queue
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from densekit.report.page.detection import Detection, Scores
from densekit.report.page.gallery import Shown
from densekit.report.page.page import page
from densekit.report.page.run_folder import Run
from densekit.report.page.segmentation import Segmentation

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason='no Chromium: tests/browser.sh installs it'),
]

LONG = 'a class of a very long name, with commas'

FLAGS = (
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run'),
    *('--enable-logging=stderr', '--v=0', '--window-size=1400,900'),
)

# Looks at the page from outside, as the page itself lets no other script in.
PROBE = """<!DOCTYPE html><title>probe</title><link rel="icon" href="data:,">
<iframe src="report.html" width="WIDTH" height="700"></iframe><script>
const frame = document.querySelector('iframe');
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const chart = page.querySelector('svg[data-frame]'), box = chart.getBoundingClientRect();
  chart.dispatchEvent(new view.PointerEvent('pointermove',
    {clientX: box.left + box.width * 0.6, clientY: box.top + 20, bubbles: true}));
  const hint = page.getElementById('hint');
  const button = [...page.querySelectorAll('th button')].find(b => b.textContent === 'AP');
  const first = () => button.closest('table').tBodies[0].rows[0].cells[0].textContent;
  const order = [first()];
  for (let i = 0; i < 2; i++) { button.click(); order.push(first()); }
  const pictures = page.querySelector('.pair img'), narrow = pictures.getBoundingClientRect().width;
  pictures.click();
  const larger = pictures.getBoundingClientRect().width / narrow;
  pictures.click();
  Promise.all([...page.images].map(image => image.decode())).then(() => 'all', error => String(error)).then(decoded => {
    const seen = {
      decoded, larger, images: page.images.length,
      shown: [...page.images].filter(i => i.naturalWidth > 1 && i.getBoundingClientRect().width > 20).length,
      lines: [...page.querySelectorAll('polyline')].filter(l => l.getTotalLength() > 0).length,
      polylines: page.querySelectorAll('polyline').length,
      width: root.scrollWidth, window: root.clientWidth,
      fetched: view.performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
      hint: hint.hidden ? null : hint.textContent, order,
      text: view.getComputedStyle(page.body).color, ground: view.getComputedStyle(page.body).backgroundColor,
    };
    fetch('/seen', {method: 'POST', body: JSON.stringify(seen)});
  });
};
</script>"""


def browse(address):
    """The page's elements once it is loaded, and what its console says."""
    done = subprocess.run(
        [BROWSER, *FLAGS, '--dump-dom', address], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, console(done.stderr)


def console(log):
    return [line for line in log.splitlines() if 'CONSOLE' in line]


def made_page():
    """A page with a part of every kind; names that would be markup are in it."""
    rng = np.random.default_rng(0)
    runs, found = [], []
    for title, name in (('A', 'first'), ('B', '<b>second</b>')):
        run = Run(title, name, None, environment='Python: 3', commands=['python tools/train.py ' + 'x' * 300])
        run.training = [
            {'iter': i, 'loss': 3 - i / 100 + rng.random(), 'loss_cls': 1.0, 'lr': 1e-3, 'time': 0.5, 'memory': 900.0}
            for i in range(1, 200)
        ]
        run.validation = [{'iter': i, 'step': i, 'coco/bbox_mAP': i / 300, 'mIoU': 50.0} for i in (100, 199)]
        run.groups = [{'name': f'layer_{i}', 'tensors': 3, 'initial_lr': 0.5**i, 'lr': 0.5**i} for i in range(9)]
        runs.append(run)
    pictures = [Shown('i.jpg', 'F1 0.5', *rng.integers(0, 255, (2, 40, 60, 3), dtype=np.uint8)) for _ in range(4)]
    classes = ['circle', '<b>', LONG]
    figures = [
        {'mAP': value, 'mAP_50': 0.7, 'mAP_75': -1.0, 'mAP_s': 0.2, 'mAP_m': 0.3, 'mAP_l': 0.4}
        for value in (0.4, 0.2, 0.6)
    ]
    scores = Scores(figures[0], dict(zip(classes, figures, strict=True)), np.linspace(1, 0, 3030).reshape(10, 101, 3))
    gains = dict.fromkeys(('Cls', 'Loc', 'Both', 'Dupe', 'Bkg', 'Miss', 'FP', 'FN'), 0.1)
    health = {'num_images': 9, 'num_annotations': 9, 'num_categories': 3, 'images_without_annotations': 0}
    detector = Detection(
        'x.pth', 9, 9, classes, dict.fromkeys(classes, 3), {'bbox': scores, 'segm': scores}, 'hotcoco', 0.3
    )
    detector.errors = {'delta_ap': gains, 'counts': dict.fromkeys(gains, 3), 'ap_base': 0.5}
    detector.confusion, detector.confused = rng.integers(0, 9, (4, 4)), [*classes, 'background']
    detector.health = {'summary': health, 'errors': ['<i>broken</i>'], 'warnings': []}
    detector.worst = detector.best = pictures
    many = [f'class {i}' for i in range(150)]
    iou = {'IoU': rng.random(150), 'Acc': rng.random(150), 'aAcc': np.asarray(0.5)}
    segmentor = Segmentation('y.pth', 9, 90, many, rng.integers(0, 99, (150, 150)), iou, [], pictures, pictures)
    found = [detector, segmentor]
    return page(runs, found)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('site')
    (folder / 'report.html').write_text(made_page(), encoding='utf-8')
    for width in (360, 1280):
        (folder / f'probe{width}.html').write_text(PROBE.replace('WIDTH', str(width)), encoding='utf-8')
    return folder


@pytest.fixture(scope='module')
def probe(folder):
    """Opens the page in a frame of some width, and returns what was seen there."""
    answers = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self):
            answers.put(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    def run(width, *options):
        address = f'http://127.0.0.1:{server.server_port}/probe{width}.html'
        browser = subprocess.Popen([BROWSER, *FLAGS, *options, address], stderr=subprocess.PIPE, text=True)
        try:
            seen = answers.get(timeout=90)
        finally:
            browser.terminate()
            log = browser.communicate(timeout=30)[1]
        assert console(log) == []
        return seen

    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield run
        server.shutdown()


def test_the_file_opens_without_a_message(folder):
    elements, messages = browse(f'file://{folder}/report.html')
    assert messages == []
    assert elements.rstrip().endswith('</html>') and 'Report of first and &lt;b&gt;second' in elements


def test_a_message_would_be_seen(folder):
    """Against a test that looks in the wrong place."""
    text = (folder / 'report.html').read_text()
    (folder / 'foreign.html').write_text(text.replace('</main>', '</main><script>alert(1)</script>'))
    (folder / 'fetching.html').write_text(text.replace('</main>', '</main><img src="http://127.0.0.1:9/x.png">'))
    for name in ('foreign', 'fetching'):
        (message,) = browse(f'file://{folder}/{name}.html')[1]
        assert 'Content Security Policy' in message


@pytest.mark.parametrize('width', [360, 1280])
def test_all_is_shown(probe, width):
    seen = probe(width)
    assert seen['decoded'] == 'all' and seen['shown'] == seen['images'] == 33  # 8 pairs of each, and one matrix
    assert seen['lines'] == seen['polylines'] > 20
    assert seen['width'] <= seen['window'] <= width
    assert seen['fetched'] == [] and seen['larger'] > 1.8
    assert re.match(r'iteration  \d+\nA  [\d.]+\nB  [\d.]+$', seen['hint'])
    assert seen['order'] == ['circle', LONG, '<b>']


def test_dark(probe):
    def luminance(colour):
        parts = np.array([int(v) / 255 for v in re.findall(r'\d+', colour)[:3]])
        return np.dot(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4), (0.2126, 0.7152, 0.0722)
        )

    for options, dark in (((), False), (('--force-dark-mode', '--blink-settings=preferredColorScheme=0'), True)):
        seen = probe(1280, *options)
        text, ground = luminance(seen['text']), luminance(seen['ground'])
        assert bool(text > ground) is dark
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) > 7
