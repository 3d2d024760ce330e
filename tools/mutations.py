"""Do the tests notice? Breaks functions drawn at random, one small change each, in a copy of the project, and runs what should fail.

    python tests/mutations.py --n 60 --seed 0        # goes on where it was stopped; results/mutations.json has a row a change
    python tests/mutations.py --again                # only what nothing has noticed and nobody has explained in its `note`
"""
import argparse, ast, copy, json, os, random, re, subprocess, sys, tempfile, time
from multiprocessing import get_context
from pathlib import Path

from conftest import ROOT, copy_tree

FNAME, FEW = ROOT/'results'/'mutations.json', 3 # at most so many other notebooks are asked
OTHERS = {'test_house', 'test_package', 'test_readme', 'test_site', 'test_distributed', 'test_reliability'} # of other things, or slow
SWAP = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
        ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
        ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}

def parts(
    node:ast.AST, # a function, or what is in it
):
    "What a change may touch: no annotations, no texts, no decorators."
    for name,value in ast.iter_fields(node):
        if name in ('annotation', 'returns', 'decorator_list'): continue
        for o in value if isinstance(value, list) else [value]:
            if isinstance(o, ast.JoinedStr) or not isinstance(o, ast.AST): continue
            yield o
            yield from parts(o)

def changes(
    node:ast.AST, # one of `parts`
):
    "Kind of change, what to change, and what stands there afterwards (None: `not` before it)."
    def swapped(edit): n = copy.deepcopy(node); edit(n); return ast.unparse(n)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield 'comparison', node, swapped(lambda n: n.ops.__setitem__(0, SWAP[type(n.ops[0])]()))
    if isinstance(node, ast.BinOp) and type(node.op) in SWAP: yield 'sign', node, swapped(lambda n: setattr(n, 'op', SWAP[type(n.op)]()))
    if isinstance(node, ast.BoolOp): yield 'and/or', node, f"({swapped(lambda n: setattr(n, 'op', SWAP[type(n.op)]()))})"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        v = node.value
        yield 'constant', node, repr(not v if isinstance(v, bool) else v+1 if isinstance(v, int) else 2*v or 1.)
    if isinstance(node, ast.If | ast.IfExp | ast.While): yield 'branch', node.test, None
    if isinstance(node, ast.comprehension): yield from (('branch', test, None) for test in node.ifs)
    if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != 'None': yield 'return', node.value, 'None'
    if isinstance(node, ast.Call):
        if len(node.args) > 1: yield 'argument', node, swapped(lambda n: n.args.pop())
        for i in range(len(node.keywords)): yield 'argument', node, swapped(lambda n: n.keywords.pop(i))

def mutants(
    module:str, # of the package
    src:str,    # of a cell that it comes from
) -> dict:      # function -> list of (kind, cell after the change, the line that it is in, 'old -> new')
    "All changes of a cell's functions."
    lines, out = src.encode().splitlines(keepends=True), {}
    at = lambda line, col: sum(map(len, lines[:line-1]))+col # the bytes before a place
    for top in ast.parse(src).body:
        for f in top.body if isinstance(top, ast.ClassDef) else [top]:
            if not isinstance(f, ast.FunctionDef): continue
            owner = top.name if f is not top else next((ast.unparse(a.annotation) for a in f.args.args[:1]
                if a.annotation and any('patch' in ast.unparse(d) for d in f.decorator_list)), '')
            found = out.setdefault('.'.join(filter(None, (module, owner, f.name))), [])
            for kind,node,new in (c for p in parts(f) for c in changes(p)):
                a, b = at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)
                old = src.encode()[a:b].decode()
                new = f'not ({old})' if new is None else new
                whole = src.encode()[:a]+new.encode()+src.encode()[b:]
                found.append((kind, whole.decode(), lines[node.lineno-1].decode().strip(), f'{old} -> {new}'))
    return {k: v for k,v in out.items() if v}

class Rooms:
    "Notebooks of a copy of the project, and the changes that can be made to them."
    def __init__(self,
        tree:Path, # the copy
    ):
        self.tree, self.found = tree, {} # function -> (notebook, cell, mutants)
        self.nbs = {f.stem.partition('_')[2]: f for f in sorted((tree/'nbs').glob('[0-9]*.ipynb'))}
        self.text = {name: '\n'.join(''.join(c['source']) for c in json.loads(f.read_text())['cells']) for name,f in self.nbs.items()}
        for name,f in self.nbs.items():
            for i,c in enumerate(json.loads(f.read_text())['cells']):
                src = ''.join(c['source'])
                if c['cell_type'] != 'code' or not re.match(r'#\| *export', src): continue
                for k,v in mutants(name, src).items(): self.found[k] = (name, i, v)

    def judges(self,
        function:str, # 'module.name' or 'module.Class.name'
    ) -> list[str]:
        "What should notice a change: the room, other rooms that use the name, tests that name the module."
        module, name = function.split('.')[0], function.split('.')[-1]
        used = lambda text: re.search(rf'\b{re.escape(name)}\b', text) and re.search(rf'kshot\.{module}\b|import.*\b{module}\b', text)
        rooms = [f'{n}.ipynb' for n,t in self.text.items() if n != module and used(t)]
        word = re.compile(rf'kshot\.{module}\b|kshot_{module}\b')
        tests = [f for f in sorted((self.tree/'tests').glob('test_*.py')) if f.stem not in OTHERS and word.search(f.read_text())]
        return [f'{module}.ipynb', *rooms[:FEW], *(f.name for f in tests)]

def judge(rooms:Rooms, name:str): # in a process of its own, which a failure ends with 1
    os.chdir(rooms.tree); sys.path.insert(0, str(rooms.tree))
    with open(os.devnull, 'w') as nowhere:
        for fd in 1, 2: os.dup2(nowhere.fileno(), fd)
    if name.endswith('.ipynb'):
        from nbdev.test import test_nb
        sys.exit(not test_nb(rooms.nbs[Path(name).stem], skip_flags=['slow', 'cuda'], showerr=False)[0])
    import pytest
    sys.exit(int(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', f'tests/{name}'])))

def export(tree:Path, fname:Path): os.chdir(tree); from nbdev.export import nb_export; nb_export(fname, lib_path=tree/'kshot')

def passes(
    limit:float, # seconds
    work,        # `judge` or `export`
    *args,       # of it
) -> bool:
    "Does a process that does this end well, and in time?"
    p = get_context('fork').Process(target=work, args=args) # what is imported here need not be imported again
    p.start(); p.join(limit)
    is_done = p.exitcode is not None
    if not is_done: p.kill(); p.join()
    return is_done and p.exitcode == 0

def who_notices(
    rooms:Rooms,   # of a copy
    function:str,  # that is broken
    src:str,       # its cell after the change
    times:dict,    # judge -> seconds without a change, None where it fails even so; filled
) -> str:
    "The first judge that fails, '' if none does."
    room, i, _ = rooms.found[function]
    nb, module = rooms.nbs[room], rooms.tree/'kshot'/f'{room}.py'
    before, whole = (nb.read_text(), module.read_text()), json.loads(nb.read_text())
    whole['cells'][i]['source'] = src
    for name in rooms.judges(function):
        if name not in times:
            start = time.monotonic()
            times[name] = round(time.monotonic()-start) if passes(200, judge, rooms, name) else None
            print(f'  {name}: {times[name]} s', flush=True)
        if times[name] is None: continue
        try:
            nb.write_text(json.dumps(whole))
            if not passes(60, export, rooms.tree, nb): return 'export'
            if not passes(60+5*times[name], judge, rooms, name): return name
        finally: nb.write_text(before[0]); module.write_text(before[1])
    return ''

def write(rows:list, **about): # after every row
    missed = [r for r in rows if not r['noticed_by']]
    record = dict(n=len(rows), noticed=len(rows)-len(missed), explained=sum(bool(r.get('note')) for r in missed), **about, rows=rows)
    FNAME.with_suffix('.tmp').write_text(json.dumps(record, indent=1, ensure_ascii=False)+'\n'); FNAME.with_suffix('.tmp').replace(FNAME)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, default=60, help='functions in all')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rooms', nargs='*', help='modules to draw from (default: all)')
    parser.add_argument('--again', action='store_true', help='only changes that nothing has noticed')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tree = copy_tree(Path(tmp)/'tree')
        for name in 'tests', 'results': subprocess.run(['cp', '-r', ROOT/name, tree], check=True)
        os.environ |= dict(PYTHONPATH=str(tree), KSHOT_HOME=f'{tmp}/home', OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
        said = subprocess.check_output([sys.executable, '-c', 'import json, kshot.record as r; print(json.dumps(r.environment()))'], cwd=ROOT)
        import ipywidgets, optuna, plotly.graph_objects, sklearn.datasets, torchvision # once for all processes; not fastai, it patches tensors
        torch = sys.modules['torch']; torch.set_num_threads(1)
        found = json.loads(FNAME.read_text()) if FNAME.exists() else {}
        rooms, rows, times = Rooms(tree), found.get('rows', []), found.get('seconds', {})
        seeds = sorted({*found.get('seeds', []), args.seed})
        rng = random.Random(args.seed)
        order = sorted(f for f in rooms.found if not args.rooms or f.split('.')[0] in args.rooms)
        rng.shuffle(order)
        def done(function, line, change, src):
            row = next((r for r in rows if (r['function'], r['line'], r['change']) == (function, line, change)), None)
            if row is None: rows.append(row := dict(function=function, line=line, change=change))
            row['noticed_by'] = who_notices(rooms, function, src, times)
            print(f'{function}: {change}\n  {row["noticed_by"] or "NOTHING"}', flush=True)
            write(rows, seconds=times, seeds=seeds, **json.loads(said))
        if args.again:
            for r in [r for r in rows if not r['noticed_by'] and not r.get('note')]:
                src = next((s for _,s,l,c in rooms.found.get(r['function'], (0, 0, []))[2] if (l, c) == (r['line'], r['change'])), None)
                if src: done(r['function'], r['line'], r['change'], src)
                else: print(f'{r["function"]}: {r["change"]} is no change of what it is now', flush=True)
            return
        for function in order:
            kinds = {}
            for kind,*m in rooms.found[function][2]: kinds.setdefault(kind, []).append(m)
            src, line, change = rng.choice(kinds[rng.choice(sorted(kinds))]) # drawn also where it is done, so that the others stay the same
            if len(rows) < args.n and function not in {r['function'] for r in rows}: done(function, line, change, src)

if __name__ == '__main__': main()
