"""Do the tests notice? Make small changes to functions drawn at random, in a copy of the project.

Each change runs the notebooks and tests that should fail; results/mutations.json has a row a change.

    python tools/mutations.py --n 60 --seed 0   # goes on where it was stopped
    python tools/mutations.py --again           # only what nothing noticed and no `note` explains
"""
import argparse
import ast
import copy
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT/'tests'), str(ROOT/'tests'/'helpers')]
from conftest import copy_tree

FNAME = ROOT/'results'/'mutations.json'
MOST_ROOMS = 3 # other notebooks that judge a change, at most
# tests of other things, or slow ones
OTHERS = {'test_house', 'test_package', 'test_readme', 'test_site', 'test_distributed', 'test_reliability'}
OPPOSITE = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn,
            ast.Add: ast.Sub, ast.Mult: ast.Div, ast.And: ast.Or}
OPPOSITE |= {new: old for old,new in OPPOSITE.items()} | {ast.FloorDiv: ast.Mult}

class Change(NamedTuple):
    "One small change of a function."
    kind:str   # comparison, sign, constant ...
    source:str # of its cell, after the change
    line:str   # that it is in
    text:str   # 'old -> new'

# changes

def parts(
    node:ast.AST, # a function, or something in it
) -> Iterator[ast.AST]:
    "Yield what a change may touch: no annotations, no texts, no decorators."
    for name,value in ast.iter_fields(node):
        if name in ('annotation', 'returns', 'decorator_list'): continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.JoinedStr) or not isinstance(child, ast.AST): continue
            yield child
            yield from parts(child)

def edited(
    node:ast.AST, # copied
    edit:Callable[[ast.AST], object], # of the copy, in place
) -> str:
    "Return the source of a node after an edit."
    node = copy.deepcopy(node)
    edit(node)
    return ast.unparse(node)

def turn_operator(node:ast.AST): node.op = OPPOSITE[type(node.op)]()
def turn_comparison(node:ast.Compare): node.ops[0] = OPPOSITE[type(node.ops[0])]()

def other_constant(value:bool|int|float) -> bool|int|float:
    if isinstance(value, bool): return not value
    return value+1 if isinstance(value, int) else 2*value or 1.

def negated(test:ast.expr) -> str: return f'not ({ast.unparse(test)})'

def changes(
    node:ast.AST, # one of `parts`
) -> Iterator[tuple[str, ast.AST, str]]:
    "Yield the kind of a change, what it replaces, and by what."
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield 'comparison', node, edited(node, turn_comparison)
    if isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
        yield 'sign', node, edited(node, turn_operator)
    if isinstance(node, ast.BoolOp): yield 'and/or', node, f'({edited(node, turn_operator)})'
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield 'constant', node, repr(other_constant(node.value))
    if isinstance(node, ast.If | ast.IfExp | ast.While): yield 'branch', node.test, negated(node.test)
    if isinstance(node, ast.comprehension):
        for test in node.ifs: yield 'branch', test, negated(test)
    if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != 'None':
        yield 'return', node.value, 'None'
    if isinstance(node, ast.Call):
        if len(node.args) > 1: yield 'argument', node, edited(node, lambda call: call.args.pop())
        for i in range(len(node.keywords)):
            yield 'argument', node, edited(node, lambda call: call.keywords.pop(i))

def owner_of(
    function:ast.FunctionDef, # at the top of a cell
) -> str:
    "Return the class that a function is patched into, or ''."
    if not any('patch' in ast.unparse(decorator) for decorator in function.decorator_list): return ''
    annotation = function.args.args[0].annotation
    return ast.unparse(annotation) if annotation else ''

def functions_in(
    source:str, # of a cell
) -> Iterator[tuple[str, ast.FunctionDef]]:
    "Yield the functions of a cell with their class, or ''."
    for top in ast.parse(source).body:
        if isinstance(top, ast.FunctionDef): yield owner_of(top), top
        if not isinstance(top, ast.ClassDef): continue
        yield from ((top.name, inner) for inner in top.body if isinstance(inner, ast.FunctionDef))

def mutants(
    room:str,   # its module
    source:str, # of a cell
) -> dict[str, list[Change]]: # function -> its changes
    "Return all changes of a cell's functions."
    lines = source.encode().splitlines(keepends=True)

    def offset(line, column): return sum(map(len, lines[:line-1])) + column # in bytes
    out = {}
    for owner,function in functions_in(source):
        all_changes = out.setdefault('.'.join(filter(None, (room, owner, function.name))), [])
        for part in parts(function):
            for kind,node,new in changes(part):
                start = offset(node.lineno, node.col_offset)
                end = offset(node.end_lineno, node.end_col_offset)
                old = source.encode()[start:end].decode()
                whole = source.encode()[:start] + new.encode() + source.encode()[end:]
                line = lines[node.lineno-1].decode().strip()
                all_changes.append(Change(kind, whole.decode(), line, f'{old} -> {new}'))
    return {function: found for function,found in out.items() if found}

# who judges

def room_of(
    fname:Path, # notebook
    nbs:Path,   # folder of all
) -> str:
    "Return the module that a notebook exports."
    *wing, name = fname.relative_to(nbs).with_suffix('').parts
    return '.'.join([*wing, name.partition('_')[2]])

class Rooms:
    "The notebooks of a copy of the project, and the changes that can be made to them."
    def __init__(self,
        tree:Path, # the copy
    ):
        self.tree = tree
        self.fnames = {room_of(f, tree/'nbs'): f for f in sorted((tree/'nbs').rglob('[0-9]*.ipynb'))}
        self.text = {}
        self.mutants = {} # function -> (room, cell, its changes)
        for room,fname in self.fnames.items():
            cells = json.loads(fname.read_text())['cells']
            sources = [''.join(cell['source']) if cell['cell_type'] == 'code' else '' for cell in cells]
            self.text[room] = '\n'.join(sources)
            for i,source in enumerate(sources):
                if not re.match(r'#\| *export', source): continue
                for function,found in mutants(room, source).items(): self.mutants[function] = (room, i, found)

    def judges(self,
        function:str, # its room and name
    ) -> list[str]:
        "Return who should notice a change: the room, others that use the name, tests of the module."
        room = self.mutants[function][0]
        name = function.rpartition('.')[2]
        module = re.escape(f'kshot.{room}')

        def uses(text): return re.search(rf'\b{re.escape(name)}\b', text) and re.search(rf'{module}\b', text)
        rooms = [other for other,text in self.text.items() if other != room and uses(text)]
        named = re.compile(rf'{module}\b|kshot_{room.rpartition(".")[2]}\b')
        files = [f for f in sorted((self.tree/'tests').glob('test_*.py')) if f.stem not in OTHERS]
        tests = [f.name for f in files if named.search(f.read_text())]
        return [room, *rooms[:MOST_ROOMS], *tests]

def judge(
    rooms:Rooms, # of a copy
    name:str,    # a room or a test file
):
    "Run a notebook or a test file in this process, and end it with 1 if that fails."
    os.chdir(rooms.tree)
    sys.path.insert(0, str(rooms.tree))
    with open(os.devnull, 'w') as nowhere:
        for fd in 1, 2: os.dup2(nowhere.fileno(), fd)
    if name in rooms.fnames:
        from nbdev.test import test_nb
        is_fine,_ = test_nb(rooms.fnames[name], skip_flags=['slow', 'cuda'], showerr=False)
        sys.exit(not is_fine)
    import pytest
    sys.exit(int(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', f'tests/{name}'])))

def export(
    tree:Path,  # the copy
    fname:Path, # notebook
):
    "Export a notebook in this process."
    os.chdir(tree)
    from nbdev.export import nb_export
    nb_export(fname, lib_path=tree/'kshot')

def passes(
    limit:float, # seconds
    work,        # `judge` or `export`
    *args,       # of it
) -> bool:
    "Return whether a process that does this ends well, and in time."
    # forked: what is imported here need not be imported again
    process = get_context('fork').Process(target=work, args=args)
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return False
    return process.exitcode == 0

def undisturbed_seconds(
    rooms:Rooms, # of a copy, unchanged
    name:str,    # of a judge
) -> int|None:   # None: it fails even so
    "Return how long a judge takes without a change."
    start = time.monotonic()
    seconds = round(time.monotonic() - start) if passes(200, judge, rooms, name) else None
    print(f'  {name}: {seconds} s', flush=True)
    return seconds

def who_notices(
    rooms:Rooms,   # of a copy
    function:str,  # that is broken
    source:str,    # its cell after the change
    seconds:dict,  # judge -> seconds without a change, None where it fails even so; filled
) -> str:
    "Return the first judge that fails, '' if none does."
    room, i, _ = rooms.mutants[function]
    fname = rooms.fnames[room]
    module = rooms.tree/'kshot'/f'{room.replace(".", "/")}.py'
    before = fname.read_text(), module.read_text()
    broken = json.loads(fname.read_text())
    broken['cells'][i]['source'] = source
    for name in rooms.judges(function):
        if name not in seconds: seconds[name] = undisturbed_seconds(rooms, name)
        if seconds[name] is None: continue
        try:
            fname.write_text(json.dumps(broken))
            if not passes(60, export, rooms.tree, fname): return 'export'
            if not passes(60 + 5*seconds[name], judge, rooms, name): return name
        finally:
            fname.write_text(before[0])
            module.write_text(before[1])
    return ''

# the table

class Table:
    "Rows of results/mutations.json, written after every change."
    def __init__(self,
        rooms:Rooms, # of a copy
        seed:int,    # of this run
        **about,     # versions, commit and machine
    ):
        record = json.loads(FNAME.read_text()) if FNAME.exists() else {}
        self.rooms = rooms
        self.rows = record.get('rows', [])
        self.seconds = record.get('seconds', {})
        self.about = about | dict(seeds=sorted({*record.get('seeds', []), seed}))

    def try_change(self, function:str, change:Change):
        "Break a function, and note who notices."
        key = dict(function=function, line=change.line, change=change.text)
        row = next((row for row in self.rows if key.items() <= row.items()), None)
        if row is None:
            row = key
            self.rows.append(row)
        row['noticed_by'] = who_notices(self.rooms, function, change.source, self.seconds)
        print(f'{function}: {change.text}\n  {row["noticed_by"] or "NOTHING"}', flush=True)
        self.write()

    def write(self):
        missed = [row for row in self.rows if not row['noticed_by']]
        explained = [row for row in missed if row.get('note')]
        counts = dict(n=len(self.rows), noticed=len(self.rows)-len(missed), explained=len(explained))
        record = dict(**counts, seconds=self.seconds, **self.about, rows=self.rows)
        FNAME.with_suffix('.tmp').write_text(json.dumps(record, indent=1, ensure_ascii=False) + '\n')
        FNAME.with_suffix('.tmp').replace(FNAME)

    def try_again(self):
        "Try the changes that nothing has noticed and nobody has explained."
        for row in [row for row in self.rows if not row['noticed_by'] and not row.get('note')]:
            _,_,found = self.rooms.mutants.get(row['function'], (None, None, []))
            change = next((c for c in found if (c.line, c.text) == (row['line'], row['change'])), None)
            if change: self.try_change(row['function'], change)
            else: print(f'{row["function"]}: {row["change"]} is no change of what it is now', flush=True)

def draw(
    rng:random.Random, # of the run
    found:list[Change], # of one function
) -> Change:
    "Draw a kind of change, and then a change of that kind."
    kinds = {}
    for change in found: kinds.setdefault(change.kind, []).append(change)
    return rng.choice(kinds[rng.choice(sorted(kinds))])

def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument('--n', type=int, default=60, help='functions in all')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rooms', nargs='*', help='modules to draw from, such as nets.ops (default: all)')
    parser.add_argument('--again', action='store_true', help='only changes that nothing has noticed')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tree = copy_tree(Path(tmp)/'tree')
        for name in 'tests', 'results': subprocess.run(['cp', '-r', ROOT/name, tree], check=True)
        os.environ |= dict(PYTHONPATH=str(tree), KSHOT_HOME=f'{tmp}/home')
        os.environ |= dict(OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
        ask = 'import json, kshot.record as r; print(json.dumps(r.environment()))'
        about = json.loads(subprocess.check_output([sys.executable, '-c', ask], cwd=ROOT))
        # once for all processes; not fastai, which patches tensors
        import ipywidgets, optuna, plotly.graph_objects, sklearn.datasets, torch, torchvision # noqa: F401
        torch.set_num_threads(1)
        rooms = Rooms(tree)
        table = Table(rooms, args.seed, **about)
        if args.again:
            table.try_again()
            return
        rng = random.Random(args.seed)
        functions = sorted(f for f,(room,*_) in rooms.mutants.items() if not args.rooms or room in args.rooms)
        rng.shuffle(functions)
        for function in functions:
            # drawn also where it is done, so that the others stay the same
            change = draw(rng, rooms.mutants[function][2])
            is_done = function in {row['function'] for row in table.rows}
            if len(table.rows) < args.n and not is_done: table.try_change(function, change)

if __name__ == '__main__': main()
