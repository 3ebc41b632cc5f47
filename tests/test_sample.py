"""Sampling: the sampled distribution, independence of the sequences of a batch, and the command line."""
import io
import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from runtime import pretrained
import configurator
import sample
import train
from runtime.checkpoint import load_checkpoint
from runtime.pretrained import from_pretrained
from common import ENV, ROOT, TINY_RUN, run_script, tiny_model
from runtime.chat import continue_prompt
from data.tokenizer import load_tokenizer
from model import Zaya, ZayaConfig
from sample import SamplingOptions, sample_from_logits


def generate(model, prompts, n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, **how):
    return sample.generate(model, prompts, n, SamplingOptions(temperature, top_k, top_p, min_p, seed), **how)

BELOW_1 = 1 - 2**-24                                    # the largest float32 that torch.rand can return
logit_rows = st.lists(st.integers(-300, 300), min_size=1, max_size=12, unique=True).map(
    lambda row: torch.tensor([row]) / 100)              # distinct, so that 'the likeliest' is always a single token
filters = st.fixed_dictionaries({}, optional=dict(
    temperature=st.floats(0.05, 5), top_k=st.integers(0, 6), top_p=st.floats(0, 1), min_p=st.floats(0, 1)))


# ---- one token ----

@given(logit_rows, filters, st.floats(0, BELOW_1, width=32))
def test_temperature_zero_takes_the_likeliest(logits, filters, u):
    assert sample_from_logits(logits, torch.tensor([u]), **filters | {'temperature': 0}) == logits.argmax(-1)


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, slack=0.0):
    """The plain definition in float64: {token: renormalised probability}. slack widens the limits, or narrows them."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])
    keep, before = [], 0.0
    for rank, token in enumerate(ranked):
        inside = before < top_p + slack and probs[token] >= min_p * probs[ranked[0]] - slack
        if rank == 0 or inside and (not top_k or rank < top_k):
            keep.append(token)
        before += probs[token]
    total = sum(probs[token] for token in keep)
    return {token: probs[token] / total for token in keep}


@given(logit_rows, filters, st.floats(0, BELOW_1, width=32))
@example(torch.tensor([[0.0, -60.0, -90.0]]), {}, BELOW_1)
def test_an_excluded_token_is_never_drawn(logits, filters, u):
    token = sample_from_logits(logits, torch.tensor([u]), **filters).item()
    assert token in kept(logits[0], **filters, slack=1e-5)


@given(logit_rows, filters)
def test_shares_of_u_are_the_renormalised_probabilities(logits, filters):
    """Over evenly spaced u each token comes as often as its probability says, to one draw."""
    narrow, wide = kept(logits[0], **filters, slack=-1e-5), kept(logits[0], **filters, slack=1e-5)
    if narrow.keys() != wide.keys():                    # a limit falls onto a token: either side is right
        return
    n = 1000
    drawn = sample_from_logits(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, **filters)
    for token, count in enumerate(drawn.bincount(minlength=logits.shape[1]).tolist()):
        assert abs(count - n * wide.get(token, 0)) <= 1 + 1e-3 * n * (token in wide), token


@pytest.mark.parametrize('filters', [{}, {'temperature': 0.5}, {'temperature': 2, 'top_k': 5}, {'top_p': 0.8},
                                     {'min_p': 0.2}])
def test_frequencies_follow_the_softmax(filters):
    logits, n = torch.randn(1, 12) * 1.5, 20_000
    drawn = sample_from_logits(logits.expand(n, -1), torch.rand(n), **filters)
    expected = kept(logits[0], **filters)
    count = drawn.bincount(minlength=12).tolist()
    assert sum(count[token] for token in expected) == n
    chi2 = sum((count[token] - n * p) ** 2 / (n * p) for token, p in expected.items())
    assert chi2 < 3 * len(expected) + 10                # its mean is len(expected) - 1


@pytest.mark.parametrize('vocab_size', [1, 2, 1000, 30_000])
@pytest.mark.parametrize('u', [BELOW_1, 1.0])           # 1 itself: as if rounding had carried u there
def test_the_largest_u_gives_a_kept_token(vocab_size, u):
    logits = torch.randn(4, vocab_size) * 5
    for filters in {}, {'top_k': 3}, {'top_p': 0.5}, {'min_p': 0.1}:
        drawn = sample_from_logits(logits, torch.full((4,), u), **filters)
        for row, token in zip(logits, drawn.tolist()):
            assert token in kept(row, **filters, slack=1e-5)


def test_a_u_between_two_tokens_belongs_to_the_second():
    """Four equal tokens own [0, 1/4), [1/4, 1/2), ...: no token twice."""
    assert len(set(sample_from_logits(torch.zeros(4, 4), torch.tensor([0, 0.25, 0.5, 0.75])).tolist())) == 4


@given(logit_rows, st.sampled_from([1e-300, 1e-45, 1e-38, 1e-30, 1e-9]), st.floats(0, BELOW_1, width=32))
def test_the_smallest_temperatures_take_the_likeliest(logits, temperature, u):
    assert sample_from_logits(logits * 1e3, torch.tensor([u]), temperature) == logits.argmax(-1)


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('temperature', [0, 1.0])
def test_logits_that_are_not_finite_draw_nothing(value, temperature):
    logits = torch.zeros(3, 5)
    logits[1, 2] = value
    assert (sample_from_logits(logits, torch.rand(3), temperature) < 0).tolist() == [False, True, False]
    model = tiny_model()
    model.norm.weight.data[:] = value
    with pytest.raises(ValueError, match='logits are not finite'):
        generate(model, [[1]], 3, temperature)


def test_rows_are_drawn_independently():
    logits, u = torch.randn(5, 20), torch.rand(5)
    alone = [sample_from_logits(logits[i:i + 1], u[i:i + 1], top_p=0.9, top_k=7).item() for i in range(5)]
    assert sample_from_logits(logits, u, top_p=0.9, top_k=7).tolist() == alone


# ---- whole sequences ----

@pytest.fixture(scope='module')
def model():
    return tiny_model(seed=3)


prompts = st.lists(st.integers(0, 49), min_size=1, max_size=20)
batches = st.lists(prompts, min_size=1, max_size=4)
stops = st.sets(st.integers(0, 49), max_size=8)


@given(batches, st.integers(1, 12), stops, st.integers(0, 9))
def test_greedy_rows_equal_those_generated_alone(model, batch, n, stop, seed):
    together = generate(model, batch, n, temperature=0, stop=stop, seed=seed)
    assert together == [generate(model, [prompt], n, temperature=0, stop=stop)[0] for prompt in batch]


@given(batches, st.lists(prompts, min_size=3, max_size=3), st.integers(1, 12), stops, st.integers(0, 9))
def test_a_sampled_row_does_not_depend_on_its_neighbours(model, batch, others, n, stop, seed):
    """Row number i keeps its tokens, whatever the rows before it are and without those after it."""
    together = generate(model, batch, n, stop=stop, seed=seed)
    for row, prompt in enumerate(batch):
        assert generate(model, others[:row] + [prompt], n, stop=stop, seed=seed)[row] == together[row]


def test_a_prompt_that_rows_share_is_read_once(model, monkeypatch):
    seen, forward = [], type(model).forward

    def watched(self, tokens, **options):
        seen.append(tokens.tolist())
        return forward(self, tokens, **options)
    monkeypatch.setattr(type(model), 'forward', watched)
    prompts = [[1, 2, 3], [4, 5, 6], [1, 2, 3], [1, 2, 3]]
    together = generate(model, prompts, 5, seed=3)
    assert seen == [[[1, 2, 3], [4, 5, 6]]]
    assert together[0] != together[2] != together[3]                            # each with its own random numbers


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=7, max_size=12),
                          st.lists(prompts, min_size=1, max_size=3)), max_size=3), st.integers(1, 8))
def test_rows_that_share_a_beginning_equal_those_generated_alone(model, questions, n):
    batch = [question + rest for question, rests in questions for rest in rests]
    together = generate(model, batch, n, temperature=0)
    assert together == [generate(model, [prompt], n, temperature=0)[0] for prompt in batch]


@torch.no_grad()
@given(prompts, st.integers(1, 12))
def test_greedy_generation_equals_full_forwards(model, prompt, n):
    expected = list(prompt)
    for _ in range(n):
        expected.append(model(torch.tensor([expected]))[0][0, -1].argmax().item())
    assert generate(model, [prompt], n, temperature=0) == [expected[len(prompt):]]


@given(prompts, stops, st.integers(0, 99))
def test_a_row_ends_with_its_first_stop_token(model, prompt, stop, seed):
    free, = generate(model, [prompt], 20, seed=seed)
    first = next((i for i, token in enumerate(free) if token in stop), 20)
    assert generate(model, [prompt], 20, seed=seed, stop=stop) == [free[:first + 1]]


def test_seeds_reproduce_and_differ_and_so_do_rows(model):
    rows = generate(model, [[1]] * 3, 20, seed=5)
    assert rows == generate(model, [[1]] * 3, 20, seed=5)
    torch.rand(7)                                       # nor does it matter what torch drew elsewhere
    assert rows == generate(model, [[1]] * 3, 20, seed=5)
    assert len({tuple(row) for row in rows + generate(model, [[1]] * 3, 20, seed=6)}) == 6


def test_generation_leaves_the_random_state_alone(model):
    before = torch.get_rng_state()
    generate(model, [[1], [2, 3]], 4)
    assert before.equal(torch.get_rng_state())


def test_the_options_reach_the_sampler(model):
    greedy = generate(model, [[1]], 20, temperature=0)
    for options in {'top_k': 1}, {'top_p': 0.0}, {'min_p': 1.0}, {'temperature': 1e-4}:
        assert generate(model, [[1]], 20, **options) == greedy != generate(model, [[1]], 20)


def test_stream_sees_every_token_in_order(model):
    seen = [[], [], []]
    stream = lambda row, token: seen[row].append(token)
    rows = generate(model, [[1], [2, 3], [4]], 10, stop={7, 8, 9, 10}, stream=stream)
    assert seen == rows and len({len(row) for row in rows}) > 1         # some row stopped early


def test_a_prompt_may_fill_the_context_up_to_the_new_tokens(model):
    assert len(generate(model, [[1] * 60, [2]], 4)[0]) == 4
    assert generate(model, [], 4) == [] and generate(model, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize('batch, n, message', [
    ([[1], []], 1, 'prompt 1 is empty'), ([[1], [2, 50]], 1, 'prompt 1 holds a token outside the vocabulary of 50'),
    ([[-1]], 1, 'prompt 0 holds a token outside'), ([[1] * 61], 4, 'prompt 0 has 61 tokens; with 4 new ones'),
    ([[1] * 65], 0, 'more than the context of 64')])
def test_prompts_that_do_not_fit_get_one_line(model, batch, n, message):
    with pytest.raises(ValueError) as error:
        generate(model, batch, n)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('training', [True, False])
def test_the_training_mode_is_restored_even_after_an_error(training):
    model = tiny_model().train(training)

    def stream(row, token):
        assert not model.training
        raise KeyboardInterrupt
    for call in (lambda: generate(model, [[1]], 3), lambda: generate(model, [[1]], 3, stream=stream),
                 lambda: generate(model, [[]], 3)):
        try:
            call()
        except (KeyboardInterrupt, ValueError):
            pass
        assert all(module.training == training for module in model.modules())
    assert not any(router.load.any() for router in model.routers)       # the balancer must not count these tokens


# ---- text as it streams ----

class Terminal(io.StringIO):
    """Remembers each piece that is written."""
    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


utf8 = st.text('aé漢🙂\ufffd').map(str.encode)


@given(st.one_of(utf8, utf8.map(lambda data: data[:-1]), st.binary()))
@example('naïve 漢字 🙂'.encode()[:-1])
def test_streamed_text_is_the_decoded_whole_and_shows_no_half_character(data):
    """With a byte a token, every character beyond ASCII spans several tokens; the last may be cut off."""
    ids, decode, model = list(data), lambda ids: bytes(ids).decode(errors='replace'), SimpleNamespace()
    model.config = ZayaConfig(vocab_size=256, context=1000)

    def generate(prompts, n, stream):
        for token in ids:
            stream(0, token)
        return [ids]
    language = SimpleNamespace(bos=[], encode=lambda text: list(text.encode()), decode=decode, stop=[],
                               open_think=[], close_think=[])
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdout', terminal)
        continue_prompt(model, language, generate, 500, 1, 'prompt é: ')
    assert terminal.getvalue() == f'prompt é: {decode(ids)}\n'
    if '\ufffd' not in decode(ids):                     # whole characters only
        assert not any('\ufffd' in piece for piece in terminal.pieces)
        assert len(terminal.pieces) > len(decode(ids))  # each came by itself


# ---- the command line ----

@pytest.fixture(scope='module')
def run_folder(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    flags = [*TINY_RUN, f'--dataset={dataset}', f'--out_dir={folder}', '--sample_tokens=0']
    train.train(*configurator.read(flags, train.TrainConfig, ZayaConfig))
    return folder


@pytest.fixture(scope='module')
def released_folder(tmp_path_factory):
    """A tiny random model in the released layout, written by transformers, with a byte-level tokenizer."""
    transformers, tokenizers = pytest.importorskip('transformers'), pytest.importorskip('tokenizers')
    folder = tmp_path_factory.mktemp('released')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(['naïve 漢字 “quoted” 🙂 return self'] * 3, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<pad>', '<eos>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(folder / 'tokenizer.json'))
    torch.manual_seed(0)
    transformers.ZayaForCausalLM(transformers.ZayaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=16, router_hidden_size=8,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1)).save_pretrained(folder)
    return folder


def expected_text(run_folder, prompt, n, rows=1, **options):
    """What sample.py should print for a run folder, put together from its parts."""
    state, tokenizer = load_checkpoint(run_folder), load_tokenizer(run_folder / 'bpe.json')
    model = Zaya(ZayaConfig(**state['model_config']))
    model.load_state_dict(state['model'])
    ids = tokenizer.encode_ordinary(prompt)
    stop = [tokenizer.eot_token, tokenizer.encode_single_token('<|end|>')]
    new = generate(model, [ids] * rows, n, stop=stop, **options)
    return [prompt + tokenizer.decode([token for token in row if token not in stop]) for row in new]


def test_a_prompt_is_continued(run_folder):
    arguments = [f'--ckpt={run_folder}', '--prompt=self =', '--max_new_tokens=9', '--seed=2', '--temperature=0.9',
                 '--top_k=50', '--top_p=0.99', '--min_p=0.001', '--device=cpu']
    out = subprocess.run([sys.executable, 'sample.py', *arguments], cwd=ROOT, env=ENV, capture_output=True)
    assert (out.returncode, out.stderr) == (0, b'')
    text, = expected_text(run_folder, 'self =', 9, seed=2, temperature=0.9, top_k=50, top_p=0.99, min_p=0.001)
    assert out.stdout.decode() == text + '\n'


def test_several_samples_are_those_of_one_batch(run_folder, monkeypatch, capsys):
    out, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={run_folder}', '--prompt=for ',
                              '--num_samples=3', '--max_new_tokens=9', '--device=cpu')
    assert message is None
    texts = expected_text(run_folder, 'for ', 9, rows=3)
    assert out == ''.join(f'--- sample {i}\n{text}\n' for i, text in enumerate(texts)) and len(set(texts)) == 3


def test_prompts_are_read_from_stdin_and_a_bad_one_is_not_the_end(run_folder):
    """The second is empty, the third longer than the context: each gets its line, and the fourth is answered."""
    out = subprocess.run([sys.executable, 'sample.py', f'--ckpt={run_folder}', '--max_new_tokens=5', '--temperature=0'],
                         input='def é\n\n' + 'x' * 500 + '\nself', cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert out.returncode == 0
    texts = [expected_text(run_folder, prompt, 5, temperature=0)[0] for prompt in ('def é', 'self')]
    assert [text in out.stdout for text in texts] == [True, True]
    hint, empty, long = out.stderr.splitlines()
    assert hint.startswith('Type a prompt')
    for line, message in (empty, 'is empty'), (long, 'shorten it'):
        assert line.startswith('sample.py: ') and message in line


@pytest.mark.parametrize('chat', [False, True])
def test_a_line_that_is_no_text_takes_no_other_along(run_folder, monkeypatch, capsys, chat):
    """As a pipe gives it: bytes."""
    said = []
    for lines in b'self\n\xff\nself\xc3\nself\n', b'self\nself\n':
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(lines)))
        monkeypatch.setattr(sys, 'argv', ['sample.py', f'--ckpt={run_folder}', '--max_new_tokens=2', f'--chat={chat}',
                                          '--temperature=0', '--device=cpu'])
        sample.main(sys.argv[1:])
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out and said[0].err.count('is not valid UTF-8') == 2


def test_a_prompt_in_a_config_file_counts(run_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / 'config.py').write_text("prompt = 'self'\nmax_new_tokens = 3\ntemperature = 0")
    out, message = run_script(monkeypatch, capsys, 'sample.py', tmp_path / 'config.py', f'--ckpt={run_folder}')
    assert message is None and out == expected_text(run_folder, 'self', 3, temperature=0)[0] + '\n'


def test_no_more_tokens_than_fit_are_drawn_and_that_is_told(run_folder, capsys):
    model, language = pretrained.load(run_folder, 'cpu')
    continue_prompt(model, language, partial(generate, model, temperature=0), 500, 1, 'self')
    room = 16 - len(load_tokenizer(run_folder / 'bpe.json').encode_ordinary('self'))    # 16: the tiny run's context
    assert capsys.readouterr() == (expected_text(run_folder, 'self', room, temperature=0)[0] + '\n',
                                   f'(the context has room for {room} new tokens only)\n')


def test_a_released_folder_is_sampled(released_folder, monkeypatch, capsys):
    tokenizers = pytest.importorskip('tokenizers')
    arguments = [f'--ckpt={released_folder}', '--prompt=naïve 漢字', '--max_new_tokens=30', '--device=cpu']
    out, message = run_script(monkeypatch, capsys, 'sample.py', *arguments)
    tokenizer = tokenizers.Tokenizer.from_file(str(released_folder / 'tokenizer.json'))
    new, = generate(from_pretrained(released_folder), [tokenizer.encode('naïve 漢字').ids], 30, stop=[1])
    text = tokenizer.decode(new, skip_special_tokens=False)
    assert message is None and out == f'naïve 漢字{text}\n'
    assert '\ufffd' in text                             # random weights do not write whole characters
    several, _ = run_script(monkeypatch, capsys, 'sample.py', *arguments, '--num_samples=2')
    assert several.startswith(f'--- sample 0\nnaïve 漢字{text}\n--- sample 1\n')


def test_a_chat_prompt_is_a_user_s_turn(run_folder, monkeypatch, capsys):
    tokenizer = load_tokenizer(run_folder / 'bpe.json')
    turn = [*tokenizer.encode('<|user|>', allowed_special='all'), *tokenizer.encode_ordinary('self'),
            *tokenizer.encode('<|end|><|assistant|>', allowed_special='all')]
    model, language = pretrained.load(run_folder, 'cpu')
    assert language.prompt([{'role': 'user', 'content': 'self'}]) == turn
    out, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={run_folder}', '--prompt=self', '--chat=True',
                              '--max_new_tokens=5', '--temperature=0')
    new, = generate(model, [turn], 5, temperature=0, stop=language.stop)
    text = language.decode([token for token in new if token not in language.stop])
    assert message is None and out == text + '\n'


def test_generation_stops_at_the_end_of_a_document_and_of_a_turn(run_folder):
    _, language = pretrained.load(run_folder, 'cpu')
    assert [language.decode([token]) for token in language.stop] == ['<|endoftext|>', '<|end|>']
    assert language.decode(language.encode('naïve')) == 'naïve'
    assert not set(language.stop) & set(language.encode('<|endoftext|><|end|>'))        # a prompt cannot forge them


BAD_ARGUMENTS = {
    '--prompt=': 'prompt 0 is empty',
    '--prompt=' + 'x' * 500: 'the context 16: shorten it',
    '--ckpt=nowhere': 'nowhere: no such folder',
    '--ckpt=config': 'config: holds neither a checkpoint of train.py (ckpt.pt) nor a released model (config.json)',
    '--promt=a': "unknown key 'promt'; did you mean 'prompt'?",
    '--temperature=-1': 'temperature is -1.0',
    '--temperature=hot': "temperature must be float, got 'hot'",
    '--top_p=1.5': 'top_p is 1.5, it must lie between 0 and 1',
    '--num_samples=0': 'num_samples is 0',
    '--think=False': '--think=False: think has no effect without --chat=True: leave it out',
    '--show_think=False': '--show_think=False: show_think has no effect without --chat=True: leave it out',
    '--max_new_tokens 3': '--max_new_tokens 3: write --key=value, here --max_new_tokens=3',
    '--max_new_tokens=-1': 'max_new_tokens is -1',
    '--device=nonsense': "device 'nonsense' cannot be used here",
    'prompt': 'prompt: cannot be read',
}


@pytest.mark.parametrize('argument', BAD_ARGUMENTS, ids=lambda argument: argument[:30])
def test_bad_arguments_get_one_line(run_folder, monkeypatch, capsys, argument):
    monkeypatch.chdir(ROOT)
    _, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={run_folder}', '--prompt=a',
                            *argument.split(' '))
    assert BAD_ARGUMENTS[argument] in message


def test_a_conversation_has_one_reply_per_turn(run_folder, monkeypatch, capsys):
    _, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={run_folder}', '--chat=True', '--num_samples=3')
    assert message.endswith('--num_samples=3: num_samples has no effect with --chat=True: leave it out')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252'])
def test_a_terminal_without_the_characters_shows_question_marks(run_folder, encoding):
    command = [sys.executable, 'sample.py', f'--ckpt={run_folder}', '--max_new_tokens=5', '--temperature=0']
    samples = [subprocess.run([*command, '--prompt=漢'], cwd=ROOT, env=ENV | {'PYTHONIOENCODING': name},
                              capture_output=True) for name in (encoding, 'utf-8')]
    assert samples[0].returncode == 0 and b'Traceback' not in samples[0].stderr
    assert samples[0].stdout == samples[1].stdout.decode().encode(encoding, 'replace') and b'?' in samples[0].stdout


def test_a_broken_folder_gets_one_line(run_folder, released_folder, tmp_path, monkeypatch, capsys):
    for name, source in ('bpe.json', run_folder), ('tokenizer.json', released_folder):
        folder = tmp_path / name
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(b'{' if path.name == name else path.read_bytes())
        for _ in range(2):                              # damaged, then missing
            _, message = run_script(monkeypatch, capsys, 'sample.py', f'--ckpt={folder}', '--prompt=a')
            assert str(folder / name) in message
            (folder / name).unlink(missing_ok=True)


def test_an_error_is_one_line_on_stderr_and_exit_code_1():
    out = subprocess.run([sys.executable, 'sample.py', '--ckpt=nowhere', '--prompt=a'], cwd=ROOT, env=ENV,
                         capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (1, '')
    assert out.stderr.startswith('sample.py: nowhere: no such folder') and out.stderr.count('\n') == 1
