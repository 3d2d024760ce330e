"setuptools reads everything that nbdev reads, from settings.ini"
import shlex, sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
sys.path.insert(0, str(root/'tools'))
from stubs import write_stubs
ini = ConfigParser(delimiters='=', interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
names = lambda key: shlex.split(cfg[key])

class BuildTyped(build_py):
    "The modules, and beside each of them what type checkers read"
    def run(self):
        super().run()
        if not getattr(self, 'editable_mode', False): write_stubs(root/cfg['lib_path'], Path(self.build_lib)/cfg['lib_path'])

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), package_data={cfg['lib_name']: ['benchmarks/*.parquet', 'py.typed']}, cmdclass={'build_py': BuildTyped},
    python_requires='>=' + cfg['min_python'], install_requires=names('requirements'), extras_require={'dev': names('dev_requirements')},
    entry_points={'console_scripts': names('console_scripts'), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False)
