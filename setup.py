"Setuptools reads from settings.ini everything that nbdev reads."
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT/'tools'))
from stubs import write_stubs

ini = ConfigParser(delimiters='=', interpolation=None)
ini.read(ROOT/'settings.ini', encoding='utf-8')
settings = ini['DEFAULT']
package = settings['lib_path']

def names(key:str) -> list[str]: return shlex.split(settings[key])

class BuildTyped(build_py):
    "Copy the modules, and put beside each of them the stub that type checkers read."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        write_stubs(ROOT/package, Path(self.build_lib)/package)

nbdev = f'{settings["lib_name"]}={package}._modidx:d'

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    long_description=(ROOT/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=settings['keywords'],
    author=settings['author'],
    author_email=settings['author_email'],
    url=settings['git_url'],
    license='Apache-2.0',
    packages=find_packages(include=[package, f'{package}.*']),
    package_data={package: ['benchmarks/*.parquet', 'py.typed']},
    cmdclass={'build_py': BuildTyped},
    python_requires='>=' + settings['min_python'],
    install_requires=names('requirements'),
    extras_require={'dev': names('dev_requirements')},
    entry_points={'console_scripts': names('console_scripts'), 'nbdev': [nbdev]},
    zip_safe=False,
)
