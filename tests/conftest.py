"""Shared by all tests: fixed seeds, and hypothesis without a deadline (a loaded machine is no failure)."""
import hypothesis
import pytest
import torch

hypothesis.settings.register_profile('nanozaya', deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile('nanozaya')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
