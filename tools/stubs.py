"""What type checkers read: a stub beside every module of a built package, with the methods that `@patch` adds in their classes"""
import ast, sys
from pathlib import Path

KEPT = {'contextmanager', 'dataclass', 'property', 'cached_property', 'classmethod', 'staticmethod', 'setter'} # decorators that a caller sees
TYPES = {'dict', 'list', 'tuple', 'set', 'Callable', 'Mapping', 'Sequence', 'Iterator'} # a subscript of these is a type
DOTS = ast.Constant(...)

def last(e:ast.expr) -> str: # name of `a`, `m.a` or `m.a(...)`
    return last(e.func) if isinstance(e, ast.Call) else e.attr if isinstance(e, ast.Attribute) else e.id if isinstance(e, ast.Name) else ''

def kind(e:ast.expr) -> str: # type of a value, as far as it shows
    if isinstance(e, ast.Constant): return '_Any' if e.value is None else type(e.value).__name__
    if isinstance(e, ast.Call) and last(e) in ('dict', 'tuple', 'list', 'set'): return last(e)
    return {ast.Dict: 'dict', ast.List: 'list', ast.Tuple: 'tuple', ast.Set: 'set', ast.JoinedStr: 'str'}.get(type(e), '_Any')

def declared(name:str, annotation:ast.expr|str, value=None) -> ast.AnnAssign:
    if isinstance(annotation, str): annotation = ast.Name(annotation)
    return ast.AnnAssign(ast.Name(name), annotation, value, 1)

def function(f:ast.FunctionDef) -> ast.FunctionDef: # without body and defaults
    a = f.args
    for x,d in [*zip(a.args[::-1], a.defaults[::-1]), *zip(a.kwonlyargs, a.kw_defaults)]: # a default may show the type
        if d and not x.annotation and kind(d) in ('bool', 'int', 'float', 'str'): x.annotation = ast.Name(kind(d))
    a.defaults, a.kw_defaults = [DOTS for _ in a.defaults], [d and DOTS for d in a.kw_defaults]
    f.decorator_list, f.body = [d for d in f.decorator_list if last(d) in KEPT], [ast.Expr(DOTS)]
    return f

def attributes(methods:list[ast.FunctionDef]) -> dict[str, ast.expr|str]: # `self.name = ...` anywhere, with a type where it shows
    out:dict[str, ast.expr|str] = {}
    for f in methods:
        me, *rest = [x.arg for x in f.args.args] or ['']
        of = {x.arg: x.annotation for x in [*f.args.args, *f.args.kwonlyargs] if x.annotation}
        for n in ast.walk(f):
            if isinstance(n, ast.Call) and last(n) == 'store_attr': out |= {k: of.get(k, '_Any') for k in rest}
            if not isinstance(n, ast.Assign): continue
            for t in n.targets:
                pairs = zip(t.elts, n.value.elts) if isinstance(t, ast.Tuple) and isinstance(n.value, ast.Tuple) else [(t, n.value)]
                flat = [(x, v) for a,v in pairs for x in (a.elts if isinstance(a, ast.Tuple) else [a])]
                for x,v in flat:
                    if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id == me:
                        known = of.get(v.id) if isinstance(v, ast.Name) and f.name == '__init__' else None
                        out.setdefault(x.attr, known or '_Any')
    return out

def stub(
    source:str, # of a module
) -> str:       # of its stub
    "Signatures, classes with all their methods and attributes, and names of a module."
    body = ast.parse(source).body
    classes = {n.name: n for n in body if isinstance(n, ast.ClassDef)}
    for n in body: # methods go home
        if not isinstance(n, ast.FunctionDef) or not (by := [d for d in n.decorator_list if last(d).startswith('patch')]): continue
        cls = classes[ast.unparse(n.args.args[0].annotation)]
        words = {k.arg for k in getattr(by[0], 'keywords', [])}
        n.decorator_list = [ast.Name('property')]*('as_prop' in words) + [ast.Attribute(ast.Name(n.name), 'setter')]*('set_prop' in words)
        n.args.args[0].annotation = None
        n.in_class = True
        cls.body.append(n)
    out:list[ast.stmt] = [ast.parse('from typing import Any as _Any').body[0]]
    for n in body:
        if isinstance(n, ast.Import | ast.ImportFrom | ast.With):
            out += [exported(m) for m in ast.walk(n) if isinstance(m, ast.Import | ast.ImportFrom)]
        elif isinstance(n, ast.ClassDef): out.append(klass(n))
        elif isinstance(n, ast.FunctionDef) and not hasattr(n, 'in_class'):
            is_command = any(last(d) == 'command' for d in n.decorator_list)
            out += ast.parse(f'def {n.name}(argv: list[str]|None=...) -> None: ...').body if is_command else [function(n)]
        elif isinstance(n, ast.AnnAssign): out.append(declared(n.target.id, n.annotation))
        elif isinstance(n, ast.Assign): out += names(n)
    return ast.unparse(ast.fix_missing_locations(ast.Module(out, []))) + '\n'

def exported(n:ast.Import|ast.ImportFrom) -> ast.Import|ast.ImportFrom: # `a as a`: other modules may take it from here
    if isinstance(n, ast.ImportFrom):
        for a in n.names: a.asname = a.asname or a.name
    return n

def names(n:ast.Assign) -> list[ast.stmt]:
    v, found = n.value, [x.id for t in n.targets for x in (t.elts if isinstance(t, ast.Tuple) else [t]) if isinstance(x, ast.Name)]
    if found == ['__all__'] or isinstance(v, ast.Subscript) and last(v.value) in TYPES: return [n]
    made = v.elt if isinstance(v, ast.GeneratorExp) else v
    if last(made) == 'property': return [m for k in found for m in ast.parse(f'@property\ndef {k}(self): ...').body]
    return [declared(k, kind(v) if len(found) == 1 else '_Any') for k in found]

def klass(c:ast.ClassDef) -> ast.ClassDef:
    methods = [n for n in c.body if isinstance(n, ast.FunctionDef)]
    own = {n.target.id for n in c.body if isinstance(n, ast.AnnAssign)} | {f.name for f in methods}
    own |= {k for n in c.body if isinstance(n, ast.Assign) for k in (t.id for t in n.targets if isinstance(t, ast.Name))}
    found, body = attributes(methods), []
    for n in c.body:
        if isinstance(n, ast.AnnAssign):
            has_default = n.value and (last(n.value) != 'field' or any(k.arg.startswith('default') for k in n.value.keywords))
            body.append(declared(n.target.id, n.annotation, DOTS if has_default else None))
        elif isinstance(n, ast.Assign): body += names(n)
        elif isinstance(n, ast.FunctionDef): body.append(function(n))
        elif isinstance(n, ast.ClassDef): body.append(klass(n))
    is_tuple = any(last(b) == 'NamedTuple' for b in c.bases)
    c.body = [*([] if is_tuple else [declared(k, t) for k,t in found.items() if k not in own]), *body] or [ast.Expr(DOTS)]
    c.decorator_list = [d for d in c.decorator_list if last(d) in KEPT]
    return c

def write_stubs(
    package:Path, # folder of modules
    dest:Path,    # folder of the stubs
) -> list[Path]:  # their files
    "A stub for every module of a package but those that begin with _."
    files = [f for f in sorted(package.rglob('*.py')) if f.name[0] != '_']
    stubs = [(dest/f.relative_to(package)).with_suffix('.pyi') for f in files]
    for source,target in zip(files, stubs): target.write_text(stub(source.read_text(encoding='utf-8')), encoding='utf-8')
    return stubs

if __name__ == '__main__': write_stubs(Path(sys.argv[1]), Path(sys.argv[2]))
