"""Which dtype a GPU gets, which path its experts take, and how batches get there. The GPUs are named, not emulated."""
import pytest
import torch

from runtime.device import expert_path, pick_dtype, to_device

CUDA = torch.device('cuda', 0)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, bf16): torch reports such a card. As in torch, bf16 is always supported including emulation."""
    def gpu(capability, bf16, hip=None):
        supported = lambda including_emulation=True: bf16 or including_emulation
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        monkeypatch.setattr(torch.version, 'hip', hip)
    return gpu


# GTX 1080, T4 and RTX 2080 have no bf16 units; A100, RTX 4090, H100, B200 and RTX 5090 have.
@pytest.mark.parametrize('capability, bf16', [
    ((6, 1), False), ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 0), True)])
def test_a_gpu_without_bf16_units_gets_float32_and_only_sm90_and_sm100_a_grouped_product(gpu, capability, bf16):
    gpu(capability, bf16)
    dtype = pick_dtype('auto', CUDA)
    assert dtype == (torch.bfloat16 if bf16 else torch.float32)
    path, sm = expert_path(CUDA, dtype), f'SM{capability[0]}{capability[1]}'
    if capability[0] in (9, 10):
        assert path == f'; experts: one grouped matmul for all (bf16 on {sm})'
    else:
        assert path.startswith(f'; experts: one matmul each, with a host sync ({str(dtype)[6:]} on {sm};')


def test_the_dtype_that_was_asked_for_is_used_on_any_gpu(gpu):
    gpu((7, 5), False)
    assert pick_dtype('bfloat16', CUDA) == torch.bfloat16 and pick_dtype('float32', CUDA) == torch.float32
    gpu((9, 0), True)
    assert pick_dtype('float32', CUDA) == torch.float32
    assert 'one matmul each, with a host sync (float32 on SM90;' in expert_path(CUDA, torch.float32)


def test_rocm_multiplies_expert_by_expert(gpu):
    gpu((9, 4), True, hip='7.0')
    assert 'with a host sync (bfloat16 on ROCm;' in expert_path(CUDA, torch.bfloat16)


def test_on_a_cpu_nothing_is_said_of_experts_and_batches_are_not_copied():
    cpu = torch.device('cpu')
    x = torch.arange(6)
    assert expert_path(cpu, torch.bfloat16) == ''
    same, none = to_device((x, None), cpu)
    assert same.data_ptr() == x.data_ptr() and none is None
