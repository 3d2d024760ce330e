"The commands as processes: what they print and leave behind, how they are interrupted and resumed."
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import SUPPRESS
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path

import processes
import pytest
from conftest import ROOT
from processes import Fork, command

from kshot.checkpoint import load_newest
from kshot.cli import demo, launch, main
from kshot.cli.command import EXIT_CODES
from kshot.config import Config, check_config, space_of

QUICK = '--K 2 --epochs 5 --passes 2 --bs 200'.split()

def start(name, *args, **kwargs): return Fork(command(name), *args, **kwargs)

def call(name, *args, **kwargs): return processes.call(command(name), *args, **kwargs)

def call_here(f, *args) -> tuple[str, str, int]: # standard output, standard error, exit code
    "Call a command in this process."
    out = StringIO()
    err = StringIO()
    code = 0
    with redirect_stdout(out), redirect_stderr(err):
        try: f([*map(str, args)])
        except SystemExit as e: code = e.code
    return out.getvalue(), err.getvalue(), code

def wait_for(process, pattern, folder):
    "Wait until a file matches, or the process ends."
    while not list(folder.glob(pattern)) and process.poll() is None: time.sleep(.02)

def content(folder) -> dict: # relative name -> hash
    "Return what the files in a folder hold."
    files = [f for f in folder.rglob('*') if f.is_file()]
    return {f.relative_to(folder): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

def last_json(out): return json.loads(out.splitlines()[-1])

def same_tensors(a, b): return set(a) == set(b) and all(a[name].equal(b[name]) for name in a)

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder of runs with one finished run, `whole`, by the command as it is installed."
    runs = tmp_path_factory.mktemp('runs')
    argv = [Path(sys.executable).with_name('kshot'), 'train', '--runs', runs, '--name', 'whole', *QUICK]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(argv, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return runs

def test_train_leaves_a_run(trained):
    run = trained/'whole'
    record = json.loads((run/'run.json').read_text())
    assert record['config']['K'] == 2 and record['results']['train']['epoch'] == 5
    assert record['versions']['kshot']
    assert len((run/'log.jsonl').read_text().splitlines()) == 5
    assert len(list((run/'checkpoint').iterdir())) == 2 # the last two, no temporary file
    assert (run/'report.html').stat().st_size > 1e6

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_interrupted_training_ends_like_an_undisturbed_one(trained, number):
    name = number.name
    process = start('train', '--runs', trained, '--name', name, *QUICK)
    wait_for(process, 'checkpoint/epoch_00002*', trained/name)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    if number == signal.SIGINT:
        assert 'interrupted; run the same command again to resume' in err
        assert 'Traceback' not in err
    code, out, err = call('train', '--runs', trained, '--name', name, *QUICK)
    assert code == 0, err
    whole, meta = load_newest(trained/'whole')
    resumed, meta_resumed = load_newest(trained/name)
    assert meta | {'seconds': meta_resumed['seconds']} == meta_resumed and same_tensors(whole, resumed)

def scorers_of(*runs):
    scores = ['', '_loss', '_margin', '_sigmoid', '_ranks', '_ranks_macs']
    return {run+score for run in runs for score in scores} | {'macs', 'params', 'ceiling'}

def test_rank(trained):
    code, out, err = call('rank', '--runs', trained, '--name', 'whole', '--n_paths', 30, '--json')
    assert code == 0, err
    assert set(last_json(out)) == scorers_of('supernet')

def test_search_goes_on_and_retrain_takes_its_path(trained):
    argv = ['--runs', trained, '--name', 'whole', '--algorithm', 'random', '--max_macs', 500_000, '--json']
    code, out, err = call('search', *argv, '--n_paths', 5)
    assert code == 0, err
    first = last_json(out)
    code, out, err = call('search', *argv, '--n_paths', 8)
    more = last_json(out)
    assert (first['n'], more['n']) == (5, 8)
    assert more['loss_super'] <= first['loss_super'] and more['macs'] <= 500_000
    code, out, err = call('retrain', '--runs', trained, '--name', 'whole', '--epochs', 1, '--json')
    assert last_json(out)['path'] == more['path']

BAD_NAMES = [
    (launch.train, ['--resume'], 'holds no run'),
    (launch.train, ['--name', ''], "name '', expected that of a folder below"),
    (launch.rank, ['--name', '../x'], "name '../x'"),
    (demo.demo, ['--name', 'caf\udce9'], 'expected UTF-8'),
    (launch.search, [], 'holds no run'),
    (launch.retrain, [], 'holds no run'),
    (launch.export, [], 'holds no')]

BAD_VALUES = [
    (launch.train, ['--K', 0], 'kshot train: K=0, expected at least 1'),
    (launch.train, ['--space', 'mars'], "space 'mars', expected"),
    (launch.train, ['--bs', 'many'], "--bs: 'many', expected a whole number"),
    (launch.train, ['--lr', 'high'], "--lr: 'high', expected a number"),
    (launch.train, ['--codes', 'simplx'], "'simplx', expected simplex"),
    (launch.train, ['--max_macs', 'inf'], 'max_macs=inf, expected a number that is finite'),
    (launch.search, ['--algorithm', 'nsga'], "--algorithm: 'nsga', expected"),
    (launch.search, ['--max_latency_ms', 5], 'a budget of 5.0 ms, expected also its device'),
    (launch.retrain, ['--recipe', 'mid'], "--recipe: 'mid', expected")]

BAD_QUESTIONS = [
    (launch.rank, ['--seeds', 0], 'seeds=0, expected at least 1'),
    (launch.rank, ['--table', 'x'], "table 'x', expected one of digits"),
    (launch.rank, ['--space', 'macro', '--table', 'digits'], "is of space 'digits', expected 'macro'"),
    (launch.rank, ['--n_paths', 700], 'n=700, expected 2 to 625'),
    (launch.rank, ['--table_epochs', 7], 'no epochs 7'),
    (launch.rank, ['--table_split', 'train'], "--table_split: 'train', expected valid or test")]

@pytest.mark.parametrize('f, args, message', BAD_NAMES + BAD_VALUES + BAD_QUESTIONS)
def test_bad_input_is_one_line_and_writes_nothing(f, args, message, tmp_path):
    out, err, code = call_here(f, *args, '--runs', tmp_path)
    assert (out, code, err.count('\n')) == ('', 2, 1) and message in err
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name, args, message', [
    ('train', ['--K', 3], 'holds a run with K=2, expected K=3: choose another name'),
    ('search', ['--max_macs', 5], 'macs'),
    ('retrain', ['--path', '01'], 'has 2 ops, expected 4'),
    ('rank', ['--table', 'none'], "table 'none', expected")])
def test_bad_input_leaves_a_run_as_it_was(name, args, message, trained):
    before = content(trained)
    code, out, err = call(name, '--runs', trained, '--name', 'whole', *args)
    last = err.strip().splitlines()[-1]
    assert code == 2 and message in last and 'Traceback' not in err, err
    assert content(trained) == before

def test_another_K_or_a_damaged_checkpoint(trained, tmp_path):
    run = tmp_path/'run'
    shutil.copytree(trained/'whole', run)
    record = json.loads((run/'run.json').read_text())
    record['config']['K'] = 3
    (run/'run.json').write_text(json.dumps(record))
    code, out, err = call('rank', '--runs', tmp_path)
    assert code == 2 and 'checkpoint of K 2, expected 3' in err and 'Traceback' not in err
    for fname in (run/'checkpoint').iterdir(): fname.write_bytes(fname.read_bytes()[:200])
    code, out, err = call('rank', '--runs', tmp_path)
    assert code == 2 and 'has no checkpoint that can be read' in err.splitlines()[-1]

def test_full_disk_while_saving(trained, tmp_path):
    "With a limit on the size of files, as on a full disk: one line, and training resumes with room."
    size = max(fname.stat().st_size for fname in (trained/'whole/checkpoint').iterdir())
    limit = (resource.setrlimit, resource.RLIMIT_FSIZE, (size//2, size//2))
    code, out, err = call('train', '--runs', tmp_path, *QUICK, before=[limit])
    assert code == 2 and 'cannot be written: File too large' in err.splitlines()[-1]
    assert 'Traceback' not in err
    assert not list((tmp_path/'run/checkpoint').iterdir())
    code, out, err = call('train', '--runs', tmp_path, '--resume')
    assert code == 0, err
    assert same_tensors(load_newest(trained/'whole')[0], load_newest(tmp_path/'run')[0])

def test_tables_make_resumes(tmp_path):
    "Killed while a table is made: the finished trainings are not repeated."
    log = tmp_path/'tables/digits.jsonl'
    def n_lines(): return log.read_text().count('\n') if log.exists() else 0
    def make_until(n):
        args = ['make', 'digits', '--epochs', 1, '--seeds', 1, '--workers', 1, '--runs', tmp_path]
        process = start('tables', *args, before=[(os.setsid,)])
        while process.poll() is None and n_lines() < n: time.sleep(.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    make_until(6)
    kept = log.read_text()
    make_until(n_lines()+4)
    text = log.read_text()
    assert text.startswith(kept[:kept.rfind('\n')+1]) # what was finished stands
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith('\n')]
    assert len({(row['path'], row['split']) for row in rows}) == len(rows)

def test_demo_quick(tmp_path):
    code, out, err = call('demo', '--runs', tmp_path, '--quick', '--json')
    assert code == 0, err
    record = last_json(out)
    assert record == json.loads((tmp_path/'demo/run.json').read_text())
    ranks = record['results']['rank']
    best = record['results']['search']
    assert set(ranks) == scorers_of('kshot', 'one_shot')
    assert all(ranked['low'] <= ranked['tau'] <= ranked['high'] for ranked in ranks.values())
    assert best['macs'] <= best['budget_macs'] and 0 < best['acc_alone'] < 1
    assert 1 <= best['rank_in_budget'] <= best['rank'] <= 625
    assert record['seconds']['demo'] > 0
    page = re.sub('<script>.*?</script>', '', (tmp_path/'demo/report.html').read_text(), flags=re.S)
    assert 'http' not in page and '<script src' not in page and len(page) > 10_000 # opens offline
    before = content(tmp_path)
    code, out, err = call('demo', '--runs', tmp_path, '--quick', '--json')
    assert last_json(out) == record and content(tmp_path) == before # nothing is done twice
    code, out, err = call('demo', '--runs', tmp_path, '--K', 2)
    assert code == 2 and 'holds a demo with' in err and content(tmp_path) == before

# what the console scripts are, and where

def parts_of(name) -> dict: # full name -> command
    "Return the commands that a name stands for: itself, or its subcommands."
    f = main.find_command(name)
    parts = getattr(f, 'parts', None)
    if parts is None: return {f'kshot {name}': f}
    return {f'kshot {name} {part}': g for part,g in parts.items()}

# what depends on other options, or has no value unless the recipe of a space says so
UNTOLD = 'help', 'portion', 'device'
# arguments without which a command refuses to work
NEEDED = {'kshot tables import': ['nb201'], 'kshot compare': ['one', 'two']}

COMMANDS = {}
for command_name in main.ROOMS: COMMANDS |= parts_of(command_name)

@pytest.mark.parametrize('name', COMMANDS)
def test_help_ends_in_examples_that_can_be_read(name):
    f = COMMANDS[name]
    text, err, code = call_here(f, '--help')
    assert code == 0 and max(map(len, text.splitlines())) <= 80 and EXIT_CODES[:20] in text
    assert 2 <= len(f.examples) <= 5
    for argv in f.examples:
        assert f'{name} {argv}'.rstrip() in text
        values = f.parser().parse(shlex.split(argv))
        if name in ('kshot train', 'kshot rank'):
            given = {field.name for field in fields(Config)} & values.keys()
            config = Config(**{name: values[name] for name in given})
            check_config(config, space_of(config))

@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_an_option_is_a_sentence_that_says_what_happens_without_it(name):
    for action in COMMANDS[name].parser()._actions:
        if action.help == SUPPRESS: continue
        assert re.fullmatch(r'[A-Z\d\-].*\.|bf16.*\.', action.help), action.help
        assert not re.search(r"None|: none|''|\b0:|-1:", action.help), action.help
        is_told = 'efault' in action.help or action.dest in UNTOLD
        assert is_told or action.default is not None or not action.option_strings, action.help

@pytest.mark.parametrize('name', COMMANDS)
def test_every_word_of_an_example_means_something(name):
    "The empty example shows the defaults, every other one changes them."
    f = COMMANDS[name]
    if name in NEEDED: return # nothing works without them
    usual = f.parser().parse([])
    for argv in f.examples: assert (f.parser().parse(shlex.split(argv)) == usual) == (not argv)

@pytest.mark.parametrize('name', COMMANDS)
def test_an_unknown_option_is_one_line(name):
    args = NEEDED.get(name, [])
    line = f"{name}: unknown option '--jsn'; did you mean --json?\n"
    assert call_here(COMMANDS[name], *args, '--jsn') == ('', line, 2)

@pytest.mark.parametrize('name', ['tables', 'bench'])
def test_a_command_lists_its_subcommands(name):
    f = main.find_command(name)
    text, err, code = call_here(f, '--help')
    assert code == 0 and max(map(len, text.splitlines())) <= 80
    for part,g in f.parts.items():
        assert re.search(rf'^  {part} +{g.__doc__.split()[0]}', text, flags=re.M)
