"""Write token files from the source of Python's standard library: about 10 MB of code and prose that is already on
the machine, so nothing is downloaded. From the project's root:

    python -m data.stdlib.prepare [--out=DIR] [--vocab_size=N]

Other Python versions have different text, so the vocabulary and the losses differ slightly.
"""

import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import configurator
from data.prepare import prepare

# Skip what is not the library (installed packages), tests (60% of all bytes), tables (character maps, HTML entities),
# and what is specific to one build.
SKIP = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', 'entities.py',
        'python-config.py'}
# Generated files say so near the top. `configuration generated` is sysconfig's record of one build.
GENERATED = re.compile(rb'(auto-?|is |automatically |configuration )generated', re.IGNORECASE)


@dataclass
class StdlibConfig:
    out: str = str(Path(__file__).parent)          # folder to write: data/stdlib
    vocab_size: int = 4096                         # tokens of the vocabulary that is trained


def stdlib_documents(root):
    """Return [(relative path, bytes)] of the .py files under root, without SKIP and generated files, sorted by path.

    Raise ValueError if there are none.
    """
    documents = []
    for path in sorted(root.rglob('*.py')):
        name = path.relative_to(root)
        if SKIP.isdisjoint(name.parts):
            data = path.read_bytes().replace(b'\r\n', b'\n')  # the same bytes on Windows
            if not GENERATED.search(data[:300]):
                documents.append((name.as_posix(), data))
    if not documents:
        raise ValueError(f"no Python source under {root}: this Python came without its library's source")
    return documents


if __name__ == '__main__':
    with configurator.one_line_errors('data.stdlib.prepare'):
        config, = configurator.read(sys.argv[1:], StdlibConfig)
        prepare(stdlib_documents(Path(sysconfig.get_path('stdlib'))), config.out, config.vocab_size)
