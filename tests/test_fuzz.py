"""500 cases of the fuzzer (fuzz.py): no traceback, no hang, nothing silently wrong."""
import re
import subprocess
import sys

import pytest

from common import ENV, ROOT

pytest.importorskip('safetensors')
pytest.importorskip('tokenizers')


def test_whatever_comes_from_outside_runs_as_it_should_or_gets_one_line():
    out = subprocess.run([sys.executable, '-m', 'tests.fuzz', '--cases=500'], cwd=ROOT, env=ENV, capture_output=True,
                         text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    ran, refused, *bad = re.search(r'^\| all \| 500 \| (.*) \|$', out.stdout, re.M)[1].split(' | ')
    assert bad == ['0'] * 4 and int(ran) > 100 < int(refused)           # neither all fine nor all refused
