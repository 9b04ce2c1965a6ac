"Builds from settings.ini, nbdev's own configuration; nothing else is configured here."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0', description=cfg['description'],
    long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else '', long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Programming Language :: Python :: 3.11',
                 'Programming Language :: Python :: 3.12', 'Programming Language :: Python :: 3.13'],
    packages=find_packages(include=['ecgflowcmr', 'ecgflowcmr.*']), package_data={'ecgflowcmr': ['weights/*', 'weights/generator/*']}, include_package_data=True, zip_safe=False,
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'nbdev': ['ecgflowcmr=ecgflowcmr._modidx:d'], 'papermill.engine': ['ecgflowcmr=ecgflowcmr.cli:Engine']},
)
