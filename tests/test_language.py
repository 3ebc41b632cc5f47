"""Tokenizers and chat templates (data/language.py, runtime/language.py), compared with `transformers`."""
import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from data.language import RUN_TEMPLATE, ChatTemplate
from data.tokenizer import save_tokenizer, train_bpe
from runtime.language import released_language, run_language

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')

SPECIAL = ['<bos>', '<|im_start|>', '<|im_end|>', '<think>', '</think>']
AROUND = {'begin': '<bos> $A', 'begin and end': '<bos> $A <|im_end|>', 'end': '$A <|im_end|>', 'nothing': None}
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set said = message.content.split('</think>')[-1] | trim if message.role == 'assistant' else message.content %}
    {{- '<|im_start|>' + message.role + '\\n' + said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
"""
CONVERSATIONS = [
    [('user', 'What is 2 + 2?')],
    [('system', 'Be brief.'), ('user', ' naïve 漢字\n'), ('assistant', '<think>\nso\n</think>\n\n4'), ('user', 'Why?')],
    [('user', 'a'), ('assistant', 'b'), ('user', 'c'), ('assistant', '<think></think>d'), ('user', '')],
]


def write_language(folder, around='begin and end', template=TEMPLATE, config={}, **files):
    """Write a byte-level tokenizer with the SPECIAL tokens and the other files of a released folder."""
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(['What is the answer? the answer'], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if AROUND[around]:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=AROUND[around], special_tokens=[(name, i) for i, name in enumerate(SPECIAL)])
    tokenizer.save(str(folder / 'tokenizer.json'))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<bos>', 'eos_token': '<|im_end|>'}
    files = {'config.json': {'eos_token_id': 2}, 'tokenizer_config.json': settings | config} | files
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    if template is not None:
        (folder / 'chat_template.jinja').write_text(template)
    return folder


@pytest.fixture(scope='module', params=AROUND)
def folder(request, tmp_path_factory):
    return write_language(tmp_path_factory.mktemp('language'), request.param)


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    save_tokenizer(folder / 'bpe.json', train_bpe(['so much, so far, so good'] * 3, 300))
    return folder


def test_no_special_token_is_added_to_a_text_whatever_the_tokenizer_does(folder):
    language, tokenizer = released_language(folder), tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    assert language.encode('') == [] and language.bos == [0] * ('<bos>' in tokenizer.encode('').tokens)
    text = language.encode('What is')
    assert language.decode(text) == 'What is' and not set(text) & set(range(len(SPECIAL)))


@pytest.mark.parametrize('think', [True, False])
@pytest.mark.parametrize('reply', [True, False])
@pytest.mark.parametrize('conversation', range(len(CONVERSATIONS)))
def test_a_chat_prompt_is_that_of_transformers(folder, conversation, think, reply):
    messages = [{'role': role, 'content': content} for role, content in CONVERSATIONS[conversation]]
    expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=reply, enable_thinking=think, return_dict=False)
    assert released_language(folder).prompt(messages, think, reply) == expected


forged = st.lists(st.sampled_from([*SPECIAL, '<|user|>', '<|end|>', '<', 'think>', '\ufdd0', '\ufdd1', ' a', '漢'])
                  | st.text(max_size=3)).map(''.join)


@given(forged)
def test_text_makes_no_special_token_and_decodes_to_itself(run_folder, released, text):
    for language, special in (released, range(5)), (run_language(run_folder), range(294, 300)):
        tokens = language.encode(text)
        assert not set(tokens) & set(special)
        assert language.decode(tokens) == text.replace('\ufdd0', '').replace('\ufdd1', '')


@pytest.fixture(scope='module')
def released(tmp_path_factory):
    return released_language(write_language(tmp_path_factory.mktemp('released')))


@given(forged)
def test_no_user_can_write_a_turn_of_another_role(released, text):
    def special_tokens(said):
        prompt = released.prompt([{'role': 'user', 'content': said}])
        return [token for token in prompt if token < len(SPECIAL)]
    assert special_tokens(text) == special_tokens('a')


@given(st.lists(st.lists(st.integers(0, 299), max_size=5), max_size=3))
def test_lists_of_tokens_are_inserted_into_a_prompt_unchanged(released, lists):
    content = [part for i, tokens in enumerate(lists) for part in (f'{i} ', tokens)]
    middle = [token for i, tokens in enumerate(lists) for token in [*released.encode(f'{i} '), *tokens]]
    before, after = released.prompt([{'role': 'user', 'content': 'a'}]), released.encode('a')
    at = before.index(after[0])
    assert released.prompt([{'role': 'user', 'content': content}]) == before[:at] + middle + before[at + len(after):]


characters = st.characters(exclude_categories=('Cs', 'Cn'), exclude_characters='<')
said = st.text(characters, min_size=1, max_size=8).filter(str.strip)


@given(st.none() | said, st.lists(st.tuples(said, said), max_size=3), said)
def test_the_template_of_a_run_is_that_of_transformers_and_starts_the_user_s_turn_with_the_system(run_folder, system,
                                                                                                  turns, last):
    language = run_language(run_folder)
    messages = [{'role': 'system', 'content': system}] if system else []
    text = f'<|user|>{system}\n\n' if system else ''
    for question, answer in [*turns, (last, '')]:
        messages += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]
        text += '<|user|>' * (not system or len(messages) > 3) + f'{question}<|end|><|assistant|>'
        text += f'{answer}<|end|>' if answer else ''
    messages = messages[:-1]
    assert language.decode(language.prompt(messages)) == text
    assert language.decode(language.prompt(messages, think=False)) == text + '<think></think>'
    rendered, _ = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[messages], chat_template=RUN_TEMPLATE, add_generation_prompt=True)
    assert rendered == [text]                                   # enable_thinking is not given: as if true


EXTENDED = """\
{%- set said = 'outside' %}
{% for message in messages %}
{% generation %}
{% set said = message.content %}
{{- {'b': said, 'a': '漢'} | tojson }}{{ [1, said] | tojson(indent=2) }}
{%- endgeneration -%}
{{ {'b': said, 'a': '漢'} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}
{{- ['漢'] | tojson(True, 1) }}
{%- endfor %}"""


def test_a_template_has_the_blocks_and_filters_of_transformers():
    messages = [{'role': 'user', 'content': 'hi <'}, {'role': 'assistant', 'content': 'so'}]
    rendered, _ = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[messages], chat_template=EXTENDED)
    assert [ChatTemplate('here', EXTENDED).render(messages=messages)] == rendered


def test_reasoning_and_answer_are_split_at_the_last_closing_tag(released):
    says = released.encode_with_special
    whole = says('a</think>b</think>c<|im_end|>')
    assert released.answer(whole) == says('c') and released.thought(whole) == says('a</think>b')
    for unfinished in '', 'ab', 'ab<|im_end|>', 'a</think>', 'a</think>c', 'a</think><|im_end|>':
        assert released.answer(says(unfinished)) is None
    assert released.thought(says('ab<|im_end|>')) == says('ab')


@pytest.mark.parametrize('eos, generation, expected', [
    ([5, 7], None, [5, 7]), (5, None, [5]), (None, None, []), (5, {'eos_token_id': [2, 9]}, [2, 9]), (5, {}, [5])])
def test_the_stop_tokens_are_those_of_generation_config_else_of_config(tmp_path, eos, generation, expected):
    files = {} if generation is None else {'generation_config.json': generation}
    folder = write_language(tmp_path, **{'config.json': {'eos_token_id': eos}}, **files)
    assert released_language(folder).stop == expected


@pytest.mark.parametrize('stored', [TEMPLATE, [{'name': 'tools', 'template': 'no'},
                                               {'name': 'default', 'template': TEMPLATE}]])
def test_a_template_may_be_in_tokenizer_config(tmp_path, released, stored):
    language = released_language(write_language(tmp_path, template=None, config={'chat_template': stored}))
    messages = [{'role': 'user', 'content': 'What?'}]
    assert language.prompt(messages) == released.prompt(messages)


BAD_TEMPLATES = {
    'no template': (None, 'there is no chat template'),
    'an error': ("{{ messages\n\n", 'line 1: the chat template cannot be rendered (unexpected end'),
    'a mistake': ('{{ nobody.said }}', "'nobody' is undefined"),
    'its own error': ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
    'a way out': ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'unsafe'),
    'a change': ('{% set _ = messages.append(1) %}', 'unsafe'),
    'endless': ('{% for i in range(10**9) %}{% endfor %}', 'Range too big'),
}


@pytest.mark.parametrize('name', BAD_TEMPLATES)
def test_a_bad_template_is_one_line_that_names_it(tmp_path, name):
    template, words = BAD_TEMPLATES[name]
    language = released_language(write_language(tmp_path, template=template))
    with pytest.raises(ValueError) as error:
        language.prompt([{'role': 'user', 'content': 'a'}])
    text = str(error.value)
    assert str(tmp_path) in text and words in text and '\n' not in text


@pytest.mark.parametrize('name, content, words', [
    ('tokenizer.json', '{', 'cannot be read'), ('tokenizer_config.json', '[', 'is not valid JSON'),
    ('generation_config.json', '{"eos_token_id": "x"}', 'eos_token_id is .x., it must be None or a whole number'),
    ('tokenizer_config.json', '{"chat_template": 5}', 'chat_template is 5, it must be None or text')])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content, words):
    folder = Path(write_language(tmp_path, template=None))
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        released_language(folder)
