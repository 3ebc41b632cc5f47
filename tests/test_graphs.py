"""What torch.compile makes of a layer: in bf16 one graph, in float32 a break at each grouped_mm."""
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from common import tiny_config, tokens
from model import Zaya


def train_compiled(dtype, autocast, packed, fullgraph):
    """Compile each layer of a new model, as train.py does, and take a forward and backward pass. Return the numbers of
    graphs, and the loss and gradients of the compiled and of the eager model."""
    torch._dynamo.reset()
    graphs, results = CompileCounterWithBackend('aot_eager'), []
    start = torch.arange(16).expand(2, 16) % 6 == 0
    for compiled in (True, False):
        torch.manual_seed(0)
        model = Zaya(tiny_config(n_layer=4)).to(dtype)
        for layer in model.layers if compiled else ():
            layer.compile(backend=graphs, fullgraph=fullgraph)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = model(tokens(2, 16), tokens(2, 16, seed=1), start if packed else None)[1]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    return graphs.frame_count, results


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('dtype, autocast', [(torch.bfloat16, False), (torch.float32, True)])
def test_a_layer_in_bf16_is_one_graph(dtype, autocast, packed):
    """fullgraph=True raises at a break. Layers share graphs: the first has no router state below it, and the second
    gets, under autocast, a state in bf16, those above one in float32."""
    graphs, (compiled, eager) = train_compiled(dtype, autocast, packed, fullgraph=True)
    assert graphs == (3 if autocast else 2)
    for a, b in zip(compiled, eager):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-6         # bf16 roundings may differ


def test_a_layer_in_float32_breaks_at_grouped_mm_only():
    """torch.compile supports grouped_mm in bf16 only, up to torch 2.13."""
    model = Zaya(tiny_config(n_layer=1))
    positions = torch.arange(16)[None].float()[..., None].expand(1, 16, 2)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model.layers[0])(torch.randn(2, 16, 32), None, positions.cos(), positions.sin())
    assert found.break_reasons
    for reason in found.break_reasons:
        assert 'torch.compiler.disable' in reason.reason and 'grouped_mm' in reason.reason, reason
    _, (compiled, eager) = train_compiled(torch.float32, False, False, fullgraph=False)
    for a, b in zip(compiled, eager):
        torch.testing.assert_close(a, b)
