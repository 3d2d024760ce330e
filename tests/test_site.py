"The site without Quarto: every link, doclink, picture and command of every page, what Quarto is given, and staging"
import ast, builtins, io, json, os, re, shlex, signal, stat, subprocess, sys
from collections import Counter
from configparser import ConfigParser
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat, pytest, yaml
from conftest import ROOT, copy_tree
from staged import NO_WIDGET, PLOTLY, WIDGET, convert, main

NBS = ROOT/'nbs'
PAGES = sorted(p for p in NBS.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(NBS).parts))
TEXTS = [*PAGES, ROOT/'README.md', ROOT/'CHANGELOG.md']
CFG = yaml.safe_load((ROOT/'_quarto.yml').read_text())
SETTINGS = ConfigParser(delimiters='=', interpolation=None)
SETTINGS.read(ROOT/'settings.ini')
SCRIPTS = dict(o.split('=') for o in SETTINGS['DEFAULT']['console_scripts'].split())
SPEAKS = ('kshot_', 'kshot.cli.launch') # a command is one of ours
LINK, CODE = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)'), re.compile(r'(?<!`)`([^`\n]+)`(?!`)')
FENCE = re.compile(r'^( *)(```+)(\w*)[^\n]*\n(.*?)^ *\2 *$', re.M|re.S)

name = lambda p: p.relative_to(NBS if NBS in p.parents else ROOT).as_posix()
ROOMS = {p.stem.partition('_')[2]: p for p in PAGES if p.parent == NBS and p.name[0].isdigit()} # module -> its page
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

text_of = lambda page: FENCE.sub('', prose(page)) # without code blocks
slug = lambda s: re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', s)).strip().lower()).lstrip('0123456789-.')

@cache
def anchors(page) -> set[str]: # as pandoc makes them
    return {slug(m[1]) for m in re.finditer(r'^#+ +(.+?)(?: *\{.*\})? *$', text_of(page), re.M)}

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
    if url.scheme or url.netloc: return None if url.scheme in ('http', 'https') and re.fullmatch(r'[\w-]+(\.[\w-]+)+(:\d+)?', url.netloc) else 'malformed'
    there = (page.parent/unquote(url.path)).resolve() if url.path else page
    if there.parent == NBS and there.suffix == '.html': there = ROOMS.get(there.stem, there) # as nbdev calls the page of a room
    if not there.exists(): return 'no such file'
    if NBS in page.parents and NBS not in there.parents: return 'leaves the site'
    if url.fragment and (there.suffix not in ('.ipynb', '.md') or slug(url.fragment) not in anchors(there)): return 'no such heading'

@cache
def resolves(
    said:str, # dotted name
) -> bool:    # is it a module, or in one?
    "Does a name such as `kshot.rank.kendall_tau` exist?"
    module, rest = 'kshot', said.split('.')[1:]
    while rest and (ROOT/(f'{module}.{rest[0]}'.replace('.', '/') + '.py')).exists(): module, rest = f'{module}.{rest[0]}', rest[1:]
    o = import_module(module)
    for r in rest:
        o = getattr(o, r, None)
        if o is None: return False
    return True

def doclinks(page) -> list[str]: # names of the package in backticks
    return [m[1] for m in CODE.finditer(text_of(page)) if re.fullmatch(r'kshot(\.\w+)+', m[1])]

def test_links(record_property):
    found = [(name(p), *o) for p in TEXTS for o in links(p)]
    said = [(name(p), o) for p in TEXTS for o in doclinks(p)]
    counts = dict(links=len(found), inside=sum('//' not in o[3] for o in found), pictures=sum(o[1] for o in found), doclinks=len(said), pages=len(TEXTS))
    record_property('said', '{links} links ({inside} inside the site, {pictures} pictures), {doclinks} doclinks in {pages} pages'.format(**counts))
    bad = [(p, t, why) for p,_,_,t in found if (why := problem(NBS/p if (NBS/p).exists() and p.endswith('.ipynb') else ROOT/p, t))]
    assert not bad
    assert not [o for o in found if o[1] and len(o[2]) < 12], 'a picture needs a text that says what it shows'
    assert not [o for o in said if not resolves(o[1])]
    assert min(counts.values()) > 0

def test_the_checker_sees():
    page = NBS/'tutorials'/'quickstart.ipynb'
    assert not problem(page, '../index.ipynb') and not problem(page, 'own_space.ipynb#the-network') and not problem(page, '../rank.html') and not problem(page, 'https://arxiv.org/abs/2106.06442')
    for bad in 'nowhere.ipynb', '../nowhere.html', '../index.ipynb#nowhere', '../../README.md', 'https://', 'http:/arxiv.org', 'ftp://arxiv.org/x': assert problem(page, bad), bad
    assert resolves('kshot.rank.kendall_tau') and resolves('kshot.supernet') and not resolves('kshot.rank.kendal')
    assert LINK.findall('a [b [c]](d.ipynb) ![e](f.png)') == [('', 'b [c]', 'd.ipynb'), ('!', 'e', 'f.png')]

@each_page
def test_title_and_summary(page):
    assert re.match(r'# \S.*\n\n> \S.{15,}', prose(page)), 'a page begins with "# Title" and "> one sentence"'
    assert len(re.findall(r'^# ', text_of(page), re.M)) == 1

@each_page
def test_no_raw_errors(page):
    for c in cells(page):
        for o in c.get('outputs', []):
            text = ''.join(o.get('text', '')) + ''.join(o.get('data', {}).get('text/plain', ''))
            assert o['output_type'] != 'error' and o.get('name') != 'stderr' and 'Traceback (most recent call last)' not in text
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

@pytest.mark.parametrize('page', ROOMS.values(), ids=name)
def test_what_staging_runs(page):
    "To document a room nbdev runs its exported cells and those with an import, and no others: these must not need the others."
    runs, known = [], set(dir(builtins)) | {'__file__', '__name__'}
    for c in cells(page):
        src = ''.join(c['source'])
        if c['cell_type'] != 'code' or re.search(r'^#\| *eval: *false', src, re.M): continue
        if re.search(r'^#\| *export', src, re.M): known |= names(src)[0]
        elif any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(ast.parse(src))): runs.append(src)
    for src in runs:
        bound, read = names(src)
        known |= bound
        assert not (lacks := read - known), f'{lacks} in {src[:80]!r}: put the import into the hidden cell of imports'

def commands() -> list[tuple[str, str, list[str]]]: # page, command of the package, its arguments
    out = []
    for p in TEXTS:
        for line in (l for b in blocks(p, 'sh', 'bash') for l in b.replace('\\\n', ' ').splitlines() if any(s in l for s in SPEAKS)):
            for part in re.split(r'[;|&]+', line):
                words = shlex.split(part, comments=True)
                for i,w in enumerate(words):
                    if w == 'kshot.cli.launch' and words[i-1] == '-m': out.append((name(p), f'kshot_{words[i+1]}', words[i+2:])); break
                    if re.fullmatch(r'kshot_\w+', w): out.append((name(p), w, words[i+1:])); break
    return out

@cache
def help_of(command) -> str:
    module, func = SCRIPTS[command].split(':')
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit): getattr(import_module(module), func)(['--help'])
    return out.getvalue()

def test_commands_and_their_options_exist():
    assert len(found := commands()) > 20
    for page,command,args in found:
        assert command in SCRIPTS, (page, command)
        options = [a.partition('=')[0] for a in args if re.match(r'--\w', a)]
        unknown = [o for o in options if not re.search(rf'(?<![\w-]){o}(?![\w-])', help_of(command))]
        assert not unknown, (page, command, unknown)

def test_scripts_are_shell():
    for p in TEXTS:
        for b in blocks(p, 'sh', 'bash'):
            done = subprocess.run(['bash', '-n'], input=b, text=True, capture_output=True)
            assert not done.returncode, (name(p), done.stderr)

SLURM = dict( # commands that stand in: each notes how it was called; a step works until somebody interrupts it
    scontrol='[ "$1" = show ] && echo host0 || echo "scontrol $*" >> log',
    scancel='echo "scancel $1" >> log; kill $(cat pid)', # a shell's background job ignores INT; a step of Slurm's is none
    srun='echo "srun ${*##* }" >> log; [ -e fails ] && exit 3; [ -e quick ] && exit 0; trap "echo saved >> log; exit 130" TERM; echo $$ > pid; read < never')

@pytest.mark.parametrize('world,log', [('never', 'srun, scancel --signal=INT, saved, scontrol requeue 7'), ('fails', 'srun'), ('quick', 'srun, srun')])
def test_slurm_job(tmp_path, world, log):
    "Time that is up is asked for again, a failure is not, and a search follows the training."
    script, = [b for b in blocks(NBS/'do'/'cluster.ipynb', 'sh') if 'requeue' in b]
    for name,body in SLURM.items():
        (tmp_path/name).write_text(f'#!/bin/bash\n{body}\n'); (tmp_path/name).chmod(0o755)
    (tmp_path/'.venv/bin').mkdir(parents=True); (tmp_path/'.venv/bin/activate').touch(); os.mkfifo(tmp_path/'never')
    if world != 'never': (tmp_path/world).touch()
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_JOB_NODELIST='host0', SLURM_NNODES='2', SLURM_JOB_ID='7')
    job = subprocess.Popen(['bash', '-c', script], cwd=tmp_path, env=env)
    if world == 'never':
        never = os.open(tmp_path/'never', os.O_WRONLY) # opens when the step is at its read
        job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == dict(never=1, fails=1, quick=0)[world]
    assert re.sub(r'(srun).*', r'\1', (tmp_path/'log').read_text()).splitlines() == log.split(', ')

def test_python_blocks_parse():
    for p in TEXTS:
        for b in blocks(p, 'python'): ast.parse(b)

def test_sections():
    top = {o['section']: o['contents'] for o in CFG['website']['sidebar']['contents'] if isinstance(o, dict)}
    assert list(top) == 'Start Learn Do API Results Papers'.split()
    hrefs = [o['href'] for o in CFG['website']['navbar']['left']]
    assert all((NBS/h).exists() for h in hrefs) and len(set(hrefs)) == len(hrefs)
    assert CFG['website']['search'] and CFG['format']['html']['html-math-method'] == 'mathml'
    assert set(CFG['format']['html']['theme']) == {'light', 'dark'}

def test_nothing_is_fetched_for_the_looks():
    html = CFG['format']['html']
    files = {f for t in html['theme'].values() for f in t if f != 'default'} | {html['css'], html['include-after-body']}
    for f in files: assert not re.search(r'https?:|@import|url\(', (NBS/f).read_text()), f

def test_quarto_gets_what_it_can_show(tmp_path):
    "Figures and tables become raw HTML, widgets a sentence, and their data is that of the notebook."
    page = NBS/'tutorials'/'quickstart.ipynb'
    nb, was = (json.loads(page.read_text()) for _ in range(2))
    nb['metadata']['widgets'] = {}
    assert convert(nb)
    pairs = [(a['data'], b['data']) for c,d in zip(was['cells'], nb['cells']) for a,b in zip(c.get('outputs', []), d.get('outputs', [])) if 'data' in a]
    figures = [(a[PLOTLY], b) for a,b in pairs if PLOTLY in a]
    assert len(figures) >= 2
    for a,b in figures:
        fig = re.search(r'<script type="application/json">(.*?)</script>', b['text/markdown'])[1]
        assert json.loads(fig) == {k: a[k] for k in ('data', 'layout')}
    assert sum(b.get('text/markdown') == NO_WIDGET for _,b in pairs) == sum(WIDGET in a for a,_ in pairs) > 0
    assert not [b for _,b in pairs if {'text/html', PLOTLY, WIDGET} & b.keys()] and 'widgets' not in nb['metadata']
    assert not convert(nb), 'a second time changes nothing'
    (tmp_path/'tutorials').mkdir()
    (tmp_path/'tutorials'/page.name).write_text(page.read_text())
    main(tmp_path)
    nbformat.validate(nbformat.read(tmp_path/'tutorials'/page.name, 4))
    assert (js := (tmp_path/'figures.js').read_text()).count('kshotTemplates = {light: {') == 1 and 'plotly.js v' in js[:200]

def stage(
    tree:Path, # copy of the project
    *args:str, # of nbdev_proc_nbs
) -> Path:     # what Quarto would render
    "Stage with a quarto that does nothing."
    stub = tree.parent/'bin'/'quarto'
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nexit 0\n'); stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    env = {k: v for k,v in os.environ.items() if k != 'IN_TEST'} | dict(PYTHONPATH=str(tree), PATH=f'{stub.parent}:{os.environ["PATH"]}')
    done = subprocess.run([Path(sys.executable).with_name('nbdev_proc_nbs'), *args], cwd=tree, env=env, text=True, capture_output=True)
    assert not done.returncode and 'Traceback' not in done.stderr, done.stderr[-3000:]
    return tree/'_proc'

def check_staged(proc, pages):
    n = Counter()
    for p in pages:
        nb = json.loads((proc/name(p)).read_text())
        md = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
        shown = '\n'.join(''.join(o.get('data', {}).get('text/markdown', '')) for c in nb['cells'] for o in c.get('outputs', []))
        assert re.search(r'^title: .+', ''.join(nb['cells'][0]['source']), re.M), p
        assert not [o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error'], p
        for target in re.findall(r'\[`[^`\]]+`\]\(([^)]+\.html[^)]*)\)', md + shown): # those that nbdev made
            n['doclinks'] += 1
            local = re.sub(r'^https://kshot\.github\.io/kshot/', '', target).partition('#')[0].removesuffix('.html')
            assert '://' in local or local in ROOMS or (NBS/f'{local}.ipynb').exists(), (p, target)
    return n

@pytest.mark.slow
def test_staging(tmp_path):
    "Every page goes through nbdev's processors, and the doclinks that they make lead to pages."
    proc = stage(copy_tree(tmp_path/'tree'), '--n_workers', '2')
    assert sorted(p.relative_to(proc).as_posix() for p in proc.rglob('*.ipynb')) == sorted(map(name, PAGES))
    for f in '_quarto.yml nbdev.yml styles.css light.scss dark.scss figures.html images/digits_kshot.png'.split(): assert (proc/f).is_file(), f
    assert check_staged(proc, PAGES)['doclinks'] > 200
