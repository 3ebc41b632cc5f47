"""The tokenizer and the chat template of a folder, as a Language (data/language.py): of a released folder, which has
tokenizer.json and a template in jinja2, and of a run, which has bpe.json and the template of its training data."""
import os
import re

from configurator import package
from data.language import ChatTemplate, Language, language_of
from data.tokenizer import load_tokenizer
from runtime.legacy import is_legacy
from validate import read_json, read_text, reading

STOP = {'eos_token_id?': (None, int, [int])}
TEMPLATES = {'chat_template?': (None, str, [{'name': str, 'template': str}])}


def released_language(folder):
    """Return the Language of a released folder with tokenizer.json."""
    path, Tokenizer = os.path.join(folder, 'tokenizer.json'), package('tokenizers').Tokenizer
    with reading(path):
        tokenizer = Tokenizer.from_file(path)
    added = tokenizer.encode('a')                               # with the special tokens that the tokenizer adds
    bos = added.ids[:1] if added.special_tokens_mask[:1] == [1] else []
    special_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return Language(lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
                    lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False), special_tokens, bos,
                    released_stop_tokens(folder), released_template(folder), tokenizer.get_vocab_size())


def released_stop_tokens(folder):
    """Return the stop tokens in generation_config.json, else in config.json."""
    path, stop = os.path.join(folder, 'generation_config.json'), None
    if os.path.exists(path):
        stop = read_json(path, STOP).get('eos_token_id')
    if stop is None:                                            # 1 and 106 are the defaults of the two layouts' loaders
        config = read_json(os.path.join(folder, 'config.json'), STOP)
        stop = config.get('eos_token_id', 1 if is_legacy(config) else 106)
    return stop if isinstance(stop, list) else [] if stop is None else [stop]


def released_template(folder):
    """Return the ChatTemplate in chat_template.jinja, else in tokenizer_config.json, which also has its variables."""
    path = os.path.join(folder, 'tokenizer_config.json')
    settings = read_json(path, TEMPLATES) if os.path.exists(path) else {}
    names = {key: value.get('content') if isinstance(value, dict) else value
             for key, value in settings.items() if re.fullmatch('(bos|eos|unk|sep|pad|cls|mask)_token', key) and value}
    source = settings.get('chat_template')
    if isinstance(source, list):                                # several named templates
        source = {template['name']: template['template'] for template in source}.get('default')
    jinja = os.path.join(folder, 'chat_template.jinja')
    if not os.path.exists(jinja):
        return ChatTemplate(path, source, names)
    return ChatTemplate(jinja, read_text(jinja), names)


def run_language(folder):
    """Return the Language of a run of train.py."""
    return language_of(load_tokenizer(os.path.join(folder, 'bpe.json')), folder)
