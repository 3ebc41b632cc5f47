"""Shared by all tests: fixed seeds, hypothesis without deadlines (the machine may be loaded), a tiny dataset."""
import random

import configurator                             # noqa: F401 - before torch, see there
import hypothesis
import pytest
import torch

from data.prepare import prepare

hypothesis.settings.register_profile('nanozaya', deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile('nanozaya')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('highest')               # a bf16 run may have changed it


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """Return the folder of a prepared dataset: vocabulary 300, about 5,000 tokens for training and 500 held out."""
    folder, rng = tmp_path_factory.mktemp('dataset'), random.Random(0)
    words = 'def return self import for in range print value index ( ) [ ] = + naïve 漢字 “quoted” 🙂'.split()
    text = lambda: '\n'.join(' '.join(rng.choices(words, k=8)) for _ in range(20))
    documents = [(f'{i}.py', text().encode()) for i in range(12)]
    prepare(documents, folder, vocab_size=300)
    return folder
