"""Fuzz all programs: `python -m tests.fuzz --cases=10000`, or `--case=N` to run one case and print its output.

A case is a command line and possibly damaged files. It runs in a forked child under a memory and a time limit, and has
one of these outcomes, of which the first two are correct:

    ran         exit code 0, and the output is the expected one (`expected`, below)
    one line    exit code 1, and the last line on stderr starts with the program's name
    traceback, crash (a signal), hang (the time limit), silent (exit code 0, but not the expected output), refused (one
    line for input that is known to be valid)

Expected outputs: a run resumed from any of its checkpoints has the final weights of an uninterrupted run; a sample is
that of the checkpoint that was used; settings are those of the command line; a temperature near 0 takes the likeliest
tokens; a prompt is answered even if others are invalid; conversations are read or refused as their generator knows. The
same seed gives the same cases.
"""
import contextlib
import copy
import gc
import io
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch._dynamo      # imported by the optimizers: once here, not in every child

import configurator
import evaluate
import rsa
import sample
import train
from runtime import checkpoint, pretrained
from runtime.legacy import legacy_names
from tasks.loops import task
from data.prepare import prepare
from data.tokenizer import save_tokenizer
from model import ZayaConfig
from tests.common import ROOT, TINY_RUN, tiny_model

LIMIT, MEMORY = 20, 6 << 30                             # per case: seconds, bytes in addition to the parent's
OUTCOMES = 'ran', 'one line', 'traceback', 'crash', 'hang', 'silent', 'refused'
SAMPLE = ['--prompt=self', '--max_new_tokens=6', '--device=cpu']
RSA = ['--population=2', '--candidates=2', '--rounds=1', '--budget=6', '--tail=3', '--device=cpu']


# ---- one case in a child ----

def call(script, arguments, stdin=b'', memory=MEMORY):
    """Run `python script arguments` or `python -m script ...`. Return exit code, stdout and stderr."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        child = os.fork()
        if not child:
            code = 1
            try:
                for new, old in (given, 0), (out, 1), (err, 2):
                    os.dup2(new.fileno(), old)
                sys.stdin = open(0, encoding='utf-8', closefd=False)
                encoding = 'ascii' if script == 'train.py' else 'utf-8'         # a terminal without the characters
                sys.stdout, sys.stderr = (open(fd, 'w', encoding=encoding, closefd=False) for fd in (1, 2))
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
                signal.alarm(LIMIT)
                os.chdir(ROOT)
                sys.argv = [script, *arguments]
                run = runpy.run_path if script.endswith('.py') else runpy.run_module
                run(str(ROOT / script) if script.endswith('.py') else script, run_name='__main__')
                code = 0
            except SystemExit as error:
                code = 0 if error.code is None else 1
                print(error.code or '', file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            with contextlib.suppress(BaseException):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in out, err:
            file.seek(0)
            texts.append(file.read().decode('utf-8', 'replace'))
    return code, *texts


def outcome(script, code, err, expected):
    """Return one of OUTCOMES. expected() returns whether the output is the expected one."""
    if code < 0:
        return 'hang' if code == -signal.SIGALRM else 'crash'
    if 'Traceback (most' in err or 'panicked' in err:
        return 'traceback'
    if code:
        last = (err.replace('\r', '\n').strip().splitlines() or [''])[-1]
        return 'one line' if f'{script}: ' in last else 'traceback'
    return 'ran' if expected() else 'silent'


# ---- damage ----

BIG = [10 ** 9, 10 ** 12, 2 ** 31, 2 ** 63 - 1, 2 ** 63, 10 ** 19, 10 ** 400]
VALUES = [None, True, False, -1, 0, 1, 2, 7, 0.5, -0.0, 1e-300, 1e300, float('inf'), float('nan'), '', 'a', 'é' * 50,
          '\ud800', 'x' * 10 ** 5, [], [[]], {}, {'': {}}, [None], *BIG]


def nodes(value, path=()):
    """Yield the paths of all values inside a nested value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(inner)[:40]:
        yield from nodes(item, (*path, key))


def mutated(rng, value, values=VALUES):
    """Return a copy of a nested value with one inner value replaced or deleted, and its top-level key."""
    value = copy.deepcopy(value)
    paths = [path for path in nodes(value) if path]
    if rng.random() < 0.03:
        return rng.choice(VALUES), None
    top = rng.choice(sorted({path[0] for path in paths}, key=str))              # else most are deep in a long list
    *way, last = rng.choice([path for path in paths if path[0] == top])
    inside = value
    for key in way:
        inside = inside[key]
    if rng.random() < 0.25:
        del inside[last]
    else:
        inside[last] = rng.choice(values)
    return value, top


def damaged(rng, content):
    """Return content with bytes deleted, flipped, duplicated or inserted."""
    content = bytearray(content)
    at = rng.randrange(len(content) + 1)
    match rng.randrange(6):
        case 0:
            del content[at:]
        case 1:
            del content[at:at + rng.randrange(1, 9)]
        case 2:
            content[at:at] = rng.choice([b'\0', b'\xff', b'[' * 200_000, b'{"a":' * 200_000, b'9' * 5000, b'\n', b'"',
                                         b','])
        case 3:
            content[at:at] = content[at // 2:at]
        case _:
            for _ in range(rng.randrange(1, 4)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=True))


# ---- fixtures ----

class World:
    """Undamaged folders and the outputs expected from them."""

    def __init__(self, folder):
        rng = random.Random(0)
        self.folder, self.case = folder, folder / 'case'
        words = 'def return self import for in range print value index ( ) [ ] = + naïve 漢字'.split()
        text = lambda: '\n'.join(' '.join(rng.choices(words, k=8)) for _ in range(20)).encode()
        self.data, self.run, self.loops, self.released, self.legacy = (
            folder / name for name in ('data', 'run', 'loops', 'released', 'legacy'))
        prepare([(f'{i}.py', text()) for i in range(12)], self.data, 300)
        self.flags = [*TINY_RUN, f'--dataset={self.data}', '--sample_tokens=0', '--decay_fraction=0',
                      '--n_layer=1']
        train.train(*configurator.read([*self.flags, f'--out_dir={self.run}'], train.TrainConfig, ZayaConfig))
        (self.run / 'lock').unlink()
        model = tiny_model(vocab_size=task.ENC.n_vocab, context=256, n_layer=1)
        self.loops.mkdir()
        checkpoint.save_checkpoint(self.loops, {'model': model.state_dict(), 'step': 1,
                                                'model_config': asdict(model.config)})
        save_tokenizer(self.loops / 'bpe.json', task.ENC)
        self.write_released()
        self.write_legacy()
        self.state = torch.load(self.run / 'ckpt.pt', weights_only=True)
        self.samples = {name: self.sampled(self.run / name) for name in ('ckpt.pt', 'ckpt_previous.pt')}
        _, self.released_sample, _ = call('sample.py', [f'--ckpt={self.released}', *SAMPLE])
        self.resumed = self.copy('run')
        train.train(*configurator.read([*self.flags, f'--out_dir={self.resumed}', '--max_steps=6'], train.TrainConfig,
                                       ZayaConfig))
        self.resumed_state = checkpoint.load_checkpoint(self.resumed)
        self.model, self.language = pretrained.load(self.run)
        assert self.released_sample and all(self.samples.values())

    def write_released(self):
        import tokenizers
        self.released.mkdir()
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        bpe.train_from_iterator(['return self'], tokenizers.trainers.BpeTrainer(
            vocab_size=270, special_tokens=['<bos>', '<|im_end|>', '<think>', '</think>'], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        bpe.save(str(self.released / 'tokenizer.json'))
        model = tiny_model(vocab_size=300, context=512, n_layer=1, skip_expert=True)
        model.released_config = {'eos_token_id': 1}
        pretrained.save_pretrained(model, self.released)
        (self.released / 'tokenizer_config.json').write_text('{"bos_token": "<bos>"}')
        (self.released / 'generation_config.json').write_text('{"eos_token_id": [1]}')
        (self.released / 'chat_template.jinja').write_text(
            "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}")

    def write_legacy(self):
        import safetensors.torch
        shutil.copytree(self.released, self.legacy)
        tensors = safetensors.torch.load_file(self.legacy / 'model.safetensors')
        config = json.loads((self.released / 'config.json').read_text())
        safetensors.torch.save_file({
            name: (tensor if e is None else tensor[e]).clone() for released, tensor in tensors.items()
            for name, e in legacy_names(released, config)},
            self.legacy / 'model.safetensors')
        write_json(self.legacy / 'config.json', legacy_config(pretrained.load(self.released)[0].config))

    def sampled(self, path):
        """Return the output of sample.py for a run folder with only this checkpoint."""
        folder = self.folder / 'alone'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(path, folder / 'ckpt.pt')
        shutil.copy(self.run / 'bpe.json', folder)
        return call('sample.py', [f'--ckpt={folder}', *SAMPLE])[1]

    def copy(self, name):
        """Copy a folder, to be damaged."""
        to = self.case / name
        shutil.copytree(getattr(self, name), to)
        return to

    def resume(self, folder, *flags):
        return 'train.py', [*self.flags, f'--out_dir={folder}', '--max_steps=6', *flags], b''

    def same_end(self, folder):
        """Return whether a run ended as the uninterrupted one: same log, bit-identical weights and momenta."""
        state = checkpoint.load_checkpoint(folder)
        rows = [[row.split(',')[:3] for row in (at / 'log.csv').read_text().splitlines()[-2:]]     # step, tokens, loss
                for at in (folder, self.resumed)]
        return rows[0] == rows[1] and all(
            same(state[key], self.resumed_state[key]) for key in ('model', 'optimizers', 'balancer', 'step'))


def same(a, b):
    """Return whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, (dict, list)):
        return all(same(value, b[key]) for key, value in (a.items() if isinstance(a, dict) else enumerate(a)))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


def legacy_config(config):
    """Return config.json of a model in the legacy layout."""
    return {'model_type': 'zaya', 'zaya_use_eda': True, 'zaya_use_mod': True, 'scale_residual_merge': True, 'cca': True,
            'gated_linear_unit': True, 'clamp_temp': False, 'add_bias_linear': False, 'activation_func': 'swiglu',
            'norm_epsilon': config.norm_eps, 'partial_rotary_factor': config.rope_fraction, 'moe_router_topk': 1,
            'num_hidden_layers': 2 * config.n_layer, 'hidden_size': config.n_embd, 'vocab_size': config.vocab_size,
            'cca_num_q_heads': [config.n_head, 0] * config.n_layer, 'num_query_groups': config.n_kv_head,
            'ffn_hidden_size': 2 * config.expert_dim, 'zaya_mlp_expansion': config.router_dim,
            'head_dim': config.head_dim, 'rope_theta': config.rope_base, 'rope_scaling': False, 'eos_token_id': 1,
            'max_position_embeddings': config.context, 'num_experts': config.n_expert}


# ---- kinds of cases: each function returns script, arguments, stdin, expected(stdout, stderr), if valid True ----

ENCODINGS = 'utf-8', 'utf-8-sig', 'utf-16'
WORK = {'max_steps', 'grad_accum', 'population', 'rounds', 'num_samples', 'rows', 'problems', 'seeds', 'samples',
        'steps', 'compile', 'kernel', 'out', 'ckpt', 'dataset', 'out_dir', 'device', 'init_from', 'wandb'}


def setting(rng, cls):
    """Return a field of a settings class, a text for its value, and the value it parses to, or None."""
    field = rng.choice([field for field in fields(cls) if field.name not in WORK])
    kind, small = type(field.default), rng.choice([0, 1, 2, 3, 4, 8])
    if rng.random() < 0.5:
        value = {int: small, float: rng.choice([0.5, 1.0, 1e-3, 0.0]), bool: rng.random() < 0.5, str: ''}[kind]
        return field.name, rng.choice([repr(value), f'+{value!r}' if kind in (int, float) else repr(value)]) \
            if kind is not str else value, value
    bad = ['', 'a', 'None', '[1]', '-1', '1e999', '1e300', '-1e300', '1e-300', 'nan', '1_000_000_000_000', '9' * 20,
           '9' * 5000, '(' * 5000, '0x10', '2**9', 'é', '\udcff', '1/0', '"a"', '=']
    return field.name, rng.choice(bad), None


def command_line(rng, world):
    """Valid and invalid flags of a program."""
    script, cls, base = rng.choice([
        ('train.py', (train.TrainConfig, ZayaConfig), [*world.flags, f'--out_dir={world.case}/new']),
        ('sample.py', (sample.SampleConfig, sample.SamplingOptions), [f'--ckpt={world.run}', *SAMPLE]),
        ('rsa.py', (rsa.RSAConfig, rsa.RSASettings, sample.SamplingOptions), [f'--ckpt={world.loops}', *RSA]),
        ('evaluate.py', (evaluate.TableConfig, rsa.RSASettings, sample.SamplingOptions),
         [f'--ckpt={world.loops}', '--split=easy', '--problems=1', *RSA])])
    flags, last, odd = [], {}, []
    for _ in range(rng.randrange(1, 4)):
        key, text, value = setting(rng, rng.choice(cls))
        flags.append(f'--{key}={text}')
        last[key] = value
        if rng.random() < 0.05:
            odd = rng.choice([[f'-{key}'], [f'--{key}'], [f'--{key}', text], [f'-{key}={text}'], [f'--{key}x=1'],
                              ['--']])
            flags += odd
    if ask := rng.random() < 0.03:
        flags.append(rng.choice(['-h', '--help']))
    flags = [*base, *flags]
    if rng.random() < 0.1:
        flags.insert(0, rng.choice(['nowhere.py', str(world.folder), '/dev/null', '\udcff.py']))

    def expected(out, err):
        if ask or odd:
            return ask and all(f'--{field.name}=' in out for each in cls for field in fields(each))
        if script != 'train.py':
            return True
        state = checkpoint.load_checkpoint(world.case / 'new')
        saved = state['config'] | state['model_config']
        return all(value is None or saved[key] == value for key, value in last.items())
    return script, flags, b'', expected


def config_file(rng, world):
    """A config file, possibly damaged, and flags before or after it, which override it."""
    path, lines, file, flags = world.case / 'config.py', [], {}, {}
    for _ in range(rng.randrange(4)):
        key, text, value = setting(rng, rng.choice([train.TrainConfig, ZayaConfig]))
        lines.append(f'{key} = {text!r}' if isinstance(value, str) else f'{key} = {text}')
        file[key] = value
    content = '\n'.join(lines).encode('utf-8', 'surrogateescape')
    if broken := rng.random() < 0.3:
        content = damaged(rng, content + b'\n# a comment\n')
    elif rng.random() < 0.3:
        content = content.decode('utf-8', 'surrogateescape').encode(rng.choice(ENCODINGS), 'replace')
    path.write_bytes(content)
    for _ in range(rng.randrange(2)):
        key, text, value = setting(rng, rng.choice([train.TrainConfig, ZayaConfig]))
        flags[key] = (f'--{key}={text}', value)
    arguments = [*world.flags, f'--out_dir={world.case}/new']
    plain = {argument[2:].partition('=')[0] for argument in arguments}
    wanted = {key: value for key, value in file.items() if key not in plain} | {key: value for key, (_, value)
                                                                               in flags.items()}
    arguments += [flag for flag, _ in flags.values()]
    arguments.insert(rng.randrange(len(arguments) + 1), str(path))

    def expected(out, err):
        state = checkpoint.load_checkpoint(world.case / 'new')
        saved = state['config'] | state['model_config']
        return broken or all(value is None or saved[key] == value for key, value in wanted.items())
    return 'train.py', arguments, b'', expected


def saved_run(rng, world):
    """A checkpoint with a value changed or deleted, used by sample.py or a resumed run."""
    folder = world.copy('run')
    odd = [*VALUES, torch.zeros(3), torch.zeros(0), torch.tensor(1), torch.tensor([float('nan')])]
    # Another valid step, and settings that do not show in shapes, cannot be detected.
    value, top = mutated(rng, world.state, values=odd)
    if top == 'step':
        value['step'] = rng.choice([None, 'a', -1, 0.5, 10 ** 19])
    config = value.get('model_config') if isinstance(value, dict) else None
    free = 'context', 'rope_base', 'rope_fraction', 'norm_eps', 'init_std'
    unseen = isinstance(config, dict) and any(              # repr: the value may be a tensor, which has no truth value
        repr(config.get(key)) != repr(world.state['model_config'][key]) for key in free)
    try:
        torch.save(value, folder / 'ckpt.pt')
    except (RuntimeError, UnicodeError, OverflowError):         # cannot be written: use an empty file
        (folder / 'ckpt.pt').write_bytes(b'')
    return use_run(rng, world, folder, unseen)


def saved_bytes(rng, world):
    """A checkpoint with changed bytes."""
    folder = world.copy('run')
    name = rng.choice(['ckpt.pt', 'ckpt_previous.pt'])
    (folder / name).write_bytes(damaged(rng, (folder / name).read_bytes()))
    return use_run(rng, world, folder)


def use_run(rng, world, folder, unseen=False):
    if rng.random() < 0.5:
        return *world.resume(folder), lambda out, err: world.same_end(folder)
    return 'sample.py', [f'--ckpt={folder}', *SAMPLE], b'', lambda out, err: unseen or out == world.samples[
        'ckpt_previous.pt' if 'ckpt.pt is damaged' in err else 'ckpt.pt']


def log_file(rng, world):
    """A log that is damaged or of another program."""
    folder = world.copy('run')
    foreign = [b'', b'a,b\n1,2\n', bytes(range(256)), b'step\n', b'step,loss\n1,' + b'9' * 200_000, b'step,loss\nx,y\n']
    content = damaged(rng, (folder / 'log.csv').read_bytes()) if rng.random() < 0.7 else rng.choice(foreign)
    (folder / 'log.csv').write_bytes(content)
    return *world.resume(folder), lambda out, err: world.same_end(folder)


def json_of(rng, path):
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return None
    value, top = mutated(rng, json.loads(path.read_text()))
    write_json(path, value)
    return top


def dataset_json(rng, world):
    """A dataset in a folder of any name. Damage in its meta.json or bpe.json is detected or has no effect."""
    folder, run, good = world.copy('data'), world.copy('run'), rng.random() < 0.3
    if not good:
        json_of(rng, folder / rng.choice(['meta.json', 'bpe.json']))
    name = rng.choice(['data', 'My Data', 'D:data', '0.5:2', 'a b:c'])
    folder = folder.rename(folder.with_name(name))
    script, flags, stdin = world.resume(run, f'--dataset={folder}{rng.choice(["", ":2", ":0.5"])}')
    return script, flags, stdin, lambda out, err: world.same_end(run), good


def tokenizer_json(rng, world):
    """bpe.json of a run: the damage is detected or has no effect."""
    folder = world.copy('run')
    json_of(rng, folder / 'bpe.json')
    return 'sample.py', [f'--ckpt={folder}', *SAMPLE], b'', lambda out, err: out == world.samples['ckpt.pt']


def released_json(rng, world):
    """The JSON files of a folder in the released or the legacy layout. Other values of some keys in config.json cannot
    be detected."""
    folder, name = world.copy(rng.choice(['released', 'legacy'])), rng.choice(
        ['config.json'] * 3 + ['tokenizer_config.json', 'generation_config.json', 'tokenizer.json'])
    top = json_of(rng, folder / name)
    free = name != 'config.json' or top in (None, 'rms_norm_eps', 'initializer_range', 'rope_parameters',
                                            'num_attention_heads', 'max_position_embeddings', 'eos_token_id',
                                            'norm_epsilon', 'rope_theta', 'partial_rotary_factor')
    chat = ['--chat=True'] * (rng.random() < 0.3)
    return 'sample.py', [f'--ckpt={folder}', *SAMPLE, *chat], b'', lambda out, err: (
        free or bool(chat) or out == world.released_sample)


def weights_file(rng, world):
    """model.safetensors: header damaged or truncated; tensors missing, duplicated, or of another shape or dtype."""
    import safetensors.torch
    folder = world.copy('released')
    path = folder / 'model.safetensors'
    content = path.read_bytes()
    if rng.random() < 0.4:
        n = int.from_bytes(content[:8], 'little') + 8
        head, rest = content[:n], content[n:]
        path.write_bytes(damaged(rng, head) + rest if rng.random() < 0.7 else content[:rng.randrange(len(content))])
    else:
        tensors = safetensors.torch.load(content)
        name = rng.choice(sorted(tensors))
        match rng.randrange(6):
            case 0:
                del tensors[name]
            case 1:
                tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool]))
            case 2:
                tensors[name] = tensors[name].flatten()[:rng.randrange(3)].clone()
            case 3:
                tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'] + 1e-3
            case 4:
                tensors[f'{name}x'] = tensors[name].clone()
            case 5:
                other = {name: tensors[name] + 1}
                safetensors.torch.save_file(other, folder / 'b.safetensors')
                safetensors.torch.save_file(tensors, folder / 'a.safetensors')
                path.unlink()
                shards = dict.fromkeys(tensors, 'a.safetensors') | {name: 'b.safetensors'}
                write_json(folder / 'model.safetensors.index.json', {'weight_map': shards})
        if path.exists():
            safetensors.torch.save_file(tensors, path)
    if rng.random() < 0.2:
        return 'quantize.py', [str(folder), str(folder / 'out'), '--bits=8'], b'', lambda out, err: (
            content == path.read_bytes() or b'lm_head' not in path.read_bytes())
    return 'sample.py', [f'--ckpt={folder}', *SAMPLE], b'', lambda out, err: out == world.released_sample


def conversations(rng, world):
    """A file of conversations, valid or not, in one of the formats and encodings that are read."""
    text = lambda: rng.choice(['What?', 'naïve 漢字', '<|end|><think>', 'a' * rng.randrange(1, 200), '</think>'])
    reply = lambda: rng.choice([
        {}, {'reasoning': 'so'}, {'reasoning_content': 'so'}]) | {'role': 'assistant', 'content': rng.choice([
            '', '<think>so</think>', 'so</think>', '<thinking>so</thinking>',
            '<|begin_of_thought|>so<|end_of_thought|>']) + rng.choice(['4', 'naïve', '<|user|>'])}
    lines = [{'messages': [message for _ in range(rng.randrange(1, 3))
                           for message in ({'role': 'user', 'content': text()}, reply())]}
             for _ in range(rng.randrange(2, 6))]
    replies, good = sum(len(line['messages']) // 2 for line in lines), rng.random() < 0.6
    if not good:
        messages = rng.choice(lines)['messages']
        rng.choice([lambda: messages.pop(), lambda: messages[0].pop('content'),
                    lambda: messages[0].update(role='system'), lambda: messages[-1].update(role='tool'),
                    lambda: messages[-1].update(content='<think>never closed'), lambda: messages.clear(),
                    lambda: messages[-1].update(content='<think>so</think>4', reasoning='another'),
                    lambda: messages[0].update(content=rng.choice([None, 3, '', ' ', ['a'], '\ud800'])),
                    lambda: messages.append([]), lambda: messages.insert(0, 'hello')])()
    elif rng.random() < 0.3:
        lines = [{'conversations': [{'from': {'user': 'human', 'assistant': 'gpt'}[message['role']],
                                     'value': message['content']} for message in line['messages']]} for line in lines]
    elif rng.random() < 0.3:
        replies = len(lines)
        lines = [{'instruction': line['messages'][0]['content'], 'input': rng.choice(['', 'x']),
                  'output': line['messages'][1]['content'], 'system': rng.choice([None, 'OK'])} for line in lines]
    array, encoding = rng.random() < 0.3, rng.choice(ENCODINGS)
    path = world.case / 'talk.jsonl'
    text = json.dumps(lines) if array else '\n'.join(map(json.dumps, lines)) + '\n'
    path.write_bytes(text.encode(encoding))
    context = rng.choice([8, 64, 10 ** 7])
    out_dir = path.parent / 'chat'

    def expected(out, err):
        meta = json.loads((out_dir / 'meta.json').read_text())
        kept = sum(meta[split]['documents'] for split in ('train', 'val'))
        dropped = sum(int(n) for n in re.findall(r'(\d+) dropped', out))        # too long for the context
        return good and (context < 64 or kept + dropped == replies)
    flags = [str(path), f'--out={out_dir}', f'--context={context}', '--vocab_size=300']
    return 'data.chat.prepare', flags, b'', expected, good and context == 10 ** 7


def problems_file(rng, world):
    """A file of problems, valid or damaged; or a second run after the problems, weights or results have changed."""
    path, folder = world.case / 'p.jsonl', world.copy('released')
    flags = [f'--ckpt={folder}', f'--problems={path}', '--population=2', '--candidates=1', '--rounds=1',
             '--budget=2', '--tail=1', '--final_budget=2', '--device=cpu']
    table = lambda out, n='': out.startswith('| problems | mean') and f'\n| {n}' in out
    array, encoding = rng.random() < 0.3, rng.choice(ENCODINGS)
    make = rng.choice([lambda question, answer: {'problem': question, 'answer': answer},
                       lambda question, answer: {'question': question, 'answer': f'It is 2 + 2.\n#### {answer}'},
                       lambda question, answer: {'Problem': question, 'solution': f'So \\boxed{{{answer}}}.'}])

    def write(*problems):
        entries = [make(*problem) for problem in problems]
        text = json.dumps(entries) if array else '\n'.join(map(json.dumps, entries))
        path.write_bytes(text.encode(encoding))
    if rng.random() < 0.3:
        write(('2 + 2?', 4), ('3?', 3))
        odd = {rng.choice(['problem', 'question']): rng.choice(VALUES), 'answer': rng.choice(VALUES)}
        path.write_bytes(damaged(rng, path.read_bytes()) if rng.random() < 0.5 else json.dumps(odd).encode())
        return 'rsa.py', flags, b'', lambda out, err: table(out)
    write(('2 + 2?', 4), ('3?', 3))
    code, first, _ = call('rsa.py', flags)
    if code or not table(first, '2 |'):
        return 'rsa.py', flags, b'', lambda out, err: False, True
    wanted = None                                               # the table of the second run; None: one line
    match rng.randrange(6):
        case 0:
            wanted = lambda out: out == first
        case 1:
            write(('2 + 2?', 4), ('3?', 3), ('4?', 4))
            wanted = lambda out: table(out, '3 |')
        case 2:
            write(('2 + 3?', 4), ('3?', 3))
        case 3:
            write(('2 + 2?', 4), ('3?', rng.choice([4, '3.5', 'x'])))
        case 4:
            weights = bytearray((folder / 'model.safetensors').read_bytes())
            weights[-rng.randrange(1, 1000)] ^= 1
            (folder / 'model.safetensors').write_bytes(weights)
        case 5:
            results = path.with_name('p.rsa.jsonl')
            lines = results.read_bytes().splitlines()
            i = rng.randrange(len(lines))
            lines[i] = json.dumps(mutated(rng, json.loads(lines[i]))[0]).encode()
            content = b'\n'.join(lines) + b'\n'
            results.write_bytes(content if rng.random() < 0.7 else damaged(rng, content))
            wanted = table
    return 'rsa.py', flags, b'', lambda out, err: bool(wanted and wanted(out))


def prompts(rng, world):
    """Prompts on the command line and on standard input, valid and invalid; temperatures near 0."""
    language, pieces = world.language, ['self', '<|end|>', '<think>', 'é漢', '\0', ' ', '\u2028', '🙂', '\x1b[0m']
    make = lambda: ''.join(rng.choices(pieces, k=rng.randrange(1, 4)))
    cold = [f'--temperature={rng.choice(["0", "1e-300", "1e-45", "1e-38", "1e-30"])}']
    common = [f'--ckpt={world.run}', '--max_new_tokens=3', '--device=cpu', *cold]

    def continued(prompt):
        tokens = language.encode(prompt)
        room = world.model.config.context - len(tokens)
        if not tokens or room < 1:
            return None
        new, = sample.generate(world.model, [tokens], min(3, room), sample.SamplingOptions(0), stop=language.stop)
        return prompt + language.decode([token for token in new if token not in language.stop])
    if rng.random() < 0.3:
        prompt = make().replace('\0', '')
        assert not set(language.encode(prompt)) & {language.open_think[0], *language.stop}
        return 'sample.py', [*common, f'--prompt={prompt}'], b'', lambda out, err: out == f'{continued(prompt)}\n'
    lines = [rng.choice([make(), make(), '', 'x' * 99, b'\xff', b'self\xc3', b'\xed\xa0\x80']) for _ in range(3)]
    stdin = b'\n'.join(line if isinstance(line, bytes) else line.encode() for line in lines) + b'\n'
    texts = [continued(line) for line in lines if isinstance(line, str)]
    return 'sample.py', common, stdin, lambda out, err: out == ''.join(f'{text}\n' for text in texts if text) + '\n'


KINDS = {'command lines': command_line, 'config files': config_file, 'checkpoints, inside': saved_run,
         'checkpoints, bytes': saved_bytes, 'logs': log_file, 'meta.json, bpe.json of data': dataset_json,
         'bpe.json of a run': tokenizer_json, 'JSON of a release': released_json, 'safetensors': weights_file,
         'conversations': conversations, 'problems': problems_file, 'prompts': prompts}


# ---- all cases ----

@dataclass
class FuzzConfig:
    cases: int = 500
    seed: int = 0
    case: int = -1                  # run only this one, and print its output


def cases(world, config, numbers, memory):
    """Run the cases with these numbers. Return [(number, kind, outcome, last line of stderr), ...]."""
    done = []
    for i in numbers:
        shutil.rmtree(world.case, ignore_errors=True)
        world.case.mkdir(parents=True)
        kind, rng = list(KINDS)[i % len(KINDS)], random.Random(f'{config.seed} {i}')
        script, arguments, stdin, expected, *valid = KINDS[kind](rng, world)
        code, out, err = call(script, arguments, stdin, memory)
        result = outcome(script, code, err, lambda: expected(out, err))
        result = 'refused' if result == 'one line' and any(valid) else result
        done.append((i, kind, result, (err.replace('\r', '\n').strip().splitlines() or [''])[-1][:200]))
        if config.case >= 0:
            print(f'{script} {arguments!r:.3000}\n{out[-3000:]}\n{err[-3000:]}\nexit code {code}')
    return done


def shared(work, jobs):
    """Run work(job) in `jobs` forked children. Return their lists, concatenated."""
    children, done = [], []
    for job in range(jobs):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                with open(write, 'w') as file:
                    json.dump(work(job), file)
                code = 0
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            os._exit(code)
        os.close(write)
        children.append((child, read))
    for child, read in children:
        with open(read) as file:
            done += json.loads(file.read() or '[]')
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, 'the fuzzer itself has failed'
    return done


def main(config):
    torch.set_num_threads(1)
    began, table = time.perf_counter(), defaultdict(Counter)
    with open('/proc/self/statm') if os.path.exists('/proc/self/statm') else io.StringIO('0') as file:
        memory = MEMORY + int(file.read().split()[0]) * resource.getpagesize()
    memory_disk = '/dev/shm' if os.path.isdir('/dev/shm') else None             # fsync is free there
    with tempfile.TemporaryDirectory(dir=memory_disk) as folder, contextlib.redirect_stderr(io.StringIO()):
        with contextlib.redirect_stdout(io.StringIO()):
            world = World(Path(folder))
        gc.freeze()                                             # children need not scan the shared objects

        def work(job):
            world.case = world.folder / f'case{job}'
            return cases(world, config, range(job, config.cases, jobs) if config.case < 0 else [config.case], memory)
        jobs = min(os.cpu_count(), 16) if config.case < 0 else 1
        done = sorted(shared(work, jobs)) if config.case < 0 else work(0)
    for _, kind, result, _ in done:
        table[kind][result] += 1
    print(f'| kind | cases | {" | ".join(OUTCOMES)} |\n| {"--- | " * (2 + len(OUTCOMES))}'.rstrip())
    for kind, row in [*((kind, table[kind]) for kind in KINDS), ('all', sum(table.values(), Counter()))]:
        print(f'| {kind} | {row.total():,} | {" | ".join(f"{row[result]:,}" for result in OUTCOMES)} |')
    print(f'seed {config.seed}, {time.perf_counter() - began:.0f} s')
    bad = [case for case in done if case[2] not in OUTCOMES[:2]]
    for i, kind, result, last in bad:
        print(f'case {i}, {kind}: {result}: {last}')
    return len(bad)


if __name__ == '__main__':
    with configurator.one_line_errors('tests.fuzz'):
        sys.exit(main(*configurator.read(sys.argv[1:], FuzzConfig)) > 0)
