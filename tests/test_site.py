"The site without Quarto: links, pictures and commands of every page, what Quarto is given, staging"
import ast, builtins, configparser, io, json, os, re, shlex, signal, stat, subprocess, sys
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import nbformat, pandas as pd, pytest, yaml
from conftest import ROOT, copy_tree
from staged import FOLDED, NO_WIDGET, PLOTLY, WIDGET, convert, fold_tests, main

from kshot.cli.main import ROOMS as COMMANDS
from kshot.cli.main import find_command
from kshot.cli.main import main as kshot_main

NBS = ROOT/'nbs'

def is_page(fname) -> bool:
    return not any(part[0] in '._' for part in fname.relative_to(NBS).parts)

def name(page) -> str:
    return page.relative_to(NBS if NBS in page.parents else ROOT).as_posix()

def url_of(
    page:Path, # numbered notebook
) -> str:      # `nets/ops` for nets/10_ops.ipynb, as nbdev calls its page
    "The address of a room's page, without the suffix."
    return (page.relative_to(NBS).parent/page.stem.partition('_')[2]).as_posix()

PAGES = sorted(p for p in NBS.rglob('*.ipynb') if is_page(p))
ROOMS = {url_of(p): p for p in PAGES if p.name[0].isdigit()}
TEXTS = [*PAGES, ROOT/'README.md', ROOT/'CHANGELOG.md']
CFG = yaml.safe_load((ROOT/'_quarto.yml').read_text())

LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)')
CODE = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')
FENCE = re.compile(r'^( *)(```+)(\w*)[^\n]*\n(.*?)^ *\2 *$', re.M|re.S)
each_page = pytest.mark.parametrize('page', PAGES, ids=name)

@cache
def cells(page) -> list[dict]: return json.loads(page.read_text(encoding='utf-8'))['cells']

@cache
def prose(
    page:Path, # notebook or Markdown file
) -> str:      # its Markdown, code blocks included
    "What a page says between its code cells."
    if page.suffix == '.md': return page.read_text(encoding='utf-8')
    return '\n\n'.join(''.join(c['source']) for c in cells(page) if c['cell_type'] == 'markdown')

def blocks(
    page:Path, # a page
    *lang:str, # languages
) -> list[str]:
    "Code blocks of a page's Markdown."
    return [m[4] for m in FENCE.finditer(prose(page)) if m[3] in lang]

def text_of(page) -> str: # without code blocks
    return FENCE.sub('', prose(page))

def slug(
    heading:str, # Markdown
) -> str:        # its anchor, as pandoc makes it
    "The anchor of a heading."
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    words = re.sub(r'[^\w\s.-]', '', text).strip().lower()
    return re.sub(r'\s+', '-', words).lstrip('0123456789-.')

@cache
def anchors(page) -> set[str]:
    headings = re.finditer(r'^#+ +(.+?)(?: *\{.*\})? *$', text_of(page), re.M)
    return {slug(m[1]) for m in headings}

def links(page) -> list[tuple[bool, str, str]]: # is it a picture, text, target
    text = re.sub(r'`[^`\n]+`', lambda m: m[0] if '](' not in m[0] else '', text_of(page))
    return [(bool(m[1]), m[2], m[3]) for m in LINK.finditer(text)]

def problem(
    page:Path,   # where the link stands
    target:str,  # what it leads to
) -> str|None:   # what is wrong with it
    "A relative link needs its file and heading, another one a scheme and a host."
    url = urlsplit(target)
    if url.scheme == 'mailto': return None if '@' in url.path else 'no address'
    if url.scheme or url.netloc:
        has_host = re.fullmatch(r'[\w-]+(\.[\w-]+)+(:\d+)?', url.netloc)
        return None if url.scheme in ('http', 'https') and has_host else 'malformed'
    fname = (page.parent/unquote(url.path)).resolve() if url.path else page
    if NBS in fname.parents and fname.suffix == '.html':
        fname = ROOMS.get(fname.relative_to(NBS).with_suffix('').as_posix(), fname)
    if not fname.exists(): return 'no such file'
    if NBS in page.parents and NBS not in fname.parents: return 'leaves the site'
    if not url.fragment: return None
    is_text = fname.suffix in ('.ipynb', '.md')
    if not is_text or slug(url.fragment) not in anchors(fname): return 'no such heading'

@cache
def resolves(
    dotted:str, # name such as `kshot.rank.kendall_tau`
) -> bool:      # is it a package, a module, or in one?
    "Does a dotted name exist?"
    module = 'kshot'
    rest = dotted.split('.')[1:]
    while rest:
        path = ROOT/f'{module}.{rest[0]}'.replace('.', '/')
        if not path.is_dir() and not path.with_suffix('.py').exists(): break
        module = f'{module}.{rest.pop(0)}'
    obj = import_module(module)
    for r in rest:
        obj = getattr(obj, r, None)
        if obj is None: return False
    return True

def doclinks(page) -> list[str]: # names of the package in backticks
    return [m[1] for m in CODE.finditer(text_of(page)) if re.fullmatch(r'kshot(\.\w+)+', m[1])]

def test_links(record_property):
    found = [(p, *link) for p in TEXTS for link in links(p)]
    dotted = [(name(p), o) for p in TEXTS for o in doclinks(p)]
    inside = [target for *_,target in found if '//' not in target]
    pictures = [text for _,is_picture,text,_ in found if is_picture]
    counts = (f'{len(found)} links ({len(inside)} inside the site, {len(pictures)} pictures), '
              f'{len(dotted)} doclinks in {len(TEXTS)} pages')
    record_property('said', counts)
    problems = [(name(p), target, problem(p, target)) for p,_,_,target in found]
    assert not [o for o in problems if o[2]]
    assert min(map(len, pictures)) >= 12, 'a picture needs a text that says what it shows'
    assert not [o for o in dotted if not resolves(o[1])]
    assert found and inside and pictures and dotted

def test_the_checker_sees():
    page = NBS/'tutorials'/'quickstart.ipynb'
    good = ['../index.ipynb', 'own_space.ipynb#the-network', '../rank.html', '../nets/ops.html',
            'https://arxiv.org/abs/2106.06442']
    bad = ['nowhere.ipynb', '../nowhere.html', '../ops.html', '../index.ipynb#nowhere',
           '../../README.md', 'https://', 'http:/arxiv.org', 'ftp://arxiv.org/x']
    for target in good: assert not problem(page, target), target
    for target in bad: assert problem(page, target), target
    assert all(map(resolves, ['kshot.rank.kendall_tau', 'kshot.nets', 'kshot.nets.ops']))
    assert not any(map(resolves, ['kshot.rank.kendal', 'kshot.ops', 'kshot.nets.nowhere']))
    found = LINK.findall('a [b [c]](d.ipynb) ![e](f.png)')
    assert found == [('', 'b [c]', 'd.ipynb'), ('!', 'e', 'f.png')]

@each_page
def test_title_and_summary(page):
    begins = re.match(r'# \S.*\n\n> \S.{15,}', prose(page))
    assert begins, 'a page begins with "# Title" and "> one sentence"'
    assert len(re.findall(r'^# ', text_of(page), re.M)) == 1
    first = next(''.join(c['source']) for c in cells(page) if c['cell_type'] == 'markdown')
    rest = re.sub(r'\A# .*\n\n> .*(\n\n(- [\w-]+: .*\n?)+)?', '', first)
    assert not rest.strip(), 'nbdev makes a header of this cell, and drops everything else in it'

@each_page
def test_no_raw_errors(page):
    outputs = [o for c in cells(page) for o in c.get('outputs', [])]
    for o in outputs:
        text = ''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/plain', ''))
        assert o['output_type'] != 'error' and o.get('name') != 'stderr'
        assert 'Traceback (most recent call last)' not in text
        assert not re.search(r'/(root|home|tmp|Users)/', text), 'a path of somebody\'s machine'

def names(src) -> tuple[set[str], set[str]]: # that code binds anywhere, that it reads anywhere
    bound, read = set(), set()
    for n in ast.walk(ast.parse(src)):
        if isinstance(n, ast.Name): (read if isinstance(n.ctx, ast.Load) else bound).add(n.id)
        elif isinstance(n, ast.FunctionDef | ast.ClassDef): bound.add(n.name)
        elif isinstance(n, ast.arg): bound.add(n.arg)
        elif isinstance(n, ast.alias): bound.add((n.asname or n.name).partition('.')[0])
        elif isinstance(n, ast.ExceptHandler) and n.name: bound.add(n.name)
    return bound, read

def has_import(src) -> bool:
    return any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(ast.parse(src)))

@pytest.mark.parametrize('page', ROOMS.values(), ids=name)
def test_what_staging_runs(page):
    "nbdev runs the exported cells of a room and those with an import: they must not need others."
    known = set(dir(builtins)) | {'__file__', '__name__'}
    with_import = []
    for c in cells(page):
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or re.search(r'^#\| *eval: *false', src, re.M): continue
        if re.search(r'^#\| *export', src, re.M): known |= names(src)[0]
        elif has_import(src): with_import.append(src)
    for src in with_import:
        bound, read = names(src)
        known |= bound
        lacks = read - known
        assert not lacks, f'{lacks} in {src[:80]!r}: put the import into the hidden cell of imports'

def command_in(
    words:list[str], # of a shell line
) -> tuple[str, list[str]]|None: # command of the package, its arguments
    "The command of kshot that a line calls, if any."
    if 'kshot' not in words[:-1]: return None
    i = words.index('kshot')
    if i and words[i-1] != '-m' and '=' not in words[i-1]: return None
    return words[i+1], words[i+2:]

@cache
def commands() -> list[tuple[str, str, list[str]]]: # page, command, arguments
    "Every call of a command of kshot in a page's shell blocks."
    lines = []
    for p in TEXTS:
        for block in blocks(p, 'sh', 'bash'):
            lines += [(name(p), line) for line in block.replace('\\\n', ' ').splitlines()]
    out = []
    for page,line in lines:
        if 'kshot' not in line: continue
        calls = [command_in(shlex.split(part, comments=True)) for part in re.split(r'[;|&]+', line)]
        out += [(page, *call) for call in calls if call]
    return out

@cache
def help_of(
    *command:str, # such as train, or bench needs
) -> str:
    "What `--help` prints."
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit): kshot_main([*command, '--help'])
    return out.getvalue()

def test_commands_and_their_options_exist():
    assert len(commands()) > 20
    for page,command,args in commands():
        assert command in COMMANDS, (page, command)
        sub = args[:1] if hasattr(find_command(command), 'parts') else []
        options = [a.partition('=')[0] for a in args if re.match(r'--\w', a)]
        text = help_of(command, *sub)
        unknown = [o for o in options if not re.search(rf'(?<![\w-]){o}(?![\w-])', text)]
        assert not unknown, (page, command, unknown)

def test_scripts_are_shell():
    scripts = [(name(p), block) for p in TEXTS for block in blocks(p, 'sh', 'bash')]
    for page,block in scripts:
        done = subprocess.run(['bash', '-n'], input=block, text=True, capture_output=True)
        assert not done.returncode, (page, done.stderr)

# stand in for Slurm's commands: each logs how it was called; a step works until it is interrupted
SCONTROL = '[ "$1" = show ] && echo host0 || echo "scontrol $*" >> log'
# a background job of the shell ignores INT, a step of Slurm's doesn't
SCANCEL = 'echo "scancel $1" >> log; kill $(cat pid)'
SRUN = '''echo "srun ${*##* }" >> log
[ -e fails ] && exit 3
[ -e quick ] && exit 0
trap "echo saved >> log; exit 130" TERM
echo $$ > pid
read < never'''

WORLDS = {'never': (1, 'srun, scancel --signal=INT, saved, scontrol requeue 7'), # ends by itself
          'fails': (1, 'srun'),
          'quick': (0, 'srun, srun')}

@pytest.mark.parametrize('world', WORLDS)
def test_slurm_job(tmp_path, world):
    "A job whose time is up is requeued, one that failed is not, and a search follows the training."
    script, = [b for b in blocks(NBS/'do'/'cluster.ipynb', 'sh') if 'requeue' in b]
    for command,body in dict(scontrol=SCONTROL, scancel=SCANCEL, srun=SRUN).items():
        (tmp_path/command).write_text(f'#!/bin/bash\n{body}\n')
        (tmp_path/command).chmod(0o755)
    (tmp_path/'.venv/bin').mkdir(parents=True)
    (tmp_path/'.venv/bin/activate').touch()
    os.mkfifo(tmp_path/'never')
    if world != 'never': (tmp_path/world).touch()
    slurm = dict(SLURM_JOB_NODELIST='host0', SLURM_NNODES='2', SLURM_JOB_ID='7')
    env = slurm | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}')
    job = subprocess.Popen(['bash', '-c', script], cwd=tmp_path, env=env)
    if world == 'never':
        never = os.open(tmp_path/'never', os.O_WRONLY) # opens when the step is at its read
        job.send_signal(signal.SIGUSR1)
    code, log = WORLDS[world]
    assert job.wait(30) == code
    assert re.sub(r'(srun).*', r'\1', (tmp_path/'log').read_text()).splitlines() == log.split(', ')

def together(
    script:str, # of a job array
    cwd:Path,   # where its tasks run
    n:int=2,    # tasks
):
    "Run the tasks of a job array at once; each must end well."
    env = os.environ | dict(OMP_NUM_THREADS='1', PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    tasks = []
    for i in range(n):
        with open(cwd/f'{i}.err', 'w') as err:
            task = subprocess.Popen(['bash', '-ec', script], cwd=cwd, stdout=subprocess.DEVNULL, stderr=err,
                                    env=env | dict(SLURM_ARRAY_TASK_ID=str(i)))
        tasks.append(task)
    for i,task in enumerate(tasks): assert not task.wait(600), (cwd/f'{i}.err').read_text()[-2000:]

@pytest.mark.slow
def test_job_arrays(tmp_path):
    "The arrays of the page on clusters, with two tasks: seeds, and a search by journal and by database."
    small = {r'source .*': '', '--space macro --K 8': '--K 2 --epochs 1 --passes 2', '--seeds 5': '--seeds 2',
             '--n_paths 1000': '--n_paths 12', 'pip install .*': '', 'search net': 'search eight/seed_0',
             'postgresql.*': f'sqlite:///{tmp_path}/search.db'}
    found = []
    for block in blocks(NBS/'do'/'cluster.ipynb', 'sh'):
        if 'kshot study' in block or 'torchrun' in block or 'kshot' not in block: continue
        for old,new in small.items(): block = re.sub(old, new, block)
        found.append(block)
    search, by_database, train, rank = found
    together(train, tmp_path)
    runs = [tmp_path/'runs'/'eight'/f'seed_{i}' for i in range(2)]
    logs = [(run/'log.jsonl').read_bytes() for run in runs]
    together(rank.replace('eight', 'eight --n_paths 20'), tmp_path, 1)
    assert [(run/'log.jsonl').read_bytes() for run in runs] == logs, 'trained again'
    ranked = json.loads((tmp_path/'runs'/'eight'/'run.json').read_text())
    assert ranked['results']['rank']['supernet']['n_seeds'] == 2
    for script in search, by_database:
        together(script, tmp_path)
        assert 12 <= len(pd.read_parquet(runs[0]/'search.parquet')) <= 13
    assert (tmp_path/'search.db').is_file()

def test_python_blocks_parse():
    for p in TEXTS:
        for block in blocks(p, 'python'): ast.parse(block)

def files_of(
    contents:list, # of a sidebar
) -> list[str]:    # its pages
    "The pages of a sidebar, with those of its sections."
    parts = (files_of(o['contents']) if isinstance(o, dict) else [o] for o in contents)
    return [fname for part in parts for fname in part]

def test_sections():
    "Quarto marks the entry of the navbar whose page is in the sidebar shown, which the page's section has."
    site = CFG['website']
    sections = [(o['id'], o['title'], files_of(o['contents'])) for o in site['sidebar']]
    entries = [(o['text'], o['href']) for o in site['navbar']['left']]
    assert [text for text,_ in entries] == 'Start Learn Do API Results Papers'.split()
    for (text,href),(key,title,files) in zip(entries, sections, strict=True):
        assert key == title.lower() and title == text and href in files
    files = [fname for *_,own in sections for fname in own]
    assert sorted(files) == sorted(map(name, PAGES)), 'every page is in one sidebar'
    assert (NBS/site['favicon']).is_file()
    html = CFG['format']['html']
    assert site['search'] and html['html-math-method'] == 'mathml'
    assert set(html['theme']) == {'light', 'dark'}

def test_not_found():
    "The page for a wrong address, which is served from any depth, leads to pages from the root."
    text = (NBS/'404.qmd').read_text()
    targets = [m[3] for m in LINK.finditer(text)]
    assert 'index.ipynb' in text and len(targets) > 3
    for target in targets: assert target.startswith('/') and (NBS/target[1:]).is_file(), target

def test_nothing_is_fetched_for_the_looks():
    html = CFG['format']['html']
    themes = [f for theme in html['theme'].values() for f in theme if f != 'default']
    for f in (*themes, html['css'], html['include-after-body']):
        assert not re.search(r'https?:|@import|url\(', (NBS/f).read_text()), f

@pytest.mark.parametrize('tutorial', 'quickstart own_space own_network simplex ranking budgets'.split())
def test_runs_elsewhere(tutorial):
    "Links to Colab and Binder lead to the page itself; Colab installs what the settings name."
    page = NBS/'tutorials'/f'{tutorial}.ipynb'
    about = configparser.ConfigParser()
    about.read(ROOT/'settings.ini')
    url, branch = about['DEFAULT']['git_url'], about['DEFAULT']['branch']
    repo = urlsplit(url).path[1:]
    line, install = cells(page)[1:3]
    targets = [m[3] for m in LINK.finditer(''.join(line['source']))]
    assert targets == [f'https://colab.research.google.com/github/{repo}/blob/{branch}/nbs/{name(page)}',
                       f'https://mybinder.org/v2/gh/{repo}/{branch}?labpath=nbs/{name(page)}']
    code = ''.join(install['source'])
    assert code.startswith('#| hide') and f"pip install -q git+{url}'" in code
    called = []
    shell = SimpleNamespace(system=called.append)
    for modules,n in (({}, 0), ({'google.colab': None}, 1)):
        called.clear()
        with patch.dict(sys.modules, modules): exec(code, dict(get_ipython=lambda: shell))
        assert len(called) == n, modules

def test_binder():
    script = ROOT/'binder'/'postBuild'
    assert os.access(script, os.X_OK) and 'download.pytorch.org/whl/cpu .' in script.read_text()
    major, minor = (ROOT/'binder'/'runtime.txt').read_text().strip().removeprefix('python-').split('.')
    assert (int(major), int(minor)) >= (3, 11)

def test_results_begin_with_a_summary():
    "A row for each section of the page, in order, with a link that leads there."
    page = NBS/'results.ipynb'
    texts = [''.join(d.get('text/markdown', '')) for d in data_of(dict(cells=cells(page)))]
    summary = next(text for text in texts if text.startswith('| question |'))
    sections = re.findall(r'^## +(.+)$', text_of(page), re.M)
    rows = re.findall(r'^\| .+\? \| .*\d.* \| \[(.+)\]\(#(.+)\) \|$', summary, re.M)
    assert rows == [(section, slug(section)) for section in sections]
    assert len(rows) == summary.count('\n')-1

def data_of(nb) -> list[dict]:
    return [o['data'] for c in nb['cells'] for o in c.get('outputs', []) if 'data' in o]

def test_quarto_gets_what_it_can_show(tmp_path):
    "Figures and tables become raw HTML, widgets a sentence, with the data of the notebook."
    page = NBS/'tutorials'/'quickstart.ipynb'
    nb = json.loads(page.read_text())
    before = data_of(json.loads(page.read_text()))
    nb['metadata']['widgets'] = {}
    assert convert(nb)
    after = data_of(nb)
    figures = [(a[PLOTLY], b) for a,b in zip(before, after, strict=True) if PLOTLY in a]
    assert len(figures) >= 2
    for a,b in figures:
        fig = re.search(r'<script type="application/json">(.*?)</script>', b['text/markdown'])[1]
        assert json.loads(fig) == {k: a[k] for k in ('data', 'layout')}
    n_widgets = sum(WIDGET in a for a in before)
    assert sum(b.get('text/markdown') == NO_WIDGET for b in after) == n_widgets > 0
    assert not [b for b in after if {'text/html', PLOTLY, WIDGET} & b.keys()]
    assert 'widgets' not in nb['metadata']
    text = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    pictures = re.findall(r'<!-- site: (.*) -->', prose(page)) # in JupyterLab, the widget is there
    assert pictures and all(f'\n{picture}\n' in f'\n{text}\n' for picture in pictures)
    assert '<!-- site' not in text
    assert not convert(nb), 'a second time changes nothing'
    (tmp_path/'tutorials').mkdir()
    (tmp_path/'tutorials'/page.name).write_text(page.read_text())
    main(tmp_path)
    nbformat.validate(nbformat.read(tmp_path/'tutorials'/page.name, 4))
    js = (tmp_path/'figures.js').read_text()
    assert js.count('kshotTemplates = {light: {') == 1 and 'plotly.js v' in js[:200]

def test_code_of_a_reference_has_no_links():
    "nbdev links names in backticks, also those in the comments of a signature."
    linked = '[`get_truth`](https://kshot.github.io/kshot/tables.html#get_truth)'
    text = f'### f\n\n```python\ndef f(\n    x, # as {linked}, `y`\n```\n\n*As {linked}.*'
    output = nbformat.v4.new_output('display_data', {'text/markdown': text})
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('show_doc(f)', outputs=[output])])
    assert convert(nb) and not convert(nb)
    assert data_of(nb) == [{'text/markdown': text.replace(linked, '`get_truth`', 1)}]

def test_tests_are_folded(tmp_path):
    "What only tests is folded in the page of a module, by options that Quarto reads at the top of a cell."
    code = ['mix(bank, code)', '#| eval: false\ntest_eq(1, 1)', 'for k in x:\n    assert k',
            'print(1) # no assert', 'refuses(f)', 'shown = assert_frame_equal(a, b)']
    cells = [nbformat.v4.new_code_cell(text) for text in code]
    shows = nbformat.v4.new_output('stream', text='1')
    cells.append(nbformat.v4.new_code_cell('assert True\nprint(1)', outputs=[shows]))
    cells.append(nbformat.v4.new_markdown_cell('assert'))
    nb = nbformat.v4.new_notebook(cells=cells)
    for fname in '10_room.ipynb', 'tutorial.ipynb': nbformat.write(nb, tmp_path/fname)
    main(tmp_path)
    room, tutorial = (nbformat.read(tmp_path/f, 4) for f in ('10_room.ipynb', 'tutorial.ipynb'))
    is_folded = [cell.source.startswith(FOLDED) for cell in room.cells]
    assert is_folded == [False, True, True, False, True, True, False, False]
    assert room.cells[1].source == FOLDED+code[1]
    assert not fold_tests(room), 'a second time changes nothing'
    assert [cell.source for cell in tutorial.cells] == [cell.source for cell in cells]

def stage(
    tree:Path, # copy of the project
    *args:str, # of nbdev_proc_nbs
) -> Path:     # what Quarto would render
    "Stage with a quarto that does nothing."
    stub = tree.parent/'bin'/'quarto'
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nexit 0\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    env = {k: v for k,v in os.environ.items() if k != 'IN_TEST'}
    env |= dict(PYTHONPATH=str(tree), PATH=f'{stub.parent}:{os.environ["PATH"]}')
    argv = [Path(sys.executable).with_name('nbdev_proc_nbs'), *args]
    done = subprocess.run(argv, cwd=tree, env=env, text=True, capture_output=True)
    assert not done.returncode and 'Traceback' not in done.stderr, done.stderr[-3000:]
    return tree/'_proc'

def check_staged(proc, pages):
    "Check titles, errors and doclinks of staged pages; return how many doclinks there are."
    n = Counter()
    for p in pages:
        nb = json.loads((proc/name(p)).read_text())
        outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
        assert re.search(r'^title: .+', ''.join(nb['cells'][0]['source']), re.M), p
        assert not [o for o in outputs if o['output_type'] == 'error'], p
        texts = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown']
        texts += [''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs]
        made = re.findall(r'\[`[^`\]]+`\]\(([^)]+\.html[^)]*)\)', '\n'.join(texts)) # by nbdev
        for target in made:
            n['doclinks'] += 1
            page, _, _ = target.removeprefix('https://kshot.github.io/kshot/').partition('#')
            local = page.removesuffix('.html')
            assert '://' in local or local in ROOMS or (NBS/f'{local}.ipynb').exists(), (p, target)
    return n

@pytest.mark.slow
def test_staging(tmp_path):
    "Every page goes through nbdev's processors, and the doclinks that they make lead to pages."
    proc = stage(copy_tree(tmp_path/'tree'), '--n_workers', '2')
    staged = sorted(p.relative_to(proc).as_posix() for p in proc.rglob('*.ipynb'))
    assert staged == sorted(map(name, PAGES))
    looks = '404.qmd styles.css light.scss dark.scss figures.html images/k_pays.png images/favicon.svg'
    for f in ('_quarto.yml', 'nbdev.yml', *looks.split()):
        assert (proc/f).is_file(), f
    assert check_staged(proc, PAGES)['doclinks'] > 200
    main(proc)
    for page in map(ROOMS.get, ('nets/sharing', 'rank')):
        staged = json.loads((proc/name(page)).read_text())['cells']
        texts = [''.join(c['source']) for c in staged if c['cell_type'] == 'code']
        tests = [text for text in texts if 'test_eq(' in text]
        assert len(tests) > 5 and all(text.startswith(FOLDED) for text in tests), page
        references = [''.join(d.get('text/markdown', '')) for d in data_of(dict(cells=staged))]
        signatures = [m[4] for text in references for m in FENCE.finditer(text)]
        assert signatures and not any('](http' in text for text in signatures), page

