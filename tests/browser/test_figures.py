"Figures of the site in a browser: drawn by the site's own plotly.js, in the colours of the theme, as wide as a phone"
import json, shutil, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT/'tests'))
from staged import main
from test_lab import SHOTS, chromium # the browser

PAGE = 'tutorials/quickstart.ipynb'

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "What Quarto makes of a page, as far as figures go: its raw HTML, the offset of the site, and the file that is included after the body."
    folder = tmp_path_factory.mktemp('site')
    (folder/'tutorials').mkdir()
    shutil.copy(ROOT/'nbs'/PAGE, folder/PAGE)
    main(folder)
    cells = json.loads((folder/PAGE).read_text())['cells']
    shown = [o['data']['text/markdown'] for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    raw = '\n'.join(s.removeprefix('```{=html}\n').removesuffix('\n```') for s in shown if s.startswith('```{=html}'))
    head = '<meta charset="utf-8"><meta name="quarto:offset" content="../"><meta name="viewport" content="width=device-width">'
    style, script = ((ROOT/'nbs'/f).read_text() for f in ('styles.css', 'figures.html'))
    (folder/'tutorials'/'page.html').write_text(f'<!doctype html><html><head>{head}<style>{style}</style></head>'
                                                f'<body class="quarto-light"><main>{raw}</main>{script}</body></html>')
    return folder

@pytest.mark.parametrize('width', [1200, 400])
def test_figures(chromium, site, width):
    page, asked, errors = chromium.new_page(viewport=dict(width=width, height=900)), [], []
    page.on('request', lambda r: asked.append(r.url)); page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(f'file://{site}/tutorials/page.html')
    n = page.locator('.figure-plotly').count()
    assert n >= 2
    for i in range(n): page.locator('.figure-plotly').nth(i).locator('.main-svg').first.wait_for(timeout=60_000)
    ground = lambda: page.evaluate("getComputedStyle(document.querySelector('.figure-plotly .main-svg')).backgroundColor")
    assert ground() == 'rgb(255, 255, 255)'
    page.evaluate("document.body.className = 'quarto-dark'") # as the switch of the site does
    page.wait_for_function("getComputedStyle(document.querySelector('.figure-plotly .main-svg')).backgroundColor == 'rgb(27, 29, 33)'", timeout=60_000)
    assert page.evaluate('document.documentElement.scrollWidth') <= width, 'the page scrolls sideways'
    assert not errors and all(u.startswith(f'file://{site}/') for u in asked) and sum(u.endswith('figures.js') for u in asked) == 1
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS/f'figures_{width}.png', full_page=True)
    page.close()
