"Chromium, JupyterLab and the notebooks in it, as somebody at a screen uses them"
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

SHOTS = Path(__file__).with_name('screenshots') # ignored by git
QUIET = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update']
HARMLESS = r'ResizeObserver loop|LSP connection|Connection lost, reconnecting' # errors of JupyterLab itself
SETTINGS = {
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    'notebook-extension/tracker': dict(windowingMode='none'), # all cells are in the page
}

def write_notebook(
    fname:Path, # ipynb
    *cells:str, # code
) -> Path:      # the same
    "Write a notebook of code cells."
    blank = dict(cell_type='code', metadata={}, outputs=[], execution_count=None)
    code = [blank | dict(id=f'cell{i}', source=c) for i,c in enumerate(cells)]
    kernel = dict(name='python3', display_name='Python 3', language='python')
    notebook = dict(cells=code, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    fname.write_text(json.dumps(notebook))
    return fname

@pytest.fixture(scope='module')
def chromium():
    "A browser"
    reason = 'needs playwright: it is in the dev extra'
    playwright = pytest.importorskip('playwright.sync_api', reason=reason)
    paths = map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))
    path = next(filter(None, paths), None)
    if path is None: pytest.skip('no chromium on this machine')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()

class Lab:
    "A JupyterLab server with a root folder of its own, and one for temporary files of its notebooks."
    def __init__(self, folder:Path):
        self.root = folder/'root'
        self.files = folder/'files'
        self.log = folder/'lab.log'
        self.folder = folder
        self.port = free_port()
        self.url = f'http://127.0.0.1:{self.port}'
        self.root.mkdir()
        self.files.mkdir()
        for name,values in SETTINGS.items():
            fname = folder/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
            fname.parent.mkdir(parents=True)
            fname.write_text(json.dumps(values))

    def start(self) -> subprocess.Popen:
        options = dict(port_retries=0, disable_check_xsrf=True, root_dir=self.root)
        args = [f'--ServerApp.{k}={v}' for k,v in options.items()]
        args += ['--IdentityProvider.token=', '--ServerApp.password=']
        args += ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={self.port}']
        own = 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'IPYTHONDIR', 'KSHOT_HOME'
        env = os.environ | {k: str(self.folder/k) for k in own}
        env |= dict(JUPYTERLAB_SETTINGS_DIR=str(self.folder/'settings'), TMPDIR=str(self.files))
        env |= dict(OMP_NUM_THREADS='1')
        jupyter = Path(sys.executable).with_name('jupyter')
        with open(self.log, 'w') as log:
            return subprocess.Popen([jupyter, 'lab', *args], env=env, stdout=log, stderr=subprocess.STDOUT)

    def set_theme(self, name:str): # for pages that open from now on
        fname = self.folder/'settings'/'@jupyterlab'/'apputils-extension'/'themes.jupyterlab-settings'
        fname.write_text(json.dumps(dict(theme=name)))

    def stop_kernels(self):
        for session in json.load(urllib.request.urlopen(f'{self.url}/api/sessions')):
            url = f'{self.url}/api/sessions/{session["id"]}'
            urllib.request.urlopen(urllib.request.Request(url, method='DELETE'))

    def wait(self, server:subprocess.Popen):
        for _ in range(600):
            assert server.poll() is None, self.log.read_text()
            try: return urllib.request.urlopen(f'{self.url}/api', timeout=1)
            except OSError: time.sleep(.1)
        raise TimeoutError(self.log.read_text())

def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='module')
def lab(chromium, tmp_path_factory):
    "A running JupyterLab"
    lab = Lab(tmp_path_factory.mktemp('lab'))
    server = lab.start()
    try:
        lab.wait(server)
        yield lab
    finally:
        server.terminate()
        try: server.wait(10)
        except subprocess.TimeoutExpired: server.kill() # kernels end with it

class Notebook:
    "A page with a notebook in it."
    def __init__(self, page, name:str):
        self.page = page
        self.name = name
        self.errors = []  # in the console
        self.urls = set() # that the page asked for
        self.n_bytes = 0  # that came through sockets
        page.set_default_timeout(90_000)
        page.on('console', lambda m: m.type == 'error' and self.errors.append(m.text))
        page.on('pageerror', lambda e: self.errors.append(str(e)))
        page.on('request', lambda r: self.urls.add(r.url))
        page.on('websocket', lambda socket: socket.on('framereceived', self.count))

    def count(self, frame): self.n_bytes += len(frame)

    def save(self):
        self.menu('File', 'Save Notebook(?! As)')
        self.page.wait_for_timeout(1500)

    def reload(self):
        "Open the notebook again, as it was saved."
        self.n_bytes = 0
        self.page.goto(self.page.url.partition('?')[0], timeout=90_000)
        self.wait('.jp-NotebookPanel .jp-CodeCell')

    def menu(self, name:str, item:str):
        self.page.get_by_role('menuitem', name=name, exact=True).click()
        self.page.get_by_role('menuitem', name=re.compile(f'^{item}')).click()

    def run_all(self):
        prompt = self.page.locator('.jp-InputPrompt', has_text=re.compile(r'\[(\*|\d+)\]'))
        for _ in range(3): # cells that run before the page has its kernel are dropped without a message
            self.menu('Run', 'Run All Cells')
            self.page.wait_for_timeout(1000)
            if prompt.count(): return
        raise AssertionError('no cell runs')

    def wait(self, selector:str, timeout:float=90):
        return self.page.wait_for_selector(selector, timeout=timeout*1000)

    def wait_idle(self, timeout:float=240):
        self.wait('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout)

    def until(self, condition:str, timeout:float=120, arg=None):
        "Wait until a JavaScript function returns true."
        self.page.wait_for_function(condition, arg=arg, timeout=timeout*1000)

    def button(self, name:str): return self.page.locator('.kshot-panel button', has_text=name)

    def plot(self, title:str): return self.page.locator('.js-plotly-plot').filter(has_text=title).first

    def plots(self, expression:str) -> list:
        "Evaluate an expression of each plotly figure `g` in the page."
        figures = "[...document.querySelectorAll('.js-plotly-plot')]"
        return self.page.evaluate(f'() => {figures}.map(g => {expression})')

    def shot(self, name:str):
        SHOTS.mkdir(exist_ok=True)
        self.page.wait_for_timeout(800) # plotly draws in several strokes
        self.page.screenshot(path=SHOTS/f'{self.name}_{name}.png')

class SubshellGate:
    "Between page and server: answers to JupyterLab's requests for a subshell wait until it opens."
    def __init__(self):
        self.is_open = False
        self.held = [] # (socket, answer)

    def connect(self, socket):
        def pass_on(message):
            text = message if isinstance(message, bytes) else message.encode()
            if self.is_open or b'create_subshell_reply' not in text: socket.send(message)
            else: self.held.append((socket, message))
        server = socket.connect_to_server()
        server.on_message(pass_on)

    def open(self):
        self.is_open = True
        for socket,answer in self.held: socket.send(answer)

@pytest.fixture
def notebook(lab, chromium):
    "A function that opens a notebook, whose page must report no error and ask no other machine"
    opened = []
    def open_notebook(fname, width=1200, height=1000, gate:SubshellGate|None=None):
        page = chromium.new_page(viewport=dict(width=width, height=height))
        if gate: page.route_web_socket(re.compile('/api/kernels/'), gate.connect)
        nb = Notebook(page, Path(fname).stem)
        opened.append(nb)
        page.goto(f'{lab.url}/doc/tree/{fname}?reset', timeout=90_000)
        nb.wait('.jp-NotebookPanel .jp-CodeCell')
        nb.wait('text=/\\| Idle/') # of the kernel, in the status bar
        page.wait_for_timeout(1500)
        return nb
    yield open_notebook
    own = re.compile(rf'\w+://{lab.url.partition("//")[2]}/')
    for nb in opened:
        nb.shot('end')
        nb.page.close()
        assert not [e for e in nb.errors if not re.search(HARMLESS, e)]
        assert not [u for u in nb.urls if re.match('http|ws', u) and not own.match(u)]
