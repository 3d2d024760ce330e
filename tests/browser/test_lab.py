"Notebooks in JupyterLab and Chromium, as somebody at a screen would use them"
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHOTS = Path(__file__).with_name('screenshots') # ignored by git
QUIET = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
HARMLESS = r'ResizeObserver loop|LSP connection|Connection lost, reconnecting' # of JupyterLab itself

def write_notebook(
    fname:Path, # ipynb
    *cells:str, # code
) -> Path:      # the same
    "A notebook of code cells."
    code = [dict(cell_type='code', id=f'cell{i}', metadata={}, source=c, outputs=[], execution_count=None) for i,c in enumerate(cells)]
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    fname.write_text(json.dumps(dict(cells=code, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return fname

@pytest.fixture(scope='module')
def chromium():
    playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright: it is in the dev extra')
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None: pytest.skip('no chromium on this machine')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()

class Lab:
    "A server with a root folder of its own, and one for what notebooks put into temporary folders."
    def __init__(self, tmp:Path, port:int): self.root, self.files, self.url = tmp/'root', tmp/'files', f'http://127.0.0.1:{port}'

@pytest.fixture(scope='module')
def lab(chromium, tmp_path_factory):
    tmp = tmp_path_factory.mktemp('lab')
    for name,value in (('apputils-extension/notification', dict(fetchNews='false', checkForUpdates=False)),
                       ('notebook-extension/tracker', dict(windowingMode='none'))): # all cells are in the page
        fname = tmp/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        fname.parent.mkdir(parents=True)
        fname.write_text(json.dumps(value))
    (tmp/'root').mkdir()
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    own = {k: str(tmp/k) for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR', 'KSHOT_HOME')}
    (tmp/'files').mkdir()
    env = os.environ | own | dict(JUPYTERLAB_SETTINGS_DIR=str(tmp/'settings'), TMPDIR=str(tmp/'files'), OMP_NUM_THREADS='1')
    options = f'--no-browser --allow-root --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token= --ServerApp.password=' \
              f' --ServerApp.disable_check_xsrf=True --ServerApp.root_dir={tmp/"root"}'.split()
    with open(tmp/'lab.log', 'w') as log:
        server = subprocess.Popen([Path(sys.executable).with_name('jupyter'), 'lab', *options], env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(f'http://127.0.0.1:{port}/api', server, tmp/'lab.log')
            yield Lab(tmp, port)
        finally:
            server.terminate()
            try: server.wait(10)
            except subprocess.TimeoutExpired: server.kill() # kernels end with it

def _wait_for(url, server, log):
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try: return urllib.request.urlopen(url, timeout=1)
        except OSError: time.sleep(.1)
    raise TimeoutError(log.read_text())

class Notebook:
    "A page with a notebook in it."
    def __init__(self, page, name): self.page, self.name, self.errors, self.asked = page, name, [], set()

    def run_all(self):
        for _ in range(3): # cells that are run before the page has its kernel are dropped without a word
            self.page.get_by_role('menuitem', name='Run', exact=True).click()
            self.page.get_by_role('menuitem', name=re.compile('^Run All Cells')).click()
            self.page.wait_for_timeout(1000)
            if self.page.locator('.jp-InputPrompt', has_text=re.compile(r'\[(\*|\d+)\]')).count(): return
        raise AssertionError('no cell runs')

    def wait(self, selector, timeout=90): return self.page.wait_for_selector(selector, timeout=timeout*1000)

    def wait_idle(self, timeout=240):
        self.wait('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout)

    def shot(self, what):
        SHOTS.mkdir(exist_ok=True)
        self.page.wait_for_timeout(800) # what plotly draws in several strokes
        self.page.screenshot(path=SHOTS/f'{self.name}_{what}.png')

def _hold(socket, held):
    text = lambda m: m if isinstance(m, bytes) else m.encode()
    server = socket.connect_to_server()
    server.on_message(lambda m: held.append((socket, m)) if b'create_subshell_reply' in text(m) else socket.send(m))

@pytest.fixture
def notebook(lab, chromium):
    "Function that opens a notebook of the lab; in the end there must be no error in the console and no request to another machine."
    opened = []
    def open_notebook(fname, width=1200, height=1000, held=None): # `held` gets the answers to JupyterLab's wish for a subshell, instead of it
        page = chromium.new_page(viewport=dict(width=width, height=height))
        if held is not None: page.route_web_socket(re.compile('/api/kernels/'), lambda socket: _hold(socket, held))
        nb = Notebook(page, Path(fname).stem)
        page.set_default_timeout(90_000)
        page.on('console', lambda m: nb.errors.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda e: nb.errors.append(str(e)))
        page.on('request', lambda r: nb.asked.add(r.url))
        page.goto(f'{lab.url}/doc/tree/{fname}?reset', timeout=90_000)
        nb.wait('.jp-NotebookPanel .jp-CodeCell')
        nb.wait('text=/\\| Idle/') # of the kernel, in the status bar
        page.wait_for_timeout(1500)
        opened.append(nb)
        return nb
    yield open_notebook
    for nb in opened:
        nb.shot('end')
        nb.page.close()
        assert not [e for e in nb.errors if not re.search(HARMLESS, e)]
        assert not [u for u in nb.asked if re.match('http|ws', u) and not re.match(rf'\w+://{lab.url.partition("//")[2]}/', u)]

EXPLORER = '''
import torch
from kshot.lab.explore import CodeExplorer
from kshot.simplex import SimplexNet
from kshot.benchmark import get_space
torch.manual_seed(0)
space = get_space('digits')
explorer = CodeExplorer(space, SimplexNet(space, 4))
display(explorer)
'''
AGAIN = 'display(explorer)' # a second view of the same object

def plots(nb:Notebook, what:str) -> list: # `what` of each plotly figure `g` in the page
    return nb.page.evaluate(f"() => [...document.querySelectorAll('.js-plotly-plot')].map(g => {what})")

def until(nb:Notebook, condition:str, seconds:float=60): nb.page.wait_for_function(condition, timeout=seconds*1000)

def test_code_explorer(lab, notebook):
    write_notebook(lab.root/'explorer.ipynb', EXPLORER, AGAIN)
    nb = notebook('explorer.ipynb', height=1300)
    nb.run_all()
    nb.wait('.js-plotly-plot .main-svg')
    until(nb, "() => document.querySelectorAll('.js-plotly-plot').length == 4")
    nb.wait_idle()
    titles = lambda: plots(nb, 'g.layout.title?.text')
    bars = lambda: plots(nb, 'g.data.length > 5 ? Array.from(g.data[1].y) : null')[0]
    assert titles() == ['Code of 0000', 'Path 0000']*2
    before = bars()
    nb.page.locator('.widget-toggle-button', has_text='conv3').first.click()
    until(nb, "() => [...document.querySelectorAll('.js-plotly-plot')].every(g => g.layout.title?.text?.endsWith('2000'))") # both views
    after = bars()
    assert len(after) == 4 and abs(sum(after) - 1) < 1e-5 and before != after
    nb.shot('op_changed')
    nb.page.locator('.widget-text input').first.fill('4321')
    nb.page.keyboard.press('Enter')
    until(nb, "() => document.querySelector('.js-plotly-plot').layout.title?.text == 'Code of 4321'")
    nb.page.locator('.widget-text input').first.fill('43210')
    nb.page.keyboard.press('Enter')
    nb.wait('text=/path .*expected 4/')
    nb.shot('no_path')
    nb.page.set_viewport_size(dict(width=700, height=1300))
    until(nb, "() => [...document.querySelectorAll('.js-plotly-plot')].every(g => g._fullLayout.width < 640 && g._fullLayout.width <= g.parentElement.clientWidth)")
    assert plots(nb, 'g.layout.height')[0] == 720 # panels below each other
    nb.shot('narrow')

def test_restarted_kernel_is_told(lab, notebook):
    write_notebook(lab.root/'restart.ipynb', EXPLORER)
    nb = notebook('restart.ipynb')
    nb.run_all()
    nb.wait('.js-plotly-plot .main-svg')
    nb.wait_idle()
    nb.page.get_by_role('menuitem', name='Kernel', exact=True).click()
    nb.page.get_by_role('menuitem', name=re.compile('^Restart Kernel…')).click()
    nb.page.locator('.jp-Dialog button', has_text='Restart').click()
    nb.wait('text=The kernel was restarted: run this cell again.')
    nb.shot('told')

TRAINING = '''
from kshot.data import digits_data
from kshot.lab.live import LiveCallback
from kshot.networks import digits_net
from kshot.train import cosine, kshot_learner
live = LiveCallback()
learn = kshot_learner(digits_net(), get_space('digits'), digits_data(passes=25), K=2)
display(live.open()) # a view here, and one where it is trained
'''
FIT = "learn.fit(5, cbs=[cosine(.05), live])"
SEEN = "print('seen', live.log[-1]['update'], 'updates,', live.panel.word)"

def test_views_closed_while_training(lab, notebook):
    write_notebook(lab.root/'closed.ipynb', TRAINING, FIT, SEEN)
    nb = notebook('closed.ipynb')
    nb.run_all()
    until(nb, "() => [...document.querySelectorAll('.kshot-panel .widget-html')].filter(o => /epoch \\d of 5/.test(o.textContent)).length == 2", 60)
    said = nb.page.evaluate("() => [...document.querySelectorAll('.kshot-panel .widget-html')].map(o => o.textContent)")
    assert len(said) == 2 and len(set(said)) == 1 # both say the same
    nb.page.get_by_role('menuitem', name='Edit', exact=True).click()
    nb.page.get_by_role('menuitem', name=re.compile('^Clear Outputs of All Cells')).click()
    nb.wait('text=/seen 1000 updates, done in/', 180)
    late = [e for e in nb.errors if e.startswith('Error setting state')] # plotly draws into closed views, until the kernel has heard that they are
    assert len(late) <= 4 # it would be a dozen if it had not
    nb.errors[:] = [e for e in nb.errors if e not in late]

def test_a_page_that_spoke_too_early(lab, notebook):
    "What it said before there was a subshell waits for the end of the cell; it says it again."
    write_notebook(lab.root/'early.ipynb', '''
from kshot.lab.widgets import Window
window, heard = Window(), []
window.observe(lambda change: heard.append(change.new), 'width')
display(window)
''', '''
import time
while not heard: time.sleep(.1)
print(f'{len(heard)} heard while busy')
''')
    nb = notebook('early.ipynb', held=(held := []))
    nb.run_all()
    nb.wait('.jp-Cell:nth-of-type(2) .jp-InputPrompt:text("[*]:")')
    nb.page.wait_for_timeout(1500)
    assert held
    for socket,answer in held: socket.send(answer)
    nb.wait('text=1 heard while busy', 30)

# whether the buttons of a figure `g` lie over its title
BUTTONS_OVER_TITLE = """(() => { const [a, b] = ['.modebar', '.gtitle'].map(s => g.querySelector(s).getBoundingClientRect());
    return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom })()"""

def drag(nb:Notebook, plot, x, y):
    "A box over a plot, in data coordinates."
    a, b, c, d = plot.evaluate("""(g, [x, y]) => { const r = g.querySelector('.nsewdrag').getBoundingClientRect(), {xaxis, yaxis} = g._fullLayout;
        return [...x.map(v => r.left+xaxis.d2p(v)), ...y.map(v => r.top+yaxis.d2p(v))] }""", [x, y])
    nb.page.mouse.move(a, c)
    nb.page.mouse.down()
    nb.page.mouse.move(b, d, steps=8)
    nb.page.mouse.up()

def brush(nb:Notebook):
    "Boxes over the hills of one run and of the truth: what is chosen lies in the box."
    panel = nb.page.locator('.kshot-panel').filter(has_text='Accuracy over all paths').first
    hills = panel.locator('.js-plotly-plot').filter(has_text='Accuracy over all paths').first
    hills.scroll_into_view_if_needed()
    ends = lambda name: [float(v) for v in panel.locator('.widget-slider', has_text=name).locator('.widget-readout').inner_text().split('–')]
    told = panel.locator('.widget-html').first
    def choose(x, y): # number of paths
        was = told.inner_text()
        drag(nb, hills, x, y)
        nb.page.wait_for_function('([o, was]) => o.innerText != was', arg=[told.element_handle(), was], timeout=20_000)
        was = told.inner_text()
        nb.page.wait_for_timeout(700)
        assert told.inner_text() == was # though sliders round
        return int(was.split()[0].replace(',', ''))
    halves = hills.evaluate("g => g.data.filter(t => t.mode == 'lines' && !t.fill).map(t => Array.from(t.x).slice(0, 2))") # middle halves
    whole, whole_alone, (low, high) = ends('supernet'), ends('stand-alone'), hills.evaluate('g => g._fullLayout.xaxis.range')
    pixel = (high-low)/hills.locator('.nsewdrag').first.bounding_box()['width']
    is_near = lambda a, b: all(abs(u-v) < 2*pixel+.001 for u,v in zip(a, b, strict=True))

    n = choose(halves[0], (1.75, 1.05)) # the upper one of two hills
    assert is_near(ends('supernet'), halves[0]) and ends('stand-alone') == whole_alone and abs(n-313) < 30
    nb.shot('brushed')
    n = choose(halves[1], (1.2, -.05)) # the lower one, and a little of the other
    assert is_near(ends('stand-alone'), halves[1]) and ends('supernet') == whole and abs(n-313) < 30
    assert choose(((whole[1]+high)/2, high-3*pixel), (1.75, 1.05)) == 0 # beside the upper one
    assert ends('supernet') == [whole[1]]*2 and ends('stand-alone') == whole_alone
    nb.shot('beside')

def test_quickstart(lab, notebook):
    for folder in ('tutorials', 'images'): shutil.copytree(ROOT/'nbs'/folder, lab.root/folder)
    nb = notebook('tutorials/quickstart.ipynb', height=1400)
    page, button = nb.page, lambda name: nb.page.locator('.kshot-panel button', has_text=name)
    nb.run_all()

    button('Pause').click(timeout=120_000) # the cell is running all the time
    paused = nb.wait('text=/paused after update [\\d,]+/').inner_text()
    nb.shot('paused')
    page.wait_for_timeout(1500)
    assert nb.wait('text=/paused after update/').inner_text() == paused
    page.set_viewport_size(dict(width=700, height=1400))
    nb.shot('live_narrow')
    page.set_viewport_size(dict(width=1200, height=1400))
    button('Resume').click()
    nb.wait('text=/training, epoch/')
    page.wait_for_timeout(4000)
    nb.shot('live')
    button('Stop and save').click()
    said = nb.wait('text=/stopped after epoch \\d+ of 20, saved in/').inner_text()
    n = int(re.search(r'stopped after epoch (\d+)', said)[1])
    assert max(lab.files.glob('quickstart_*/checkpoint/epoch_*.safetensors')).stem == f'epoch_{n:05}'
    assert button('Pause').is_disabled() and button('Stop and save').is_disabled()

    nb.wait('.widget-select select', 240)
    nb.wait_idle()
    plot = lambda title: page.locator('.js-plotly-plot').filter(has_text=title).first
    page.locator('.widget-toggle-button', has_text='conv3').first.scroll_into_view_if_needed()
    before = plot('Code of').evaluate('g => Array.from(g.data[1].y)')
    text = page.locator('.widget-text input').first
    now = text.input_value()
    other = {'2': 'dw5'}.get(now[0], 'conv3') # an op that is not the one at the first block
    page.locator('.widget-toggle-button', has_text=other).first.click()
    until(nb, f"() => [...document.querySelectorAll('.js-plotly-plot')].some(g => g.layout.title?.text == 'Code of {dict(dw5=4).get(other, 2)}{now[1:]}')")
    after = plot('Code of').evaluate('g => Array.from(g.data[1].y)')
    assert before != after and abs(sum(after) - 1) < 1e-5
    nb.shot('op_changed')

    brush(nb)
    plot('Kendall tau').scroll_into_view_if_needed()
    nb.shot('ranked')
    assert not any(plots(nb, BUTTONS_OVER_TITLE))
    assert not page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').count()

SEARCH = '''
import threading
from kshot.lab.live import LiveSearch
from kshot.search import Search
from kshot.space import Block, Space
space, tick = Space('toy', tuple(Block(f'b{l}', tuple('0123')) for l in range(4))), threading.Event()
seen = []
def score(path):
    seen.append(path)
    tick.wait(.1 if len(seen) < 50 else 2) # 5 minutes in all: the test stops it long before
    return -sum((o-1)**2 for o in path)
live = LiveSearch(take=lambda path: space.format(path)[::-1])
search = Search(space, costs=dict(macs=lambda path: 1 + int(space.format(path), 4)), budgets=dict(macs=200))
'''

def test_live_search(lab, notebook):
    write_notebook(lab.root/'search.ipynb', SEARCH, "frame = search.run(score, 190, 'random', progress=live)",
                   "print('took', live.subnet, 'of', live.path, 'after', len(frame))")
    nb = notebook('search.ipynb')
    page, button = nb.page, lambda name: nb.page.locator('.kshot-panel button', has_text=name)
    nb.run_all()
    until(nb, "() => document.querySelector('.js-plotly-plot')?.data[0]?.x.length > 12", 90)
    corner = "g => { const l = g._fullLayout, b = g.getBoundingClientRect(), t = g.data[{0}], i = {1}; return [t.text[i]," \
             " b.x + l._size.l + l.xaxis.l2p(t.x[i]), b.y + l._size.t + l.yaxis.l2p(t.y[i])] }"
    front = page.locator('.js-plotly-plot').first
    for trace,i in ((0, 5), (1, 0)): # a path, and one that lies under the front, while others are being scored
        for _ in range(10): # a path may move while the pointer comes
            text, x, y = front.evaluate(corner.replace('{0}', str(trace)).replace('{1}', str(i)))
            page.mouse.move(x, y)
            page.wait_for_timeout(300)
            page.mouse.click(x, y)
            page.wait_for_timeout(900)
            if front.evaluate('g => g.data[2]?.name') == f'chosen: {text}': break
        else: raise AssertionError(f'{text} was not chosen')
    button('Extract').click()
    nb.wait('text=/is now/')
    button('Pause').click()
    nb.wait('text=/paused after \\d+ paths/')
    nb.shot('paused')
    button('Resume').click()
    button('Stop').click()
    nb.wait('text=/stopped: \\d+ of 190 paths/')
    nb.wait(f'text=/took {text[::-1]} of .{", ".join(text)}. after \\d+/')
