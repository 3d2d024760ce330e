"""The commands as processes: what they print, what they leave behind, how they are interrupted and resumed."""
import hashlib, json, os, re, resource, shlex, signal, subprocess, sys, time
from dataclasses import fields
from pathlib import Path
import processes, pytest
from kshot.checkpoint import load_newest
from kshot.cli import bench, doctor, launch
from kshot.cli.command import EXIT_CODES
from kshot.config import Config, check_config, space_of
from kshot.studies import study
from processes import Fork, command

QUICK = '--K 2 --epochs 5 --passes 2 --bs 200'.split()
def start(name, *args, **kwargs): return Fork(command(name), *args, **kwargs)
def call(name, *args, **kwargs): return processes.call(command(name), *args, **kwargs)

def wait_for(p, pattern, folder):
    "Until a file matches, or the process ends."
    while not list(folder.glob(pattern)) and p.poll() is None: time.sleep(.02)

def content(folder): return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*') if p.is_file()}

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Folder of runs with one finished run, `whole`, by the command as it is installed."
    runs = tmp_path_factory.mktemp('runs')
    argv = [Path(sys.executable).with_name('kshot_train'), '--runs', runs, '--name', 'whole', *QUICK]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    return runs

def test_train_leaves_a_run(trained):
    run = trained/'whole'
    record = json.loads((run/'run.json').read_text())
    assert record['config']['K'] == 2 and record['results']['train']['epoch'] == 5 and record['versions']['kshot']
    assert len((run/'log.jsonl').read_text().splitlines()) == 5
    assert len(list((run/'checkpoint').iterdir())) == 2 # the last two, no temporary file
    assert (run/'report.html').stat().st_size > 1e6

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_interrupted_training_ends_like_an_undisturbed_one(trained, how):
    name = how.name
    p = start('train', '--runs', trained, '--name', name, *QUICK)
    wait_for(p, 'checkpoint/epoch_00002*', trained/name)
    p.send_signal(how)
    _, err = p.communicate(timeout=60)
    assert p.returncode == (130 if how == signal.SIGINT else -9)
    if how == signal.SIGINT: assert f'to go on: kshot_train --name {name} --runs {trained} --resume' in err and 'Traceback' not in err
    code, out, err = call('train', '--runs', trained, '--name', name, '--resume')
    assert code == 0, err
    (a, meta_a), (b, meta_b) = load_newest(trained/'whole'), load_newest(trained/name)
    assert meta_a | {'seconds': meta_b['seconds']} == meta_b and set(a) == set(b) and all(a[n].equal(b[n]) for n in a)

def test_rank_search_retrain(trained):
    code, out, err = call('rank', '--runs', trained, '--name', 'whole', '--n_paths', 30, '--json')
    assert code == 0, err
    assert set(json.loads(out.splitlines()[-1])) == {'supernet', 'supernet_loss', 'macs', 'params', 'ceiling'}
    argv = ['--runs', trained, '--name', 'whole', '--algorithm', 'random', '--macs', 500_000, '--json']
    code, out, err = call('search', *argv, '--n_paths', 5)
    assert code == 0, err
    first = json.loads(out.splitlines()[-1])
    code, out, err = call('search', *argv, '--n_paths', 8)
    more = json.loads(out.splitlines()[-1])
    assert (first['n'], more['n']) == (5, 8) and more['loss_super'] <= first['loss_super'] and more['macs'] <= 500_000
    code, out, err = call('retrain', '--runs', trained, '--name', 'whole', '--epochs', 1, '--json')
    assert json.loads(out.splitlines()[-1])['path'] == more['path']

def test_bad_input_changes_nothing(trained):
    before = content(trained)
    for command,args,says in [('train', QUICK, 'is not empty: resume it or choose another'), ('search', ['--macs', 5], 'macs'),
                              ('retrain', ['--path', '01'], 'has 2 ops, expected 4'), ('rank', ['--table', 'none'], "table 'none', expected")]:
        code, out, err = call(command, '--runs', trained, '--name', 'whole', *args)
        last = err.strip().splitlines()[-1]
        assert code == 2 and says in last and 'Traceback' not in err, err
        assert content(trained) == before

def test_another_K_or_a_damaged_checkpoint(trained, tmp_path):
    for p in (trained/'whole').rglob('*'):
        if p.is_file(): (q := tmp_path/'run'/p.relative_to(trained/'whole')).parent.mkdir(parents=True, exist_ok=True); q.write_bytes(p.read_bytes())
    record = json.loads((tmp_path/'run/run.json').read_text())
    record['config']['K'] = 3
    (tmp_path/'run/run.json').write_text(json.dumps(record))
    code, out, err = call('rank', '--runs', tmp_path)
    assert code == 2 and 'checkpoint of K 2, expected 3' in err and 'Traceback' not in err
    for p in (tmp_path/'run/checkpoint').iterdir(): p.write_bytes(p.read_bytes()[:200])
    code, out, err = call('rank', '--runs', tmp_path)
    assert code == 2 and 'has no checkpoint that can be read' in err.splitlines()[-1]

def test_full_disk_while_saving(trained, tmp_path):
    "The size of a file is limited, as on a full disk: one line, and the checkpoint before is whole."
    size = max(p.stat().st_size for p in (trained/'whole/checkpoint').iterdir())
    code, out, err = call('train', '--runs', tmp_path, *QUICK, before=[(resource.setrlimit, resource.RLIMIT_FSIZE, (size//2, size//2))])
    assert code == 2 and 'cannot be written: File too large' in err.splitlines()[-1] and 'Traceback' not in err
    assert not list((tmp_path/'run/checkpoint').iterdir())
    code, out, err = call('train', '--runs', tmp_path, '--resume')
    assert code == 0, err
    (a, _), (b, _) = load_newest(trained/'whole'), load_newest(tmp_path/'run')
    assert all(a[n].equal(b[n]) for n in a)

def test_tables_make_resumes(tmp_path):
    "Killed while a table is made: the finished trainings are not repeated."
    args = ['make', 'digits', '--epochs', 1, '--seeds', 1, '--workers', 1, '--runs', tmp_path]
    p = start('tables', *args, before=[(os.setsid,)])
    log = tmp_path/'tables/digits.jsonl'
    while p.poll() is None and (not log.exists() or log.read_text().count('\n') < 6): time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    kept = log.read_text()
    p = start('tables', *args, before=[(os.setsid,)])
    while p.poll() is None and log.read_text().count('\n') < kept.count('\n')+4: time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    rows = [json.loads(l) for l in log.read_text().splitlines(keepends=True) if l.endswith('\n')]
    assert log.read_text().startswith(kept[:kept.rfind('\n')+1]) # what was finished stands
    assert len({(r['path'], r['split']) for r in rows}) == len(rows)

def test_demo_quick(tmp_path):
    code, out, err = call('demo', '--runs', tmp_path, '--quick', '--json')
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path/'demo/run.json').read_text())
    ranks, found = record['results']['rank'], record['results']['search']
    assert set(ranks) == {'kshot', 'kshot_loss', 'one_shot', 'one_shot_loss', 'macs', 'params', 'ceiling'}
    assert all(r['low'] <= r['tau'] <= r['high'] for r in ranks.values())
    assert found['macs'] <= found['budget_macs'] and 1 <= found['rank_in_budget'] <= found['rank'] <= 625 and 0 < found['acc_alone'] < 1
    assert record['seconds']['demo'] > 0
    page = re.sub('<script>.*?</script>', '', (tmp_path/'demo/report.html').read_text(), flags=re.S)
    assert 'http' not in page and '<script src' not in page and len(page) > 10_000 # opens offline
    before = content(tmp_path)
    code, out, err = call('demo', '--runs', tmp_path, '--quick', '--json')
    assert json.loads(out.splitlines()[-1]) == record and content(tmp_path) == before # nothing is done twice
    code, out, err = call('demo', '--runs', tmp_path, '--K', 2)
    assert code == 2 and 'holds a demo with' in err and content(tmp_path) == before

ROOMS = dict(demo=launch, train=launch, rank=launch, search=launch, retrain=launch, export=launch, tables=launch,
             study=study, bench=bench, doctor=doctor)

def parts_of(name):
    "Return the commands that a console script stands for: itself, or its subcommands."
    f = getattr(ROOMS[name], name)
    parts = getattr(f, 'parts', None)
    return {f'kshot_{name} {part}': g for part,g in parts.items()} if parts else {f'kshot_{name}': f}

COMMANDS = {full: f for name in ROOMS for full,f in parts_of(name).items()}

@pytest.mark.parametrize('name', COMMANDS)
def test_help_has_examples_that_can_be_read(name, capsys):
    f = COMMANDS[name]
    with pytest.raises(SystemExit) as e: f(['--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0 and max(map(len, text.splitlines())) <= 80 and EXIT_CODES[:20] in text
    assert 2 <= len(f.examples) <= 5
    for argv in f.examples:
        assert f'{name} {argv}'.rstrip() in text
        values = f.parser().parse(shlex.split(argv))
        if 'space' in values and name in ('kshot_train', 'kshot_rank'):
            config = Config(**{field.name: values[field.name] for field in fields(Config)})
            check_config(config, space_of(config))

@pytest.mark.parametrize('name', COMMANDS)
def test_every_word_of_an_example_means_something(name):
    "An example without arguments shows the defaults, every other one changes them."
    f = COMMANDS[name]
    if name == 'kshot_tables import': return # its name has no default
    usual = f.parser().parse([])
    for argv in f.examples: assert (f.parser().parse(shlex.split(argv)) == usual) == (not argv)

@pytest.mark.parametrize('name', COMMANDS)
def test_an_unknown_option_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as e: COMMANDS[name](['--jsn'])
    assert e.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f'{name}: ') and line.count('\n') == 1 and ('did you mean --json?' in line or 'are required' in line)

@pytest.mark.parametrize('name', ['tables', 'bench'])
def test_a_command_of_several_lists_them(name, capsys):
    f = getattr(ROOMS[name], name)
    f(['--help'])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for part,g in f.parts.items(): assert part in text and g.__doc__.split()[0] in text

def test_all_commands_are_here():
    scripts = (Path(__file__).parent.parent/'settings.ini').read_text().partition('console_scripts')[2].partition('\n\n')[0]
    assert set(re.findall(r'kshot_(\w+)=', scripts)) == set(ROOMS)
