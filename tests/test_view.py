"""The page of evidence/view.py shows what the model computed, needs no other file, and never runs text as code."""
import base64
import csv
import html
import json
import random
import re
import shutil
import subprocess
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import router
from common import run_script, tiny_model, tokens
from data.tokenizer import SPECIAL_TOKENS, make_encoding, save_tokenizer
from evidence import view
from evidence.rl import state
from runtime.checkpoint import save_checkpoint
from runtime.pretrained import load, save_pretrained
from sample import SamplingOptions
from tasks import policy
from tasks.loops import task
from test_language import write_language

QUESTION = '4x:a-2b*7c+3=5'
HOSTILE = '</script><script>document.title = "owned"</script><!-- <img src=x onerror="document.title=1">\u2028\n😀'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)


def make_run(folder, encoding, **sizes):
    model = tiny_model(vocab_size=encoding.n_vocab, context=256, **sizes)
    save_checkpoint(folder, {'model': model.state_dict(), 'model_config': asdict(model.config), 'step': 1})
    save_tokenizer(folder / 'bpe.json', encoding)
    return folder


@pytest.fixture(scope='module')
def loops_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('loops'), task.ENC)


@pytest.fixture(scope='module')
def text_run(tmp_path_factory):
    byte_encoding = make_encoding(r'[\s\S]', [bytes([b]) for b in range(256)], SPECIAL_TOKENS)
    return make_run(tmp_path_factory.mktemp('text'), byte_encoding)


@pytest.fixture
def experts_err(monkeypatch):
    """Replace the model's outputs by simulated candidates that continue the tails they read, with occasional errors.
    Return them: [(tails, output)] per round."""
    rng, said = random.Random(0), []

    def generate(prompts, limit):
        said.append([])
        for prompt in prompts:
            question, *tails = re.findall(r'(?<=<\|user\|>)[^[<]*|(?<=\[)[^]]*(?=\])', task.ENC.decode(prompt))
            problem = task.parse(question)
            begin = task.majority_vote([state(problem, tail) for tail in tails] or [(0, problem.start)])
            chain = task.continue_chain(problem, [begin or state(problem, tails[0])], 8, rng, 0.05)
            output = task.encode_chain(problem, chain)
            if chain[-1][0] == problem.steps:
                output += [task.CLOSE, *task.ENC.encode_ordinary(str(chain[-1][1])), task.END]
            said[-1].append(([task.ENC.encode(tail, allowed_special='all') for tail in tails], output[:limit]))
        return [output for _, output in said[-1]]
    monkeypatch.setattr(policy.Policy, 'sampler', lambda *_: generate)
    return said


def read(page):
    """Return the JSON of a page, as a browser would parse it."""
    return json.loads(re.search(r'<script type="application/json" id="shown">(.*?)</script', page, re.S)[1])


def attention_in(text, n_layer, n_head):
    """Undo the packing of show_text -> (L, H, S, S)."""
    S = len(text['tokens'])
    weights = torch.zeros(n_layer, n_head, S, S)
    for t, row in enumerate(text['attention']):
        levels = torch.tensor(list(base64.b64decode(row))).view(n_layer, n_head, t + 1)
        weights[:, :, t, :t + 1] = (levels / 255) ** 2
    return weights


# ---- the page ----

def test_the_page_loads_nothing_and_lets_no_text_become_part_of_it(text_run):
    shown = view.view(view.ViewConfig(str(text_run), HOSTILE)) | {'folder': HOSTILE}
    page = view.page(shown)
    assert read(page) == shown and ''.join(shown['texts'][0]['tokens'][:30]) == HOSTILE[:30]
    assert page.count('<script') == page.count('</script') == 2 and page.count('<!--') == 1
    template = view.TEMPLATE.read_text()
    assert "default-src 'none'" in template and len(page.encode()) <= 500_000
    assert not re.search(r'https?:|src=|url\(|@import|fetch\(|innerHTML|outerHTML|document\.write|eval\(', template)


@pytest.mark.parametrize('sizes', [{}, dict(n_layer=12, n_head=16)])
def test_no_page_is_larger_than_its_limit_whatever_the_model(sizes, tmp_path, experts_err):
    shown = view.view(view.ViewConfig(str(make_run(tmp_path, task.ENC, **sizes)), '9x:a-2b*7c+3d+1e+2f+3g+4=5'))
    assert len(view.page(shown).encode()) <= 500_000
    assert shown['texts'][0]['tokens'][:2] == ['<|user|>', '9'] and shown['texts'][0]['cell'][0] > 0


# ---- the model ----

@torch.no_grad()
def test_what_is_shown_of_a_text_is_what_the_model_did():
    model, text = tiny_model(skip_expert=True), tokens(20).tolist()
    model.routers[1].balancing_bias[2] += 1
    chosen, stream, attended, attention = [], [], [], F.scaled_dot_product_attention
    for layer in model.layers:
        layer.moe.router.register_forward_hook(lambda module, args, out: chosen.append((out[0][0], out[1][0])))
        layer.register_forward_hook(lambda module, args, out: stream.append(out[0][0].square().mean(-1).sqrt()))
    found = view.show_text(model, lambda t: str(t), text, 3)
    assert found['tokens'] == [str([t]) for t in text] and found['n_prompt'] == 3
    assert found['expert'] == [expert.tolist() for expert, _ in chosen] and {2} == set(found['expert'][1])
    probs = torch.tensor(found['probs']) / 1000                                 # (L, S, M)
    weight = probs.gather(-1, torch.tensor(found['expert'])[..., None])[..., 0]
    torch.testing.assert_close(weight, torch.stack([w for _, w in chosen]), atol=6e-4, rtol=0)
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 20), atol=3e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(found['entropy']), router.load_entropy(probs), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.tensor(found['rms'])[2::2], torch.stack(stream), atol=1e-4, rtol=0)

    def attend(q, k, v, **settings):
        attended.append((v, attention(q, k, v, **settings)))
        return attended[-1][1]
    with view.replaced(F, scaled_dot_product_attention=attend):
        weights = view.observe(model, text)[2]                     # (L, H, S, S)
    assert torch.equal(weights, weights.tril())
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 20))
    for layer, (v, y) in enumerate(attended):                   # these weights give the attention output
        torch.testing.assert_close(weights[layer] @ v[0].repeat_interleave(2, 0), y[0], atol=1e-5, rtol=1e-4)
    packed = attention_in(found, 3, 4)
    torch.testing.assert_close(packed, weights, atol=1 / 255, rtol=0)
    torch.testing.assert_close(packed.sum(-1), torch.ones(3, 4, 20), atol=0.02, rtol=0)
    assert all(one.choose is router.choose for one in model.routers) and F.scaled_dot_product_attention is attention
    assert not model.layers[0]._forward_pre_hooks and not model.layers[0].attn_residual._forward_hooks


def test_a_text_model_continues_a_prompt_without_rounds(text_run):
    shown = view.view(view.ViewConfig(str(text_run), 'def f(', seed=3))
    model, language = load(text_run)
    output, = view.generate(model, [language.encode('def f(')], view.NEW, SamplingOptions(seed=3), stop=language.stop)
    text, = shown['texts']
    assert text['tokens'] == [language.decode([t]) for t in [*language.encode('def f('), *output]]
    assert text['n_prompt'] == 6 and shown['rsa'] is None and shown['training'] == {}


def test_a_released_folder_is_shown(tmp_path):
    pytest.importorskip('safetensors')
    model = tiny_model(vocab_size=300, context=64, skip_expert=True)
    model.released_config = {'eos_token_id': 2}
    save_pretrained(model, write_language(tmp_path))
    shown = view.view(view.ViewConfig(str(tmp_path), 'hello'))
    assert shown['n_class'] == 5 and 'cell' not in shown['texts'][0] and len(shown['bias'][0]) == 5


# ---- the population ----

def test_correct_is_what_the_verifier_says_and_all_sampled_tails_are_shown(loops_run, experts_err):
    shown = view.view(view.ViewConfig(str(loops_run), QUESTION))
    rounds = shown['rsa']['rounds']
    assert len(rounds) == len(experts_err) == 1 + task.rounds_needed(12, 41)
    for now, said in zip(rounds, experts_err):
        right = [task.verify(QUESTION, tails, output, 41) for tails, output in said]
        assert [not one['wrong'] for one in now] == right and 0 < sum(right)
        assert [''.join(piece for piece, _ in one['pieces']) for one in now] == [
            task.ENC.decode(output) for _, output in said]
        for one in now:                                         # a wrong candidate has exactly one first error
            assert [mark for _, mark in one['pieces']].count('wrong') == bool(one['wrong'])
    assert not all(not one['wrong'] for now in rounds for one in now)
    for before, now, said in zip(rounds, rounds[1:], experts_err[1:]):
        for one, (tails, _) in zip(now, said):
            assert [before[j]['tail'] for j in one['sampled']] == [task.ENC.decode(tail) for tail in tails]


@pytest.mark.parametrize('text, places, marks', [
    ('54a-2=34b*7=1', {0}, ' 5| 4a-2=3| 4b*7=1'),
    ('54a-2=34b*7=24c+3=5', {0}, ' 5| 4a-2=3|!4b*7=2|-4c+3=5'),
    ('64a-2=44b*7=8', {0}, '!6|-4a-2=4|-4b*7=8'),
    ('54a-2=34c+3=4', {0}, ' 5| 4a-2=3|!4c+3=4'),
    ('14c+3=43a-2=2', {3}, ' 1|!4c+3=4|-3a-2=2'),
    ('14c+3=43a-', {2, 3}, ' 1| 4c+3=4| 3a-'),
    ('21c+3=5</think>5<|end|>', {11}, ' 2| 1c+3=5| </think>5| <|end|>'),
    ('21c+3=5</think>6<|end|>', {11}, ' 2| 1c+3=5|!</think>6|-<|end|>'),
    ('5</think>5<|end|>', {12}, ' 5| </think>5| <|end|>'),
    ('69b*7=2', {0}, '!6|-9b*7=2'), ('54z-2=3', {0, None}, ' 5|!4z-2=3'),       # not a step of the program
    ('4a-2=3', {0}, '!4a-2=3'), ('hello', {0}, '!hello'), ('<|user|>', {0}, '!<|-|user|>')])
def test_a_step_is_marked_where_it_first_goes_wrong(text, places, marks):
    pieces = view.mark_errors(task.parse(QUESTION), text, places)
    assert '|'.join({'': ' ', 'wrong': '!', 'after': '-'}[mark] + piece for piece, mark in pieces) == marks


def test_the_notable_candidates_are_an_error_and_one_that_outvoted_it():
    cell = lambda wrong, sampled: {'wrong': wrong, 'sampled': sampled, 'end': {'right': not wrong}}
    rounds = [[cell(None, []), cell('computed', [])], [cell(None, [0]), cell(None, [0, 1])]]
    assert view.notable(rounds) == [(1, 1), (0, 1)]
    rounds[0][1] = cell(None, [])
    assert view.notable(rounds) == [(1, 1)]


# ---- training ----

def write_log(folder, rows, *extra):
    """Write a log of 2 layers and 2 experts."""
    columns = ['step', 'loss', 'val_loss', 'lr', 'grad_norm', 'tokens_per_s', 'residual_0', 'residual_1', 'entropy_0',
               'entropy_1', *(f'{kind}_{layer}_{expert}' for kind in extra for layer in (0, 1) for expert in (0, 1))]
    with open(folder / 'log.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerow({'step': 0, 'val_loss': 5})
        for step in range(1, rows + 1):
            writer.writerow({'step': step} | {name: step + i / 8 for i, name in enumerate(columns[1:])})


def test_load_and_bias_per_expert_are_shown_only_if_they_were_logged(tmp_path):
    write_log(tmp_path, 3)
    assert view.training_curves(tmp_path).keys() == {'entropy'} and len(view.training_curves(tmp_path)['entropy']) == 2
    write_log(tmp_path, 3, 'load', 'bias')
    found = view.training_curves(tmp_path)
    assert found.keys() == {'load', 'bias', 'entropy'}
    assert found['load'][0] == [[[1, 2, 3], [2.125, 3.125, 4.125]], [[1, 2, 3], [2.25, 3.25, 4.25]]]
    assert found['bias'][1][1] == [[1, 2, 3], [3.0, 4.0, 5.0]]
    assert view.training_curves(tmp_path / 'nowhere') == {}


def test_a_long_curve_keeps_few_points_and_the_last():
    steps, values = view.thin_out(list(range(1000)), [float(x) for x in range(999)] + [float('nan')], 90)
    assert len(steps) == len(values) <= 90 and steps[-1] == 999 and values[-1] is None and values[:-1] == steps[:-1]
    assert view.thin_out([1, 2], [1.0, 2.0], 90) == [[1, 2], [1.0, 2.0]]


# ---- the command ----

def test_the_command_writes_a_page_into_the_run_folder_and_opens_it(text_run, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr('webbrowser.open', opened.append)
    flags, page = [f'--ckpt={text_run}', '--question=a b', '--open=True'], text_run / 'view.html'
    out, message = run_script(monkeypatch, capsys, 'evidence.view', *flags)
    assert message is None and out.strip() == str(page) and opened == [page.as_uri()]
    assert read(page.read_text())['folder'] == str(text_run)


@pytest.mark.parametrize('run, argument, message', [
    ('loops_run', '--question=2+2', 'is not a question like'), ('text_run', '--seed=0', 'needs a --question'),
    ('text_run', '--question=' + 300 * 'x', 'a page has room for'), ('text_run', '--question=', 'a page has room for'),
    ('text_run', '--out=page.png', 'ends in .html'), ('text_run', '--seed=-1', 'seed'),
    ('text_run', '--ckpt=nowhere', 'no such folder'), ('text_run', '--quest=a', "did you mean 'question'"),
    ('text_run', '--out=/nowhere/at/all.html', 'No such file')])
def test_bad_input_gets_one_line(run, argument, message, request, monkeypatch, capsys):
    flags = [f'--ckpt={request.getfixturevalue(run)}', *['--question=a'] * argument.startswith('--out'), argument]
    assert message in run_script(monkeypatch, capsys, 'evidence.view', *flags)[1]


def test_a_log_of_something_else_gets_one_line(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, task.ENC)
    (tmp_path / 'log.csv').write_text('step,accuracy\n1,2\n')
    assert 'was not written by train.py' in run_script(monkeypatch, capsys, 'evidence.view', f'--ckpt={tmp_path}')[1]


# ---- in a browser ----

WATCH = """<script>
  const errors = []
  addEventListener('error', event => errors.push(event.message))
  addEventListener('securitypolicyviolation', event => errors.push(event.violatedDirective + ' ' + event.blockedURI))
</script>"""
CLICK = """<script>
  const all = (where, how) => [...document.querySelectorAll(where)].map(how), first = id => document.querySelector(id)
  const press = (where, key) => first(where).dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}))
  const found = {}
  try {
    found.lines = all('#grid button', one => (one.click(), first('#grid svg').children.length))
    found.said = all('#grid button', one => (one.click(), first('#candidate h3').textContent))
    found.heads = all('#grid .head', one => one.textContent)
    all('#grid button', one => one.dispatchEvent(new Event('mouseenter')))
    if (first('#grid button')) {
      first('#grid [data-cell="0 3"]').click()
      press('#grid [data-cell="0 3"]', 'ArrowLeft')              // nothing is there
      press('#grid [data-cell="0 3"]', 'ArrowRight')
      found.moved = first('#grid [aria-pressed=true]').dataset.cell
      first('#round').value = 0
      first('#round').dispatchEvent(new Event('input'))
      found.slid = first('#grid [aria-pressed=true]').dataset.cell
    }
    found.texts = all('#texts button', one => (one.click(), first('#token').max))
    first('#layer').value = 0
    first('#layer').dispatchEvent(new Event('input'))
    found.tokens = all('.token', one => (one.click(), first('#attention').querySelectorAll('.text span').length))
    found.text = all('.token b', one => one.textContent).join('')
    press('#strip', 'ArrowLeft')
    press('#strip', 'ArrowDown')
    found.place = [first('#token').value, first('#layer').value]
    found.taken = all('.taken', one => one.cellIndex - 1)
    found.charts = all('#curves svg', one => one.querySelectorAll('polyline').length)
    found.words = first('#curves').textContent
    found.title = first('h1').textContent
    found.scripts = document.scripts.length
    found.size = [innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth]
  } catch (error) { errors.push(String(error)) }
  parent.postMessage(JSON.stringify({...found, errors, tab: document.title}), '*')
</script>"""
PHONE = """<iframe src="page.html" width="390" height="900" style="border: 0"></iframe><script>
  addEventListener('message', event => document.body.dataset.found = event.data)
</script>"""                                                    # chromium windows are at least 500 wide


def browse(shown, folder):
    """Open a page at the width of a phone and click through it. Return what CLICK found; skip without Chromium."""
    if not CHROMIUM:
        pytest.skip('no chromium here: apt-get install chromium')
    page = view.page(shown).replace('<head>', f'<head>{WATCH}').replace('</body>', f'{CLICK}</body>')
    (folder / 'page.html').write_text(page, encoding='utf-8')
    (folder / 'phone.html').write_text(PHONE)
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=9000', '--enable-logging=stderr',
             '--dump-dom', f'--user-data-dir={folder / "profile"}']
    done = subprocess.run([CHROMIUM, *flags, (folder / 'phone.html').as_uri()], capture_output=True, timeout=120)
    assert b'CONSOLE' not in done.stderr, done.stderr.decode()
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout.decode())[1]))
    assert found['errors'] == [] and found['size'] == [390, 0]
    assert found['tab'] == 'A window into a run' and found['scripts'] == 4
    return found


def test_a_browser_clicks_through_a_population(loops_run, experts_err, tmp_path):
    shown = view.view(view.ViewConfig(str(loops_run), QUESTION))
    found, rounds = browse(shown, tmp_path), shown['rsa']['rounds']
    readers = [sum(i in one['sampled'] for one in rounds[1]) for i in range(16)]
    assert found['lines'] == readers + [4] * 16
    assert found['heads'] == [f'round {t}{sum(not one["wrong"] for one in now)}/16' for t, now in enumerate(rounds)]
    assert found['said'] == [f'Candidate {i} in round {t}: ' + ('✗ wrong' if one['wrong'] else '✓ correct')
                             for t, now in enumerate(rounds) for i, one in enumerate(now)]
    assert (found['moved'], found['slid']) == ('1 3', '0 3')
    assert found['texts'] == [str(len(text['tokens']) - 1) for text in shown['texts']]
    last = shown['texts'][-1]
    assert found['tokens'] == [4 * (t + 1) for t in range(len(last['tokens']))]
    assert found['place'] == [str(len(last['tokens']) - 2), '1']
    assert found['taken'] == [last['expert'][layer][-2] for layer in range(3)]
    assert 'no log.csv' in found['words'] and found['charts'] == []


def test_a_browser_shows_hostile_text_as_text(text_run, tmp_path):
    write_log(tmp_path, 20, 'load', 'bias')
    shown = view.view(view.ViewConfig(str(text_run), HOSTILE)) | {
        'folder': HOSTILE, 'training': view.training_curves(tmp_path)}
    found = browse(shown, tmp_path)
    assert found['title'] == f'A window into {HOSTILE}' and found['text'].startswith('</script><script>document.title')
    assert found['charts'] == [2, 2, 2, 2, 1, 1] and 'did not log' not in found['words']
    shown['training'].pop('load')
    assert 'This run did not log the load per expert.' in browse(shown, tmp_path)['words']
