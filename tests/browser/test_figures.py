"Pages of the site in a browser: figures drawn by its own plotly.js, in both themes; as wide as a phone"
import json, shutil
from pathlib import Path

import pytest
from screen import SHOTS, chromium # the second is a fixture
from staged import main

ROOT = Path(__file__).parent.parent.parent
PAGE = 'tutorials/quickstart.ipynb'
HEAD = '<meta charset="utf-8"><meta name="quarto:offset" content="../">' \
       '<meta name="viewport" content="width=device-width">'
GROUND = "getComputedStyle(document.querySelector('.figure-plotly .main-svg')).backgroundColor"

def raw_html(page:Path) -> str: # of a staged notebook
    cells = json.loads(page.read_text())['cells']
    outputs = [o['data'] for c in cells for o in c.get('outputs', []) if 'data' in o]
    texts = [o['text/markdown'] for o in outputs if o.get('text/markdown', '').startswith('```{=html}')]
    return '\n'.join(t.removeprefix('```{=html}\n').removesuffix('\n```') for t in texts)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "What Quarto makes of the figures of a page: raw HTML, and the file included after the body"
    folder = tmp_path_factory.mktemp('site')
    (folder/'tutorials').mkdir()
    shutil.copy(ROOT/'nbs'/PAGE, folder/PAGE)
    main(folder)
    style = (ROOT/'nbs'/'styles.css').read_text()
    script = (ROOT/'nbs'/'figures.html').read_text()
    head = f'<head>{HEAD}<style>{style}</style></head>'
    body = f'<body class="quarto-light"><main>{raw_html(folder/PAGE)}</main>{script}</body>'
    (folder/'tutorials'/'page.html').write_text(f'<!doctype html><html>{head}{body}</html>')
    return folder

@pytest.mark.parametrize('width', [1200, 400])
def test_figures(chromium, site, width):
    page = chromium.new_page(viewport=dict(width=width, height=900))
    urls = []
    errors = []
    page.on('request', lambda r: urls.append(r.url))
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(f'file://{site}/tutorials/page.html')
    figures = page.locator('.figure-plotly').all()
    assert len(figures) >= 2
    for figure in figures: figure.locator('.main-svg').first.wait_for(timeout=60_000)

    assert page.evaluate(GROUND) == 'rgb(255, 255, 255)'
    page.evaluate("document.body.className = 'quarto-dark'") # as the switch of the site does
    page.wait_for_function(f"{GROUND} == 'rgb(27, 29, 33)'", timeout=60_000)
    assert page.evaluate('document.documentElement.scrollWidth') <= width, 'the page scrolls sideways'
    assert not errors
    assert all(u.startswith(f'file://{site}/') for u in urls)
    assert sum(u.endswith('figures.js') for u in urls) == 1
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS/f'figures_{width}.png', full_page=True)
    page.close()

LONG = 'a_name_that_is_far_longer_than_the_screen_of_a_phone_is_wide'
WORDS = f"""<h3>{LONG}</h3><p>The option <code>--{LONG}</code> and {LONG}</p><ul><li>{LONG}</li></ul>
<table><tr><td><code>max_latency_ms</code></td><td>{LONG}</td><td>{'words '*60}</td></tr></table>"""

def test_long_words_on_a_phone(chromium):
    "Long names break, but not in a table, which scrolls by itself."
    style = (ROOT/'nbs'/'styles.css').read_text()
    page = chromium.new_page(viewport=dict(width=390, height=844))
    head = f'<head>{HEAD}<style>{style}</style></head>'
    page.set_content(f'<!doctype html><html>{head}<body><main>{WORDS}</main></body></html>')
    assert page.evaluate('document.documentElement.scrollWidth') == 390
    table = page.locator('table')
    assert table.evaluate('o => o.scrollWidth > o.clientWidth')
    one_line = table.locator('code').evaluate('o => o.getClientRects().length')
    assert one_line == 1 and page.locator('p code').evaluate('o => o.getClientRects().length') > 1
    page.close()
