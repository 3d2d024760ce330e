"Live panels and explorers in JupyterLab and Chromium"
import json, re, shutil
from pathlib import Path

from screen import Notebook, SubshellGate, chromium, lab, notebook, write_notebook # fixtures too

ROOT = Path(__file__).parent.parent.parent

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
ALL_SHOW_2000 = """() => [...document.querySelectorAll('.js-plotly-plot')]
    .every(g => g.layout.title?.text?.endsWith('2000'))"""
SOME_SHOWS = """title => [...document.querySelectorAll('.js-plotly-plot')]
    .some(g => g.layout.title?.text == title)"""
ALL_FIT = """() => [...document.querySelectorAll('.js-plotly-plot')]
    .every(g => g._fullLayout.width < 640 && g._fullLayout.width <= g.parentElement.clientWidth)"""

def bars_of(nb:Notebook) -> list: # the code in the first figure that shows one
    return nb.plots('g.data.length > 5 ? Array.from(g.data[1].y) : null')[0]

def test_code_explorer(lab, notebook):
    write_notebook(lab.root/'explorer.ipynb', EXPLORER, AGAIN)
    nb = notebook('explorer.ipynb', height=1300)
    nb.run_all()
    nb.wait('.js-plotly-plot .main-svg')
    nb.until("() => document.querySelectorAll('.js-plotly-plot').length == 4")
    nb.wait_idle()
    assert nb.plots('g.layout.title?.text') == ['Code of 0000', 'Path 0000']*2

    before = bars_of(nb)
    nb.page.locator('.widget-toggle-button', has_text='conv3').first.click()
    nb.until(ALL_SHOW_2000) # in both views
    after = bars_of(nb)
    assert len(after) == 4 and abs(sum(after) - 1) < 1e-5 and before != after
    nb.shot('op_changed')

    text = nb.page.locator('.widget-text input').first
    text.fill('4321')
    nb.page.keyboard.press('Enter')
    nb.until("() => document.querySelector('.js-plotly-plot').layout.title?.text == 'Code of 4321'")
    text.fill('43210')
    nb.page.keyboard.press('Enter')
    nb.wait('text=/path .*expected 4/')
    nb.shot('no_path')

    nb.page.set_viewport_size(dict(width=700, height=1300))
    nb.until(ALL_FIT)
    assert nb.plots('g.layout.height')[0] == 840 # panels below each other
    nb.shot('narrow')

def test_restarted_kernel_is_reported(lab, notebook):
    write_notebook(lab.root/'restart.ipynb', EXPLORER)
    nb = notebook('restart.ipynb')
    nb.run_all()
    nb.wait('.js-plotly-plot .main-svg')
    nb.wait_idle()
    nb.menu('Kernel', 'Restart Kernel…')
    nb.page.locator('.jp-Dialog button', has_text='Restart').click()
    nb.wait('text=The kernel was restarted: run this cell again.')
    nb.shot('notice')

TRAINING = '''
from kshot.benchmark import get_space
from kshot.data import digits_data
from kshot.lab.live import LiveCallback
from kshot.networks import digits_net
from kshot.train import cosine, kshot_learner
live = LiveCallback()
learn = kshot_learner(digits_net(), get_space('digits'), digits_data(passes=25), K=2)
display(live.open()) # a view here, and one where it is trained
'''
FIT = "learn.fit(5, cbs=[cosine(.05), live])"
OUTCOME = "print('seen', live.log[-1]['update'], 'updates,', live.panel.message)"
STATUS = "[...document.querySelectorAll('.kshot-panel .widget-html')].map(o => o.textContent)"

def test_views_closed_while_training(lab, notebook):
    write_notebook(lab.root/'closed.ipynb', TRAINING, FIT, OUTCOME)
    nb = notebook('closed.ipynb')
    nb.run_all()
    nb.until(f"() => {STATUS}.filter(s => /epoch \\d of 5/.test(s)).length == 2")
    lines = nb.page.evaluate(f'() => {STATUS}')
    assert len(lines) == 2 and len(set(lines)) == 1 # both say the same
    nb.menu('Edit', 'Clear Outputs of All Cells')
    nb.wait('text=/seen 1000 updates, done in/', 180)

WINDOW = '''
from kshot.lab.widgets import Window
window, widths = Window(), []
window.observe(lambda change: widths.append(change.new), 'width')
display(window)
'''
BUSY = '''
import time
while not widths: time.sleep(.1)
print(f'{len(widths)} heard while busy')
'''

def test_a_page_that_reports_too_early(lab, notebook):
    "A report sent before there is a subshell waits for the end of the cell; the page repeats it."
    write_notebook(lab.root/'early.ipynb', WINDOW, BUSY)
    gate = SubshellGate()
    nb = notebook('early.ipynb', gate=gate)
    nb.run_all()
    nb.wait('.jp-Cell:nth-of-type(2) .jp-InputPrompt:text("[*]:")')
    nb.page.wait_for_timeout(1500)
    assert gate.held
    gate.open()
    nb.wait('text=1 heard while busy')

# whether the buttons of a figure `g` lie over its title
BUTTONS_OVER_TITLE = """(() => {
    const [a, b] = ['.modebar', '.gtitle'].map(s => g.querySelector(s).getBoundingClientRect());
    return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom })()"""
CORNERS = """(g, [x, y]) => {
    const r = g.querySelector('.nsewdrag').getBoundingClientRect(), {xaxis, yaxis} = g._fullLayout;
    return [...x.map(v => r.left+xaxis.d2p(v)), ...y.map(v => r.top+yaxis.d2p(v))] }"""
MIDDLE_HALVES = """g => g.data.filter(t => t.mode == 'lines' && !t.fill)
    .map(t => Array.from(t.x).slice(0, 2))"""

class Brush:
    "Boxes over the hills of an accuracy explorer."
    def __init__(self, nb:Notebook):
        self.nb = nb
        self.panel = nb.page.locator('.kshot-panel').filter(has_text='Accuracy over all paths').first
        self.hills = self.panel.locator('.js-plotly-plot').filter(has_text='Accuracy over all paths').first
        self.status = self.panel.locator('.widget-html').first
        self.hills.scroll_into_view_if_needed()

    def range_of(self, name:str) -> list[float]: # what a slider says
        readout = self.panel.locator('.widget-slider', has_text=name).locator('.widget-readout')
        return [float(v) for v in readout.inner_text().split('–')]

    def drag(self, x, y):
        a, b, c, d = self.hills.evaluate(CORNERS, [x, y])
        mouse = self.nb.page.mouse
        mouse.move(a, c)
        mouse.down()
        mouse.move(b, d, steps=8)
        mouse.up()

    def choose(self, x, y) -> int: # number of paths
        before = self.status.inner_text()
        self.drag(x, y)
        self.nb.until('([o, before]) => o.innerText != before', 60, [self.status.element_handle(), before])
        after = self.status.inner_text()
        self.nb.page.wait_for_timeout(700)
        assert self.status.inner_text() == after # though sliders round
        return int(after.split()[0].replace(',', ''))

def brush(nb:Notebook):
    "Drag boxes over the hills of one run and of the truth: what is chosen lies in the box."
    b = Brush(nb)
    upper, lower = b.hills.evaluate(MIDDLE_HALVES)
    whole, whole_alone = b.range_of('supernet'), b.range_of('stand-alone')
    low, high = b.hills.evaluate('g => g._fullLayout.xaxis.range')
    pixel = (high-low)/b.hills.locator('.nsewdrag').first.bounding_box()['width']
    def is_near(ends, half): return all(abs(u-v) < 2*pixel+.001 for u,v in zip(ends, half, strict=True))

    n = b.choose(upper, (1.75, 1.05))
    assert is_near(b.range_of('supernet'), upper) and b.range_of('stand-alone') == whole_alone
    assert abs(n-313) < 30
    nb.shot('brushed')
    n = b.choose(lower, (1.2, -.05)) # and a little of the upper one
    assert is_near(b.range_of('stand-alone'), lower) and b.range_of('supernet') == whole
    assert abs(n-313) < 30
    beside = (whole[1]+high)/2, high-3*pixel
    assert b.choose(beside, (1.75, 1.05)) == 0
    assert b.range_of('supernet') == [whole[1]]*2 and b.range_of('stand-alone') == whole_alone
    nb.shot('beside')

def pause_and_stop(nb:Notebook, lab):
    "Pause, resume and stop the training of the quickstart; the cell is running all the time."
    nb.button('Pause').click(timeout=120_000)
    paused = nb.wait('text=/paused after update [\\d,]+/').inner_text()
    nb.shot('paused')
    nb.page.wait_for_timeout(1500)
    assert nb.wait('text=/paused after update/').inner_text() == paused
    nb.page.set_viewport_size(dict(width=700, height=1400))
    nb.shot('live_narrow')
    nb.page.set_viewport_size(dict(width=1200, height=1400))
    nb.button('Resume').click()
    nb.wait('text=/training, epoch/')
    nb.page.wait_for_timeout(4000)
    nb.shot('live')
    nb.button('Stop and save').click()
    outcome = nb.wait('text=/stopped after epoch \\d+ of 20, saved in/').inner_text()
    n = int(re.search(r'stopped after epoch (\d+)', outcome)[1])
    checkpoints = lab.files.glob('quickstart_*/checkpoint/epoch_*.safetensors')
    assert max(checkpoints).stem == f'epoch_{n:05}'
    assert nb.button('Pause').is_disabled() and nb.button('Stop and save').is_disabled()

def change_op(nb:Notebook):
    "Change the first op of the path in the explorer: its code changes."
    buttons = nb.page.locator('.widget-toggle-button')
    buttons.filter(has_text='conv3').first.scroll_into_view_if_needed()
    before = nb.plot('Code of').evaluate('g => Array.from(g.data[1].y)')
    path = nb.page.locator('.widget-text input').first.input_value()
    name, op = ('dw5', 4) if path[0] == '2' else ('conv3', 2)
    buttons.filter(has_text=name).first.click()
    nb.until(SOME_SHOWS, arg=f'Code of {op}{path[1:]}')
    after = nb.plot('Code of').evaluate('g => Array.from(g.data[1].y)')
    assert before != after and abs(sum(after) - 1) < 1e-5
    nb.shot('op_changed')

def test_quickstart(lab, notebook):
    for folder in ('tutorials', 'images'): shutil.copytree(ROOT/'nbs'/folder, lab.root/folder)
    nb = notebook('tutorials/quickstart.ipynb', height=1400)
    nb.run_all()
    pause_and_stop(nb, lab)
    nb.wait('.widget-select select', 240)
    nb.wait_idle()
    change_op(nb)
    brush(nb)
    nb.plot('Kendall tau').scroll_into_view_if_needed()
    nb.shot('ranked')
    assert not any(nb.plots(BUTTONS_OVER_TITLE))
    errors = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'
    assert not nb.page.locator(errors).count()

SEARCH = '''
import threading
from kshot.lab.live_search import LiveSearch
from kshot.search import Search
from kshot.space import Block, Space
space, tick = Space('toy', tuple(Block(f'b{l}', tuple('0123')) for l in range(4))), threading.Event()
scored = []
def score(path):
    scored.append(path)
    tick.wait(.1 if len(scored) < 50 else 2) # 5 minutes in all: the test stops it long before
    return -sum((o-1)**2 for o in path)
def macs(path): return 1 + int(space.format(path), 4)
live = LiveSearch(take=lambda path: space.format(path)[::-1])
search = Search(space, costs=dict(macs=macs), budgets=dict(macs=200))
'''
RUN = "frame = search.run(score, 190, 'random', progress=live)"
TAKEN = "print('took', live.subnet, 'of', live.path, 'after', len(frame))"
POINT = """(g, i) => {
    const l = g._fullLayout, box = g.getBoundingClientRect(), t = g.data[0];
    return [t.text[i], box.x + l._size.l + l.xaxis.l2p(t.x[i]), box.y + l._size.t + l.yaxis.l2p(t.y[i])] }"""
PLACES = "g => [g.data[0].x, g._fullLayout.xaxis.range, g._fullLayout.yaxis.range]"
IS_CHOSEN = "([g, name]) => g.data[2]?.name == `chosen: ${name}`"

def test_live_search(lab, notebook):
    "A figure that changes holds still under the pointer, and the first click chooses the path that it hits."
    write_notebook(lab.root/'search.ipynb', SEARCH, RUN, TAKEN)
    nb = notebook('search.ipynb')
    nb.run_all()
    nb.until("() => document.querySelector('.js-plotly-plot')?.data[0]?.x.length > 12")
    front = nb.page.locator('.js-plotly-plot').first
    box = front.bounding_box()
    nb.page.mouse.move(box['x'] + box['width']/2, box['y'] + box['height']/2)
    nb.wait('text=/paths; the figure holds still/')
    nb.page.wait_for_timeout(1000) # what was on its way is drawn
    places = front.evaluate(PLACES)
    for i in (5, 3, 8, 0): # at once, before there is a label
        name, x, y = front.evaluate(POINT, i)
        nb.page.mouse.move(x, y)
        nb.page.mouse.click(x, y)
        nb.until(IS_CHOSEN, arg=[front.element_handle(), name])
        assert front.evaluate(PLACES) == places
        nb.page.wait_for_timeout(500) # two quick clicks are one that resets the axes
    status = nb.page.evaluate(f'() => {STATUS}[0]')
    nb.until(f'before => {STATUS}[0] != before', arg=status) # others are scored all the time
    assert front.evaluate(PLACES) == places
    nb.shot('held')

    nb.page.mouse.move(5, 5)
    nb.until('([g, n]) => g.data[0].x.length > n', arg=[front.element_handle(), len(places[0])])
    nb.button('Extract').click()
    nb.wait('text=/is now/')
    nb.button('Pause').click()
    nb.wait('text=/paused after \\d+ paths/')
    nb.shot('paused')
    nb.button('Resume').click()
    nb.button('Stop').click()
    nb.wait('text=/stopped: \\d+ of 190 paths/')
    nb.wait(f'text=/took {name[::-1]} of .{", ".join(name)}. after \\d+/')

LIVE = TRAINING.replace('passes=25', 'passes=2') + 'learn.fit(2, cbs=[cosine(.05), live])'
SOON = SEARCH.replace('.1 if', '0 if') + RUN.replace('190', '40')
PLAIN = """
from kshot.figures import plot_training
plot_training([dict(epoch=e, loss=1/(e+1), acc_valid=e/9) for e in range(9)])
"""
SHOWN = """g => [g.layout.title?.text, g.layout.height, g.data.map(t => [t.name, t.x?.length]),
    (g.layout.annotations ?? []).map(a => a.text)]"""
IN_PANELS = "[...document.querySelectorAll('.kshot-panel .js-plotly-plot')]"
GROUND = f"() => {IN_PANELS}.map(g => getComputedStyle(g.querySelector('.main-svg')).backgroundColor)"
ALL_WIDE = """n => { const gs = [...document.querySelectorAll('.js-plotly-plot')];
    return gs.length == n && gs.every(g => g._fullLayout?.width == g.clientWidth) }"""

def test_a_document_stays_whole(lab, notebook):
    "Views have their last figure and text after a reload, and without a kernel; plotly.js comes once."
    write_notebook(lab.root/'whole.ipynb', EXPLORER, LIVE, SOON, PLAIN)
    nb = notebook('whole.ipynb', height=1300)
    nb.n_bytes = 0
    nb.run_all()
    nb.wait('text=/done: 40 of 40 paths/')
    nb.wait_idle()
    nb.until(ALL_WIDE, arg=7)
    before = nb.page.evaluate(f'() => [{IN_PANELS}.map({SHOWN}), {STATUS}]')
    assert len(before[0]) == 6 and any('done in' in text for text in before[1])
    assert nb.n_bytes < 1_000_000*len(before[0])
    nb.save()
    document = (lab.root/'whole.ipynb').read_text()
    assert len(document) < 1_000_000
    outputs = [o for c in json.loads(document)['cells'] for o in c['outputs']]
    assert not [o for o in outputs if 'image/png' in o.get('data', {})] # in yesterday's width
    same = f'before => JSON.stringify([{IN_PANELS}.map({SHOWN}), {STATUS}]) == JSON.stringify(before)'

    nb.reload()
    nb.until(same, arg=before)
    assert nb.n_bytes < 1_000_000
    assert not nb.page.locator('.kshot-notice:not(:empty)').count()

    lab.stop_kernels()
    lab.set_theme('JupyterLab Dark')
    nb.page.set_viewport_size(dict(width=900, height=1300))
    nb.reload()
    nb.until(same, arg=before)
    nb.until(ALL_WIDE, arg=7)
    assert set(nb.page.evaluate(GROUND)) == {'rgb(27, 29, 33)'}
    notice = "[...document.querySelectorAll('.kshot-notice')].filter(e => /was saved/.test(e.textContent))"
    nb.until(f'n => {notice}.length == n', arg=4) # each view asks for its kernel; one has two panels
    nb.shot('kept')
    lab.set_theme('JupyterLab Light')
