"""evidence.released on a tiny random model, with values that `transformers` computes from the same weights."""

import pytest
import torch

from common import randomize, run_script
from evidence import released
from runtime.pretrained import from_pretrained, save_pretrained
from runtime.quantize_folder import quantize_folder
from test_language import write_language

transformers = pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder in bf16, written by `transformers`, with a tokenizer that adds BOS and the end of a turn to a text."""
    folder = tmp_path_factory.mktemp('released') / 'model'
    config = transformers.ZayaConfig(
        vocab_size=300, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=4, moe_intermediate_size=64, router_hidden_size=16, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=0, eos_token_id=2)
    reference = randomize(transformers.ZayaForCausalLM(config), 1).bfloat16().eval()
    for name, p in reference.named_parameters():                # else the likeliest token is the same everywhere
        p.data.mul_(0.1 if 'bias' in name else 8 if 'embed' in name else 1)
    for layer in reference.model.layers:
        layer.mlp.gate.balancing_biases = layer.mlp.gate.balancing_biases.float()
        layer.mlp.gate.balancing_biases[-1] = -1.0
    write_language(folder)
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
@torch.no_grad()
def recorded(folder):
    """The values of PUBLIC for this model, from `transformers`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.ZayaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    idx = tokenizer('What is the answer?', return_tensors='pt').input_ids
    reference.generation_config.eos_token_id = None             # generate beyond it
    out = reference.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=5)
    return {'text': 'What is the answer?', 'prompt': idx[0].tolist(),
            'argmax': [[token] for token in reference(idx).logits[0].argmax(-1).tolist()],
            'greedy': out[0, idx.shape[1]:].tolist(),
            'means': reference.model(idx).last_hidden_state[0].float().mean(-1).tolist()}


def run(capsys, folder, recorded, quantized=False):
    """Return what differs from the recorded values, and the lines printed."""
    wrong = released.check_folder(str(folder), released.ReleasedConfig('cpu', quantized), recorded)
    return wrong, capsys.readouterr().out.splitlines()


def test_weights_that_give_the_recorded_values_agree(folder, recorded, capsys):
    wrong, lines = run(capsys, folder, recorded, True)
    S = len(recorded['prompt'])
    assert len({token for token, in recorded['argmax']}) > S // 2
    assert wrong == [] and lines[0] == 'tokenizer: agrees' and len(lines) == 4
    assert lines[1].startswith(f'bfloat16, as stored, on cpu: likeliest token {S} of {S}, greedy continuation 5 of 5, '
                               'means differ by at most 0.00') and ': agrees (required: all' in lines[1]
    assert [line[:12] for line in lines[2:]] == ['int8, on cpu', 'int4, on cpu']
    assert not [path for path in folder.parent.iterdir() if path != folder]     # the temporary folders are removed


def test_other_weights_and_another_tokenizer_differ(folder, recorded, capsys, tmp_path):
    model = from_pretrained(folder)
    with torch.no_grad():
        model.layers[1].attn.conv_depthwise_bias.add_(1)
    save_pretrained(model, write_language(tmp_path / 'other', 'nothing'))
    wrong, lines = run(capsys, tmp_path / 'other', recorded)
    assert wrong == ['tokenizer', 'the weights as stored']
    assert lines[0] == 'tokenizer: DIFFERS' and ': DIFFERS (required: all' in lines[1]


def test_a_quantized_folder_is_checked_by_its_own_rule(folder, recorded, capsys, tmp_path):
    quantize_folder(folder, tmp_path / 'int8', 8)
    wrong, lines = run(capsys, tmp_path / 'int8', recorded, True)
    assert len(lines) == 2 and lines[1].startswith('int8, on cpu: ') and 'required: 90% of the tokens' in lines[1]


@pytest.mark.filterwarnings('ignore:.*found in sys.modules')
def test_the_program_refuses_another_model_in_one_line(folder, monkeypatch, capsys):
    out, message = run_script(monkeypatch, capsys, 'evidence.released', folder, '--device=cpu')
    assert out == 'tokenizer: DIFFERS\n' and 'the model knows 300: this is not ZAYA1-8B' in message
    assert 'name the folder' in run_script(monkeypatch, capsys, 'evidence.released')[1]


def test_the_public_values_fit_together():
    public = released.PUBLIC
    assert len(public['prompt']) == len(public['argmax']) == len(public['means']) == 11
    assert public['argmax'][-1] == public['greedy'][:1]
