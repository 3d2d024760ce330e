"""Write what type checkers read: a stub beside every module of a built package.

Type checkers cannot see methods that `@patch` adds to a class; in a stub they are in their class.
"""
import ast
import sys
from pathlib import Path

# decorators that callers see
KEPT = {'contextmanager', 'dataclass', 'property', 'cached_property', 'classmethod', 'staticmethod', 'setter'}
# a subscript of these is a type
TYPES = {'dict', 'list', 'tuple', 'set', 'Callable', 'Mapping', 'Sequence', 'Iterator', 'Literal'}
CONTAINERS = 'dict', 'tuple', 'list', 'set'
LITERALS = {ast.Dict: 'dict', ast.List: 'list', ast.Tuple: 'tuple', ast.Set: 'set', ast.JoinedStr: 'str'}
DOTS = ast.Constant(...)

def last_name(expr:ast.expr) -> str:
    "Return the name of `a`, `m.a` or `m.a(...)`; '' for anything else."
    if isinstance(expr, ast.Call): return last_name(expr.func)
    if isinstance(expr, ast.Attribute): return expr.attr
    return expr.id if isinstance(expr, ast.Name) else ''

def type_name(value:ast.expr) -> str:
    "Return the type of a value as far as it shows."
    if isinstance(value, ast.Constant): return '_Any' if value.value is None else type(value.value).__name__
    if isinstance(value, ast.Call) and last_name(value) in CONTAINERS: return last_name(value)
    return LITERALS.get(type(value), '_Any')

def declared(
    name:str, # of an attribute or a variable
    annotation:ast.expr|str, # its type
    value:ast.expr|None=None, # its default
) -> ast.AnnAssign:
    "Return `name: annotation`."
    if isinstance(annotation, str): annotation = ast.Name(annotation)
    return ast.AnnAssign(ast.Name(name), annotation, value, 1)

def stub_of_function(function:ast.FunctionDef) -> ast.FunctionDef:
    "Return a function without its body and the values of its defaults."
    args = function.args
    with_default = [*zip(args.args[::-1], args.defaults[::-1]), *zip(args.kwonlyargs, args.kw_defaults)]
    for parameter,default in with_default: # a default may show the type
        if default and not parameter.annotation and type_name(default) in ('bool', 'int', 'float', 'str'):
            parameter.annotation = ast.Name(type_name(default))
    args.defaults = [DOTS for _ in args.defaults]
    args.kw_defaults = [default and DOTS for default in args.kw_defaults]
    function.decorator_list = [d for d in function.decorator_list if last_name(d) in KEPT]
    function.body = [ast.Expr(DOTS)]
    return function

def elements(target:ast.expr) -> list[ast.expr]: # of a tuple
    return target.elts if isinstance(target, ast.Tuple) else [target]

def assigned(node:ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    "Return (target, value) of each thing that an assignment sets."
    pairs = []
    for target in node.targets:
        both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
        pairs += zip(target.elts, node.value.elts) if both else [(target, node.value)]
    return [(inner, value) for target,value in pairs for inner in elements(target)]

def attributes(methods:list[ast.FunctionDef]) -> dict[str, ast.expr|str]:
    "Return the attributes that methods set on `self`, with a type where it shows."
    out:dict[str, ast.expr|str] = {}
    for method in methods:
        this, *others = [a.arg for a in method.args.args] or ['']
        types = {a.arg: a.annotation for a in [*method.args.args, *method.args.kwonlyargs] if a.annotation}
        for node in ast.walk(method):
            if isinstance(node, ast.Call) and last_name(node) == 'store_attr':
                out |= {name: types.get(name, '_Any') for name in others}
            if not isinstance(node, ast.Assign): continue
            for target,value in assigned(node):
                if not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)): continue
                if target.value.id != this: continue
                is_parameter = isinstance(value, ast.Name) and method.name == '__init__'
                out.setdefault(target.attr, types.get(value.id) or '_Any' if is_parameter else '_Any')
    return out

def stub_of_import(node:ast.Import|ast.ImportFrom) -> ast.Import|ast.ImportFrom:
    "Return `import a as a`: other modules may take the name from here."
    if isinstance(node, ast.ImportFrom):
        for alias in node.names: alias.asname = alias.asname or alias.name
    return node

def is_computed_literal(value:ast.expr) -> bool:
    "Return whether a value is a `Literal` of choices that only running the code can tell."
    if not (isinstance(value, ast.Subscript) and last_name(value.value) == 'Literal'): return False
    choices = value.slice.elts if isinstance(value.slice, ast.Tuple) else [value.slice]
    return not all(isinstance(choice, ast.Constant) for choice in choices)

def is_type(value:ast.expr) -> bool:
    "Return whether a value is a type that a checker can read."
    if not isinstance(value, ast.Subscript): return False
    return last_name(value.value) in TYPES and not is_computed_literal(value)

def stub_of_assignment(node:ast.Assign) -> list[ast.stmt]:
    "Return the declarations of the names that an assignment sets."
    value = node.value
    targets = [inner for target in node.targets for inner in elements(target)]
    names = [t.id for t in targets if isinstance(t, ast.Name)]
    if names == ['__all__'] or is_type(value): return [node]
    if is_computed_literal(value): return ast.parse('\n'.join(f'{name} = str' for name in names)).body
    made = value.elt if isinstance(value, ast.GeneratorExp) else value
    if last_name(made) == 'property':
        properties = '\n'.join(f'@property\ndef {name}(self): ...' for name in names)
        return ast.parse(properties).body
    return [declared(name, type_name(value) if len(names) == 1 else '_Any') for name in names]

def has_default(node:ast.AnnAssign) -> bool:
    "Return whether a field of a dataclass has a default."
    if not node.value: return False
    return last_name(node.value) != 'field' or any(k.arg.startswith('default') for k in node.value.keywords)

def names_in_body(cls:ast.ClassDef) -> set[str]:
    "Return the names that a class body defines."
    names = {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}
    names |= {n.name for n in cls.body if isinstance(n, ast.FunctionDef)}
    targets = [t for n in cls.body if isinstance(n, ast.Assign) for t in n.targets]
    return names | {t.id for t in targets if isinstance(t, ast.Name)}

def stub_of_class(cls:ast.ClassDef) -> ast.ClassDef:
    "Return a class with the signatures of its methods, and the attributes that they set."
    methods = [n for n in cls.body if isinstance(n, ast.FunctionDef)]
    own = names_in_body(cls)
    found = attributes(methods)
    body:list[ast.stmt] = []
    if not any(last_name(base) == 'NamedTuple' for base in cls.bases):
        body += [declared(name, kind) for name,kind in found.items() if name not in own]
    for node in cls.body:
        if isinstance(node, ast.AnnAssign):
            body.append(declared(node.target.id, node.annotation, DOTS if has_default(node) else None))
        elif isinstance(node, ast.Assign): body += stub_of_assignment(node)
        elif isinstance(node, ast.FunctionDef): body.append(stub_of_function(node))
        elif isinstance(node, ast.ClassDef): body.append(stub_of_class(node))
    cls.body = body or [ast.Expr(DOTS)]
    cls.decorator_list = [d for d in cls.decorator_list if last_name(d) in KEPT]
    return cls

def patch_of(function:ast.stmt) -> ast.expr|None:
    "Return the decorator that puts a function into a class."
    if not isinstance(function, ast.FunctionDef): return None
    return next((d for d in function.decorator_list if last_name(d).startswith('patch')), None)

def bring_home(body:list[ast.stmt]):
    "Move patched methods into their classes."
    classes = {n.name: n for n in body if isinstance(n, ast.ClassDef)}
    for function in [n for n in body if patch_of(n)]:
        keywords = {k.arg for k in getattr(patch_of(function), 'keywords', [])}
        receiver = function.args.args[0]
        home = classes[ast.unparse(receiver.annotation)]
        function.decorator_list = []
        if 'as_prop' in keywords: function.decorator_list.append(ast.Name('property'))
        if 'set_prop' in keywords:
            function.decorator_list.append(ast.Attribute(ast.Name(function.name), 'setter'))
        receiver.annotation = None
        home.body.append(function)
        body.remove(function)

def stub(
    source:str, # of a module
) -> str:       # of its stub
    "Return the signatures, classes and names of a module."
    body = ast.parse(source).body
    bring_home(body)
    out:list[ast.stmt] = [ast.parse('from typing import Any as _Any').body[0]]
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.With):
            out += [stub_of_import(n) for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
        elif isinstance(node, ast.ClassDef): out.append(stub_of_class(node))
        elif isinstance(node, ast.FunctionDef):
            is_command = any(last_name(d) == 'command' for d in node.decorator_list)
            plain = f'def {node.name}(argv: list[str]|None=...) -> None: ...'
            out += ast.parse(plain).body if is_command else [stub_of_function(node)]
        elif isinstance(node, ast.AnnAssign): out.append(declared(node.target.id, node.annotation))
        elif isinstance(node, ast.Assign): out += stub_of_assignment(node)
    return ast.unparse(ast.fix_missing_locations(ast.Module(out, []))) + '\n'

def write_stubs(
    package:Path, # folder of modules
    dest:Path,    # folder of the stubs
) -> list[Path]:  # their files
    "Write a stub for every module of a package, but those that begin with an underscore."
    files = [f for f in sorted(package.rglob('*.py')) if f.name[0] != '_']
    stubs = [(dest/f.relative_to(package)).with_suffix('.pyi') for f in files]
    for source,target in zip(files, stubs):
        target.write_text(stub(source.read_text(encoding='utf-8')), encoding='utf-8')
    return stubs

if __name__ == '__main__': write_stubs(Path(sys.argv[1]), Path(sys.argv[2]))
