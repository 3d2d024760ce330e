"setuptools reads everything that nbdev reads, from settings.ini"
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters='=', interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
names = lambda key: shlex.split(cfg[key])

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), package_data={cfg['lib_name']: ['benchmarks/*.parquet']},
    python_requires='>=' + cfg['min_python'], install_requires=names('requirements'), extras_require={'dev': names('dev_requirements')},
    entry_points={'console_scripts': names('console_scripts'), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    zip_safe=False)
